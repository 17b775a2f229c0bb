"""A run's saver tells of what its checkpoints cost training."""

from pathlib import Path

import torch

from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.state import CheckpointState
from mfdist.config_places import CheckpointConfig
from mfdist.training.events import Event, Saved, Warned
from mfdist.training.saver import RunSaver


def events_of(path: Path, config: CheckpointConfig) -> list[Event]:
    told: list[Event] = []
    with RunSaver(CheckpointDirectory(path), config, told.append) as saver:
        for step in (1, 2):
            saver.save(CheckpointState(step=step, tables={}, dense={"w": torch.zeros(1 << 18)}, attributes={}))
        saver.finish()
    return told


def test_a_state_too_large_to_be_copied_is_announced_once(tmp_path: Path) -> None:
    warned, *saved = events_of(tmp_path / "a", CheckpointConfig(max_copy_gib=0.0005))
    assert isinstance(warned, Warned)
    assert "0.00098 GiB to copy are more than checkpoint.max_copy_gib=0.0005; raise it" in warned.message
    assert "\n" not in warned.message
    assert [type(event) for event in saved] == [Saved, Saved]
    assert all(isinstance(event, Saved) and event.stall_s == event.save_s for event in saved)


def test_nothing_is_announced_where_it_fits_or_was_asked_for(tmp_path: Path) -> None:
    for number, config in enumerate((CheckpointConfig(), CheckpointConfig(asynchronous=False, max_copy_gib=0.0005))):
        assert [type(event) for event in events_of(tmp_path / str(number), config)] == [Saved, Saved]
