"""Saving one step by all ranks, in phases.

1. prepare: every rank tells what it holds; rank 0 cleans up and opens the hidden folder the step is written in.
2. pieces: every rank leaves its pieces of files that lie across ranks where their owners find them.
3. files: every rank writes the files that are its own, and puts together those across ranks that it owns.
4. commit: rank 0 writes the documents and the manifest, syncs the folders, and renames the step into place.

A failure of one rank in any phase is raised on all; what was half written is removed, earlier steps are untouched.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from mfdist.checkpoint.division import divide
from mfdist.checkpoint.dtypes import STORED_DTYPES, dtype_name
from mfdist.checkpoint.folder import Folder
from mfdist.checkpoint.holding import Holding, holdings_of
from mfdist.checkpoint.layout import FORMAT, FORMAT_VERSION, describe
from mfdist.checkpoint.manifest import FileEntry, Manifest
from mfdist.checkpoint.ranks import Ranks, together
from mfdist.checkpoint.series import StepSeries, locate
from mfdist.checkpoint.step_info import StepInfo
from mfdist.checkpoint.writer import PIECES, Base, RankWriter
from mfdist.checkpoint.zarr_format import array_document, group_document
from mfdist.errors import CheckpointError, ConfigError, MfdistError
from mfdist.spec import Region

if TYPE_CHECKING:
    from mfdist.checkpoint.state import CheckpointState


class Saving:
    """One save, as one rank sees it; call `run` once.

    Args:
        state: what this rank holds.
        series: where to; on a file system that all ranks share.
        ranks: who saves together.
        is_incremental: whether files that hold what they held in the last step are linked instead of written.
    """

    def __init__(
        self, state: "CheckpointState", series: StepSeries, ranks: Ranks, *, is_incremental: bool = True
    ) -> None:
        self._state = state
        self._series = series
        self._ranks = ranks
        self._is_incremental = is_incremental
        self._is_committed = False

    def run(self) -> StepInfo:
        """Save, and return what it came to.

        Raises:
            ConfigError: a tensor or name cannot be stored, or the ranks' shards do not fit together or leave a hole.
            UnavailableError: another writer holds the directory, or a rank is late.
            CheckpointError: the disk is full, failing or read-only, or the directory was deleted meanwhile.
        """
        with ExitStack() as stack:
            mine: dict[str, Holding] = {}

            def prepare() -> dict[str, Any]:
                mine.update(holdings_of(self._state))
                return self._opened(mine, stack)

            self._ranks.begin()
            answers = self._together("prepare", prepare)
            self._folder = self._series.folder(answers[0]["folder"])
            self._arrays, held = _merged(answers, mine)
            plans = [
                plan
                for path, holding in self._arrays.items()
                for plan in divide(path, holding.grid, held[path], self._ranks.rank)
            ]
            base = _base(self._series.folder(answers[0]["base"])) if answers[0]["base"] else None
            self._writer = RankWriter(self._folder, self._ranks.rank, self._arrays, plans, base)
            stack.callback(self._writer.close)
            self._together("pieces", self._write_pieces)
            self._together("files", self._write_files)
            committed = self._together("commit", self._commit)[0]
        return StepInfo(path=self._series.folder(committed.pop("name")).path, **committed)

    def _opened(self, mine: Mapping[str, Holding], stack: ExitStack) -> dict[str, Any]:
        """Return what this rank tells the others before anything is written."""
        told: dict[str, Any] = {
            "step": self._state.step,
            "arrays": {path: holding.to_json() for path, holding in mine.items()},
        }
        if self._ranks.rank == 0:
            stack.enter_context(self._series.writer_lock())
            self._series.clean()
            committed = self._series.revisions()
            told["base"] = locate(self._series, None)[1].name if committed and self._is_incremental else None
            folder = self._series.begin(self._state.step)
            stack.callback(self._remove, folder)
            told["folder"] = folder.name
        return told

    def _write_pieces(self) -> None:
        if not self._folder.is_there():
            raise CheckpointError(
                f"all ranks must see the checkpoint directory; rank {self._ranks.rank} does not find "
                f"{self._folder.path}; "
                "use a file system that all hosts share."
            )
        self._writer.write_pieces()

    def _write_files(self) -> None:
        self._writer.write_files()
        if self._ranks.rank != 0:
            files = {name: entry.to_json() for name, entry in self._writer.files.items()}
            report = {"written": self._writer.num_written_bytes, "files": files}
            self._folder.make([PIECES])
            self._folder.write(_report_name(self._ranks.rank), json.dumps(report).encode(), is_lasting=False)

    def _commit(self) -> dict[str, Any] | None:
        if self._ranks.rank != 0:
            return None
        files: dict[str, FileEntry] = {}
        written_bytes = 0
        for rank in range(1, self._ranks.world_size):
            report = json.loads(self._folder.read(_report_name(rank)))
            files |= {name: FileEntry(*entry) for name, entry in report["files"].items()}
            written_bytes += report["written"]
        if self._ranks.world_size > 1:
            self._folder.remove(PIECES)
        self._writer.write_documents(self._documents())
        files |= self._writer.files
        manifest = Manifest(
            step=self._state.step,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            arrays=tuple(self._arrays),
            written_bytes=written_bytes + self._writer.num_written_bytes,
            files=files,
        )
        committed = self._series.commit(self._state.step, self._folder, manifest)
        self._is_committed = True
        told = dataclasses.asdict(StepInfo.of(self._state.step, committed.path, manifest))
        del told["path"]  # where it is mounted may differ from host to host
        return {**told, "name": committed.name}

    def _documents(self) -> dict[str, bytes]:
        """Return every zarr.json of the step but the manifest's."""
        attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": self._state.step}
        documents = {"zarr.json": group_document({**attributes, "attributes": dict(self._state.attributes)})}
        for path, holding in self._arrays.items():
            stored = dtype_name(STORED_DTYPES[dtype_name(holding.dtype)])
            described = {"dtype": dtype_name(holding.dtype)}
            documents[f"{path}/zarr.json"] = array_document(holding.grid, stored, holding.item_bytes, described)
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                documents["/".join([*parts[:depth], "zarr.json"])] = group_document({})
        return documents

    def _remove(self, folder: Folder) -> None:
        if not self._is_committed:
            folder.remove()

    def _together(self, tag: str, act: Callable[[], Any]) -> list[Any]:
        def act_or_explain() -> Any:
            try:
                return act()
            except MfdistError:
                raise
            except OSError as error:
                reason = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
                raise CheckpointError(
                    f"step {self._state.step} must be written whole to be saved; writing under {self._series.path} "
                    f"failed ({reason}); earlier steps are intact, make room or mend the disk and save again."
                ) from error

        return together(self._ranks, tag, act_or_explain)


def _merged(
    answers: Sequence[Mapping[str, Any]], mine: Mapping[str, Holding]
) -> tuple[dict[str, Holding], dict[str, list[list[Region]]]]:
    """Return every array there is, with this rank's parts of it, and who holds which regions of it."""
    arrays: dict[str, Holding] = {}
    held: dict[str, list[list[Region]]] = {}
    for rank, answer in enumerate(answers):
        if answer["step"] != answers[0]["step"]:
            raise ConfigError(
                f"all ranks must save the same step; rank 0 saves {answers[0]['step']}, rank {rank} {answer['step']}; "
                "call save at the same steps everywhere."
            )
        for path, told in answer["arrays"].items():
            known = Holding.from_json(told)
            first = arrays.setdefault(path, known)
            if (first.shape, first.dtype) != (known.shape, known.dtype):
                raise ConfigError(
                    f"an array must have one shape and dtype on all ranks; {describe(path)} is "
                    f"{list(first.shape)} {dtype_name(first.dtype)} and, on rank {rank}, {list(known.shape)} "
                    f"{dtype_name(known.dtype)}; build the same model everywhere."
                )
            held.setdefault(path, [[] for _ in answers])[rank] = [
                Region(rows=(top, bottom), columns=(left, right)) for top, bottom, left, right in told["regions"]
            ]
    return {**arrays, **mine}, held


def _report_name(rank: int) -> str:
    return f"{PIECES}/rank-{rank}.json"


def _base(folder: Folder) -> Base | None:
    try:
        return Base(folder, Manifest.read(folder))
    except CheckpointError:
        return None  # damaged: everything is written again
