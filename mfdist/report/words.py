"""A run in words: what it learnt, how fast, how its tables are used, and whether anything is wrong."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from mfdist import quantities
from mfdist.training.collapse import COLLAPSED_BEGINNING
from mfdist.training.layer_use import COLLAPSED

Story = dict[str, Any]

#: Layers whose codes carry less than this share of what they could are named; below COLLAPSED, warned of.
_UNEVEN = 0.5


def summary(story: Story, others: Sequence[Story] = ()) -> list[str]:
    """Return what a run shows, in sentences; the most important first."""
    sentences = [_what(story), _learnt(story), *_against(story, others), _speed(story), _tables(story), _end(story)]
    return [sentence for sentence in sentences if sentence]


def findings(story: Story) -> list[dict[str, str]]:
    """Return what deserves attention: `level` is bad or note, `text` says what and what to do."""
    found = [*_ended(story), *_overlearnt(story), *_beaten(story), *_warned(story), *_stalled(story)]
    return [{"level": level, "text": text} for level, text in found]


def figures(story: Story) -> list[dict[str, str]]:
    """Return the key figures: `label`, `value`, `unit` and a `note` under it, which may be empty."""
    found = []
    scored = story["evaluations"][-1] if story["evaluations"] else None
    if scored is not None:
        best = _best_baseline(story)
        note = "" if best is None else f"{best[0]}: {best[1]:.3f}"
        found.append(("validation", f"{scored['bits_per_byte']:.3f}", "bits per byte", note))
    losses = story["steps"]["curves"]["loss"]["mean"]
    if losses and losses[-1] is not None:
        found.append(("training loss", f"{losses[-1]:.3f}", "nats a token", f"first {losses[0]:.3f}"))
    if story["tokens_per_s"]:
        twin = story["twin_tokens_per_s"]
        note = "" if not twin else f"dense twin: {quantities.count(twin)}"
        found.append(("speed", quantities.count(story["tokens_per_s"]), "tokens/s", note))
    total = story["last_step"]
    found.append(
        (
            "steps",
            f"{story['step']:,}",
            f"of {total:,}",
            f"{quantities.count(story['step'] * story['tokens_per_step'])} tokens",
        )
    )
    if story["trained_s"]:
        starts = "" if story["starts"] < 2 else f"in {story['starts']} stretches"
        found.append(("time", quantities.duration(story["trained_s"]), "", starts))
    if story["peak_memory_bytes"]:
        value, unit = quantities.num_bytes(story["peak_memory_bytes"]).split(" ")
        found.append(("peak memory", value, unit, "of the first rank" if story["num_ranks"] > 1 else ""))
    if story["kind"] == "memory" and story["num_table_parameters"]:
        dense = quantities.count(story["num_dense_parameters"])
        found.append(("in tables", quantities.count(story["num_table_parameters"]), "parameters", f"{dense} dense"))
    used = _last_layers(story)
    if used:
        evenness = sum(_evenness(use) for use in used) / len(used)
        dead = sum(use["dead_share"] for use in used) / len(used)
        found.append(("codes carry", f"{evenness:.0%}", "of even codes", f"{dead:.0%} of rows not hit"))
    return [dict(zip(("label", "value", "unit", "note"), figure, strict=True)) for figure in found]


def model_line(story: Story) -> str:
    """Return one line on what is trained."""
    model = story["model"]
    what = "MemoryFormer" if story["kind"] == "memory" else "dense transformer"
    bits = f", {model['bits']} bits a code" if story["kind"] == "memory" else ""
    ranks = f" on {story['num_ranks']} ranks" if story["num_ranks"] > 1 else ""
    return (
        f"{what}, {model['num_layers']} layers of width {model['hidden_dim']:,}{bits}, "
        f"{model['optimizer']}, {model['precision']}{ranks}"
    )


Findings = Iterator[tuple[str, str]]


def _ended(story: Story) -> Findings:
    state, detail = story["state"]["kind"], story["state"]["detail"]
    resume = f"Go on with it by: mfdist train --resume {shlex.quote(str(story['path']))}"
    if state == "failed":
        yield "bad", f"Training failed: {detail}"
    elif state == "silent":
        yield "bad", f"{detail} {resume}"
    elif state == "stopped":
        yield "note", f"{detail} {resume}"


def _overlearnt(story: Story) -> Findings:
    """Compare validations of the same part of the text."""
    scores = [(row["step"], row["bits_per_byte"]) for row in story["evaluations"] if not row["is_final"]]
    if len(scores) < 3:
        return
    (best_step, best), (step, last) = min(scores, key=lambda score: score[1]), scores[-1]
    if last > best * 1.01:
        yield (
            "note",
            f"Validation was best at step {best_step:,} ({best:.3f} bits per byte) and {last / best - 1:.1%} worse at "
            f"step {step:,}: the model has begun to memorise, or its rate is too high.",
        )


def _beaten(story: Story) -> Findings:
    if story["state"]["kind"] == "finished" and story["evaluations"]:
        last = story["evaluations"][-1]["bits_per_byte"]
        if better := [name for name, value in story["baselines"].items() if last >= value]:
            yield "bad", f"The model does no better than {' and '.join(better)}: it has learnt next to nothing."


def _warned(story: Story) -> Findings:
    is_collapsed = any(_evenness(use) < COLLAPSED for use in _last_layers(story))
    for message in story["warnings"]:
        if not message.startswith(COLLAPSED_BEGINNING):
            yield "note", message
        elif is_collapsed:
            yield "bad", message
        else:
            yield "note", f"{message}. By the last validation it had recovered."


def _stalled(story: Story) -> Findings:
    stalled_s = sum(save["stall_s"] or 0.0 for save in story["checkpoints"])
    if story["trained_s"] and stalled_s > 0.05 * story["trained_s"]:
        yield (
            "note",
            f"Training waited {quantities.duration(stalled_s)} for checkpoints, {stalled_s / story['trained_s']:.0%} "
            "of its time: raise checkpoint.every or checkpoint.max_copy_gib.",
        )


def _what(story: Story) -> str:
    steps = f"{story['step']:,} of {story['last_step']:,} steps"
    if story["step"] == story["last_step"]:
        steps = f"{story['step']:,} steps"
    tokens = quantities.count(story["step"] * story["tokens_per_step"])
    state = story["state"]["kind"]
    if not story["step"]:
        return (
            "The run has not made a step yet."
            if state in ("new", "running")
            else "The run ended before its first step."
        )
    size = ""
    if story["num_table_parameters"]:
        size = f" with {quantities.count(story['num_table_parameters'])} parameters in tables"
    kind = "MemoryFormer" if story["kind"] == "memory" else "dense transformer"
    verb = "is learning" if state == "running" else "learnt"
    return f"A {kind}{size} {verb} from {tokens} tokens in {steps}."


def _learnt(story: Story) -> str:
    if not story["evaluations"]:
        return "It has not been validated yet." if story["step"] else ""
    scored = story["evaluations"][-1]
    text = "the whole validation text" if scored["is_final"] else "a part of the validation text"
    sentence = f"It compresses {text} to {scored['bits_per_byte']:.3f} bits per byte"
    best = _best_baseline(story)
    if best is None:
        return sentence + "."
    change = 1 - scored["bits_per_byte"] / best[1]
    if change > 0:
        return f"{sentence}, {change:.0%} less than {best[0]} needs ({best[1]:.3f})."
    return f"{sentence}, which is no better than {best[0]} ({best[1]:.3f})."


def _against(story: Story, others: Sequence[Story]) -> list[str]:
    """Return how the run compares with each other, after as many tokens as both have seen."""
    sentences = []
    for other in others:
        pair = _at_equal_tokens(story, other)
        if pair is None:
            sentences.append(
                f"It cannot be compared with {other['label']} yet: they have no validation at equal tokens."
            )
            continue
        tokens, ours, theirs = pair
        change = ours / theirs - 1
        how = "as well as" if abs(change) < 0.001 else f"{abs(change):.1%} {'better' if change < 0 else 'worse'} than"
        sentences.append(
            f"After {quantities.count(tokens)} tokens it does {how} {other['label']} "
            f"({ours:.3f} against {theirs:.3f} bits per byte)."
        )
    return sentences


def _at_equal_tokens(story: Story, other: Story) -> tuple[float, float, float] | None:
    """Return the most tokens at which both were validated, in the same way, and both scores."""
    ours = {(row["tokens"], row["is_final"]): row["bits_per_byte"] for row in story["evaluations"]}
    theirs = {(row["tokens"], row["is_final"]): row["bits_per_byte"] for row in other["evaluations"]}
    common = sorted(ours.keys() & theirs.keys())
    return (common[-1][0], ours[common[-1]], theirs[common[-1]]) if common else None


def _speed(story: Story) -> str:
    if not story["tokens_per_s"]:
        return ""
    sentence = f"It trains {quantities.count(story['tokens_per_s'])} tokens a second on {story['device']}"
    if story["twin_tokens_per_s"]:
        ratio = story["tokens_per_s"] / story["twin_tokens_per_s"]
        sentence += f", {ratio:.2f} times as fast as its dense twin"
    lookups = next((part["share"] for part in story["time"]["step"] if part["name"] == "lookups"), None)
    if lookups and story["kind"] == "memory":
        sentence += f"; {lookups:.0%} of a step goes to lookups"
    return sentence + "."


def _tables(story: Story) -> str:
    used = _last_layers(story)
    if not used:
        return ""
    evenness = sum(_evenness(use) for use in used) / len(used)
    worst = min(used, key=_evenness)
    sentence = f"Its codes carry {evenness:.0%} of the bits that even codes would"
    if _evenness(worst) < _UNEVEN:
        return (
            f"{sentence}; least in {worst['name']} ({_evenness(worst):.0%}, "
            f"{worst['dead_share']:.0%} of its rows were not hit)."
        )
    dead = sum(use["dead_share"] for use in used) / len(used)
    return f"{sentence}, evenly over its layers; {dead:.0%} of the rows were not hit by the last validation."


def _end(story: Story) -> str:
    match story["state"]["kind"]:
        case "running":
            left = story["last_step"] - story["step"]
            if story["step"] and left > 0 and story["trained_s"]:
                per_step = story["trained_s"] / story["step"]
                return f"It is still training; about {quantities.duration(per_step * left)} to go."
            return "It is still training."
        case "failed":
            return "It ended with an error, below."
        case "silent":
            return "It seems to have died: its last line is not an end."
        case "stopped":
            return "It was stopped before its last step and can go on."
        case _:
            return ""


def _best_baseline(story: Story) -> tuple[str, float] | None:
    return min(story["baselines"].items(), key=lambda item: float(item[1]), default=None)


def _last_layers(story: Story) -> list[dict[str, Any]]:
    return list(story["tables"]["history"][-1]["layers"]) if story["tables"] else []


def _evenness(use: dict[str, Any]) -> float:
    return float(use["code_entropy"] / use["even_code_entropy"]) if use["even_code_entropy"] else 1.0
