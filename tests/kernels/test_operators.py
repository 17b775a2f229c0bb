"""The kernels as torch operators: schemas, shapes for the compiler, autograd, threads of Python, places to cache."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from mfdist.kernels import gather_sum, hashed_gather_sum, row_products, sign_hash
from tests.kernels.lookups import make_lookup

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_accepts_the_lookup(dtype: torch.dtype) -> None:
    lookup = make_lookup(9, 3, 8, 5, dtype=dtype)
    table, scores = lookup.table.requires_grad_(), lookup.scores.requires_grad_()
    opcheck(torch.ops.mfdist.gather_sum.default, (table, lookup.row_ids, scores, 8, "t"))
    arguments = (table.detach(), lookup.row_ids, scores.detach(), lookup.grad_output, 8, "t")
    opcheck(torch.ops.mfdist.row_gradient.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 12])
def test_torch_accepts_the_hash(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 24).to(dtype).requires_grad_()
    # opcheck differentiates all outputs at once; eager and compiled gradients in bf16 are the same kernel's.
    opcheck(torch.ops.mfdist.sign_hash.default, (x, bits, "paper", 1.0))
    grad = torch.randn(5, 24 // bits)
    opcheck(torch.ops.mfdist.sign_hash_gradient.default, (x.detach(), grad, bits, "released", 1.0))


def layer(x: Tensor, table: Tensor) -> Tensor:
    codes, scores = sign_hash(x, 4)
    return gather_sum(table, codes, scores, 16) * 2


def test_compiling_breaks_no_graph_and_changes_no_bit() -> None:
    x, table = torch.randn(6, 12, requires_grad=True), torch.randn(48, 5, requires_grad=True)
    expected = layer(x, table)
    expected_grads = torch.autograd.grad(expected.sum(), (x, table))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x, table)
    grads = torch.autograd.grad(got.sum(), (x, table))
    assert torch.equal(got, expected)
    assert all(torch.equal(one, two) for one, two in zip(grads, expected_grads, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_is_refused() -> None:
    x, table = torch.randn(6, 12), torch.randn(48, 5)
    codes, scores = sign_hash(x, 4)
    lookups: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: layer(x, table), x),
        (lambda table: layer(x, table), table),
        (lambda scores: gather_sum(table, codes, scores, 16), scores),
        (lambda table: hashed_gather_sum(table, x, 4), table),
        (lambda x: hashed_gather_sum(table, x, 4), x),
        (lambda bias: hashed_gather_sum(table, x, 4, bias=bias), torch.randn(5)),
        (lambda x: row_products(table[:, :4], x), torch.randn(4)),
    ]
    for lookup, value in lookups:
        with pytest.raises(NotImplementedError, match="is differentiated by backward alone; got a tangent of forward"):
            torch.func.jvp(lookup, (value,), (value,))
        with forward_ad.dual_level():
            lookup(value)  # others may have tangents
            with pytest.raises(NotImplementedError, match="is differentiated by backward alone"):
                lookup(forward_ad.make_dual(value, value))


def test_vmap_is_a_loop() -> None:
    x, table = torch.randn(2, 6, 12), torch.randn(48, 5)
    found = torch.vmap(lambda x: layer(x, table))(x)
    assert torch.equal(found, torch.stack([layer(each, table) for each in x]))


def test_a_second_derivative_is_refused() -> None:
    x, table = torch.randn(6, 12, requires_grad=True), torch.randn(48, 5, requires_grad=True)
    first = torch.autograd.grad(layer(x, table).square().sum(), (x, table), create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        torch.autograd.grad(first[0].sum() + first[1].sum(), (x, table))


def test_gradients_of_both_by_finite_differences() -> None:
    table = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    codes = torch.randint(0, 4, (5, 2), dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda table, scores: gather_sum(table, codes, scores, 4), (table, scores))


def test_a_frozen_table_still_gives_scores_a_gradient() -> None:
    lookup = make_lookup(9, 3, 8, 5)
    scores = lookup.scores.requires_grad_()
    gather_sum(lookup.table, lookup.row_ids, scores, 8).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and lookup.table.grad is None


def test_meta_tensors_have_the_results_shapes() -> None:
    codes, scores = sign_hash(torch.empty(7, 24, device="meta"), 12)
    assert codes.shape == scores.shape == (7, 2)
    assert (codes.dtype, scores.dtype) == (torch.uint16, torch.float32)
    table = torch.empty(8192, 5, device="meta", dtype=torch.bfloat16)
    out = gather_sum(table, codes, scores, 4096)
    assert (out.shape, out.dtype) == ((7, 5), torch.bfloat16)


def test_threads_of_python_may_call_at_once() -> None:
    lookup = make_lookup(2000, 8, 64, 128)
    expected = gather_sum(lookup.table, lookup.row_ids, lookup.scores, 64)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: gather_sum(lookup.table, lookup.row_ids, lookup.scores, 64), range(12)))
    assert all(torch.equal(expected, result) for result in results)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HASH = "import torch, mfdist.kernels as k; print(k.sign_hash(torch.ones(1, 8), 8)[0].item())"


def test_importing_loads_no_compiler() -> None:
    loaded = run("import sys, mfdist.kernels; print([n for n in ('numba', 'llvmlite', 'triton') if n in sys.modules])")
    assert loaded.strip() == "[]"


def test_kernels_are_cached_where_it_is_said(tmp_path: Path) -> None:
    assert run(HASH, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "255"
    assert any(path.suffix == ".nbc" for path in tmp_path.rglob("*"))


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"  # what numba finds where no folder can be written
        f"{HASH}"
    )
    assert run(code).strip() == "255"
