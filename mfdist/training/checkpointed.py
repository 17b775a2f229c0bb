"""A trained model as a run's checkpoint holds it, ready for use."""

from mfdist.config import parse_config
from mfdist.errors import CheckpointError, ConsistencyError
from mfdist.models import Transformer, build_model
from mfdist.training.device import choose_device
from mfdist.training.run import RunDirectory
from mfdist.training.state import load_model


def load_run_model(
    run: RunDirectory, step: int | None = None, *, data_fingerprint: str | None = None
) -> tuple[Transformer, int]:
    """Return the model of a committed step (by default the last), in evaluation mode, and the step.

    Args:
        run: the run.
        step: which of its committed steps.
        data_fingerprint: where given, the checkpoint must have been trained on this data.

    Raises:
        CheckpointError: nothing is committed, no such step, or it is damaged.
        ConsistencyError: the checkpoint was trained on other data.
    """
    if not run.checkpoints.steps():
        raise CheckpointError(f"{run.path} has no committed checkpoint yet; train on by `mfdist train --resume {run.path}`")
    state = run.checkpoints.load(step)
    check_fingerprint(state.attributes["data"]["fingerprint"], data_fingerprint, run)
    config = parse_config(state.attributes["config"], origin=f"{run.path}, step {state.step}")
    model = build_model(config.model, device="meta").to_empty(device=choose_device(run.config.training.device))
    load_model(model, state)
    return model.eval().requires_grad_(False), state.step


def check_fingerprint(trained_on: str, found: str | None, run: RunDirectory) -> None:
    """Raise ConsistencyError where a run's tokens are no longer those it was trained on."""
    if found is not None and found != trained_on:
        raise ConsistencyError(
            f"a run must see the text it began with; {run.path} was trained on tokens {trained_on[:12]} and the source "
            f"now gives {found[:12]}: the files or the tokenizer changed; restore them or start a new run"
        )
