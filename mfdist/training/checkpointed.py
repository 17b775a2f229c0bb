"""A trained model as a run's checkpoint holds it, ready for use."""

from dataclasses import replace

from mfdist.errors import CheckpointError
from mfdist.models import Transformer, build_model
from mfdist.training.device import choose_device
from mfdist.training.run import RunDirectory
from mfdist.training.state import check_data, config_of, load_model


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
        resume = f"mfdist train --resume {run.path}"
        raise CheckpointError(f"{run.path} has no committed checkpoint yet; train on by `{resume}`")
    state = run.checkpoints.load(step)
    if data_fingerprint is not None:
        check_data(state, data_fingerprint)
    device = choose_device("cpu" if run.config.training.device == "cpu" else "auto")  # a GPU's run reads anywhere
    if served := [info for info in run.served_tables.steps() if info.step == state.step]:
        state = replace(state, tables=run.served_tables.load(served[0].step).tables)
    model = build_model(config_of(state).model, device="meta").to_empty(device=device)
    load_model(model, state)
    return model.eval().requires_grad_(False), state.step
