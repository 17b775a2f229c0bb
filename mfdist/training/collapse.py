"""What is said when a layer's hashing has collapsed: most tokens have the same codes; it hardly tells them apart."""

from collections.abc import Sequence

from mfdist.training.layer_use import LayerUse

#: How the line begins.
COLLAPSED_BEGINNING = "a memory layer must hash tokens apart"

_SURE = 0.9  # a median score from here on: signs come from large offsets
_UNSURE = 1.5  # times the least score there is: signs come from activations near zero


def collapse_message(layers: Sequence[LayerUse], step: int) -> str:
    """Return one line on layers whose hashing has collapsed: what was counted, why, and what usually helps.

    Args:
        layers: at least one; figures are those of the worst.
        step: after how many steps they were found.
    """
    worst = min(layers, key=lambda use: use.evenness)
    others = "" if len(layers) == 1 else f" ({len(layers)} layers have collapsed, this one most)"
    return (
        f"{COLLAPSED_BEGINNING}; after step {step} {worst.name} does not{others}: its codes carry "
        f"{worst.code_entropy:.1f} of {worst.even_code_entropy:.1f} bits, {worst.constant_bits:.0%} of their bits are "
        f"the same for nearly every token, {worst.dead_share:.0%} of its rows are not used; {_cause(worst)}; "
        f"{_remedy(worst)}; mfdist report shows every table"
    )


def _cause(use: LayerUse) -> str:
    median = use.scores[len(use.scores) // 2]
    if median >= _SURE:
        return f"scores are near 1 (median {median:.2f}), so activations have offsets larger than their differences"
    if median <= _UNSURE * 2.0**-use.bits:
        return f"scores are near their least (median {median:.2g}), so activations are close to zero"
    return "activations have the same signs for most tokens"


def _remedy(use: LayerUse) -> str:
    if use.scores[len(use.scores) // 2] <= _UNSURE * 2.0**-use.bits:
        return (
            "what is before the layer has died: go on from an earlier checkpoint with a lower optimizer.dense.lr, or "
            "put a norm before the layer"
        )
    return (
        "usually a lower optimizer.dense.lr and optimizer.tables.lr or a longer warmup_fraction helps, from a "
        "checkpoint before this or from the start; in a model of your own, a norm right before the layer"
    )
