"""Checks every kernel against float64 and times it beside what a user would call instead."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from mfdist.benchmarks import (
    block_contenders,
    block_step_contenders,
    hash_contenders,
    lookup_case,
    lookup_contenders,
    update_contenders,
)
from mfdist.benchmarks.ceilings import Ceilings
from mfdist.benchmarks.contender import DIFFERS, Comparison, Contender, Distance, Outputs, Result
from mfdist.benchmarks.timing import extra_bytes, timings
from mfdist.errors import ConfigError
from mfdist.kernels import check_errors


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to measure: shell patterns for operations, cases and implementations; none selects all."""

    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()

    def takes(self, op: str, case: str) -> bool:
        """Return whether an operation on a case is measured."""
        return _fits(op, self.ops) and _fits(case, self.cases)

    def takes_impl(self, impl: str) -> bool:
        """Return whether an implementation is; "mfdist" means all of mfdist's."""
        return _fits(impl, self.impls) or _fits(impl.split("-")[0], self.impls)

    def check(self, device: str) -> None:
        """Raise ConfigError, with what there is, if nothing is taken on a device."""
        everything = list(_comparisons(device))
        if not any(
            self.takes(each.op, each.case) and any(map(self.takes_impl, each.contenders)) for each in everything
        ):
            raise ConfigError(
                f"there must be something to measure on {device}; got {self}; operations are "
                f"{_listed(each.op for each in everything)}; cases are {_listed(each.case for each in everything)}; "
                f"implementations are {_listed(name for each in everything for name in each.contenders)}"
            )

    def __str__(self) -> str:
        told = {"op": self.ops, "case": self.cases, "impl": self.impls}
        return " ".join(f"--{option} {pattern}" for option, patterns in told.items() for pattern in patterns)


def measure(device: str, ceilings: Ceilings, selection: Selection, *, seconds: float, repeats: int) -> Iterator[Result]:
    """Yield what is found of each contender, as it is found.

    Args:
        device: "cuda" or "cpu".
        ceilings: measured on it.
        selection: what to measure.
        seconds: how long to time each contender; 0 to check alone.
        repeats: how many further calls must give the same bits where a contender promises them.

    Raises:
        ConfigError: the selection takes nothing.
    """
    selection.check(device)
    for comparison in _comparisons(device):
        names = [name for name in comparison.contenders if selection.takes_impl(name)]
        if not names or not selection.takes(comparison.op, comparison.case):
            continue
        # A GPU's memory holds one at a time; on a CPU, which is shared, they take turns.
        for group in [names] if device == "cpu" else [[name] for name in names]:
            with torch.no_grad():
                yield from _compare(comparison, group, device, ceilings, seconds, repeats)
            _release(device)


def _comparisons(device: str) -> Iterator[Comparison]:
    for hash_name, shape in hash_contenders.CASES[device].items():
        yield from hash_contenders.comparisons(hash_name, shape, device)
    for name, case in lookup_case.CASES[device].items():
        yield from lookup_contenders.comparisons(name, case, device)
        if case.has_backward:
            yield from update_contenders.comparisons(name, case, device)
    for block_name, block in block_contenders.CASES[device].items():
        yield from block_contenders.comparisons(block_name, block, device)
    for step_name, lookups in block_step_contenders.CASES[device].items():
        yield from block_step_contenders.comparisons(step_name, lookups, device)


def _compare(
    comparison: Comparison, names: list[str], device: str, ceilings: Ceilings, seconds: float, repeats: int
) -> list[Result]:
    results: list[Result] = []
    right: list[tuple[int, Contender]] = []
    for name in names:
        result = Result(op=comparison.op, case=comparison.case, impl=name)
        try:
            contender = comparison.contenders[name]()
            result = replace(result, **_checked(contender, device, repeats))
        except torch.OutOfMemoryError:
            result = replace(result, note="needs more memory than there is")
        else:
            if seconds and not result.is_wrong:
                right.append((len(results), contender))
        results.append(result)
    with torch.inference_mode(comparison.is_inference):
        timed = timings([contender.work for _, contender in right], device, seconds)
    for (index, contender), (median_us, spread) in zip(right, timed, strict=True):
        rate = 1e6 * contender.num_bytes / median_us
        results[index] = replace(
            results[index],
            median_us=median_us,
            spread=spread,
            bytes_per_s=rate,
            share_of_ceiling=rate / ceilings.of(comparison.ceiling),
        )
    return results


def _checked(contender: Contender, device: str, repeats: int) -> dict[str, Any]:
    """Return the fields of a result that checking finds."""
    outputs = contender.outputs()
    worst = max(contender.distances(outputs), key=_closeness)
    found: dict[str, Any] = {"error": worst.relative, "tolerance": worst.tolerance}
    if contender.repeats and worst.is_close:
        same = all(_is_same(outputs, contender.outputs()) for _ in range(repeats))
        found |= {"repeats": repeats} if same else {"note": DIFFERS}
    del outputs
    if device == "cuda":
        check_errors()
        if contender.step is not None:
            found["extra_bytes"] = extra_bytes(contender.step)
    return found


def _closeness(distance: Distance) -> float:
    return distance.relative / distance.tolerance if distance.relative == distance.relative else float("inf")


def _is_same(outputs: Outputs, again: Outputs) -> bool:
    return all(torch.equal(one, two) for one, two in zip(outputs, again, strict=True))


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
