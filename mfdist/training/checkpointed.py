"""A trained model as a run's checkpoint holds it, ready for use."""

import shlex
from dataclasses import replace
from pathlib import Path

from mfdist.checkpoint.folder import AnyFolder, is_url
from mfdist.checkpoint.layout import table_path
from mfdist.checkpoint.mapping import map_rows
from mfdist.checkpoint.step_files import StepFiles
from mfdist.errors import CheckpointError, ConfigError
from mfdist.models import Transformer, build_model
from mfdist.table import Table
from mfdist.tables.mapped import MappedTable
from mfdist.training.device import choose_device
from mfdist.training.run import RunDirectory
from mfdist.training.state import check_data, config_of, load_model


def load_run_model(
    run: RunDirectory,
    step: int | None = None,
    *,
    data_fingerprint: str | None = None,
    map_tables: bool = False,
) -> tuple[Transformer, int]:
    """Return the model of a committed step (by default the last), in evaluation mode, and the step.

    Args:
        run: the run.
        step: which of its committed steps.
        data_fingerprint: where given, the checkpoint must have been trained on this data.
        map_tables: leave the tables in the checkpoint's files, which may be larger than memory; on the CPU. Rows are
            then not compared with their checksums.

    Raises:
        CheckpointError: nothing is committed, no such step, or it is damaged.
        ConsistencyError: the checkpoint was trained on other data.
        ConfigError: tables are to be mapped and lie in an object store.
    """
    steps = run.checkpoints.steps()
    if not steps:
        resume = f"mfdist train --resume {shlex.quote(str(run.path))}"
        raise CheckpointError(f"{run.path} has no committed checkpoint yet; train on by `{resume}`")
    state = run.checkpoints.load(step, tables=() if map_tables else None)
    if data_fingerprint is not None:
        check_data(state, data_fingerprint)
    served = next((info for info in run.served_tables.steps() if info.step == state.step), None)
    config = config_of(state).model
    if map_tables:
        place = next(info.path for info in steps if info.step == state.step) if served is None else served.path
        model = build_model(config, device="cpu", table_device="meta")
        _map_tables(model, place)
    else:
        if served is not None:
            state = replace(state, tables=run.served_tables.load(served.step).tables)
        device = choose_device("cpu" if run.config.training.device == "cpu" else "auto")  # a GPU's run reads anywhere
        model = build_model(config, device="meta").to_empty(device=device)
    load_model(model, state)
    return model.eval().requires_grad_(False), state.step


def _map_tables(model: Transformer, place: AnyFolder) -> None:
    """Put mapped tables in the place of a model's own."""
    if is_url(place):
        raise ConfigError(f"tables are mapped from a folder of this machine; got {place}; copy the step here")
    with StepFiles(Path(str(place))) as files:
        for module in list(model.modules()):
            for name, table in module.named_children():
                if isinstance(table, Table):
                    setattr(module, name, _mapped(table, files))


def _mapped(table: Table, files: StepFiles) -> MappedTable:
    path = table_path(table.spec.name, "weight")
    if path not in files.manifest.arrays:
        raise CheckpointError(f'a checkpoint must hold the model\'s tables; "{table.spec.name}" is not in {files.root}')
    array = files.array(path)
    if array.grid.shape != (table.spec.num_rows, table.spec.row_dim):
        raise CheckpointError(
            f'table "{table.spec.name}" must be {table.spec.num_rows} × {table.spec.row_dim}; '
            f"got {list(array.grid.shape)} in {files.root}"
        )
    return MappedTable(replace(table.spec, dtype=array.dtype), map_rows(files, array))
