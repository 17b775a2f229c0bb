"""The manifest: what a step consists of, file by file, with checksums; itself the attributes of a zarr group."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfdist.checkpoint.checksum import checksum
from mfdist.checkpoint.folder import AnyFolder, open_folder
from mfdist.checkpoint.layout import FORMAT, FORMAT_VERSION, parse_step_name
from mfdist.errors import CheckpointError

#: Path inside a step. A group and not a loose file, because zarr-python warns of loose files when it lists a group.
MANIFEST = "manifest/zarr.json"

#: Formats this mfdist reads; golden steps of each are in tests/compat.
READ_VERSIONS = (1, 2)


@dataclass(frozen=True)
class FileEntry:
    """What is known of one file of a step."""

    num_bytes: int
    crc32c: str  # eight hexadecimal digits
    digest: str = ""  # xxh3 of what an array's file holds, without its index; empty for other files and in format 1

    def to_json(self) -> list[Any]:
        """Return the entry as it is written."""
        return [self.num_bytes, self.crc32c, *([self.digest] if self.digest else [])]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in a step but the manifest itself."""

    step: int
    created: str  # ISO 8601, UTC; for people, nothing is ordered by it
    arrays: tuple[str, ...]  # paths in the order they were saved
    written_bytes: int = 0  # by this save; the rest it shares with earlier steps
    files: Mapping[str, FileEntry]  # path inside the step → entry

    @property
    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(entry.num_bytes for entry in self.files.values())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Return name → size of all files."""
        return {name: entry.num_bytes for name, entry in self.files.items()}

    def to_bytes(self) -> bytes:
        """Return the manifest as the metadata of a zarr v3 group; equal manifests give equal bytes."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "created": self.created,
            "written_bytes": self.written_bytes,
            "arrays": list(self.arrays),
            "files": {path: entry.to_json() for path, entry in sorted(self.files.items())},
        }
        return _document(body)

    @classmethod
    def read(cls, place: AnyFolder) -> "Manifest":
        """Read and check the manifest of the step at `place`.

        Raises:
            CheckpointError: it is missing, damaged, or of a newer format.
        """
        folder = open_folder(place)
        directory, path = folder.path, f"{folder.path}/{MANIFEST}"
        try:
            raw = folder.read(MANIFEST)
        except OSError as error:
            raise CheckpointError(
                f"a committed step must have a manifest; cannot read {path} ({error.strerror}); use another step."
            ) from error
        try:
            body: dict[str, Any] = json.loads(raw)["attributes"]
            if body["crc32c"] != checksum(_canonical({k: v for k, v in body.items() if k != "crc32c"})):
                raise ValueError("its contents do not have its checksum")
            version = body["format_version"]
            if version in READ_VERSIONS and raw != _document({k: v for k, v in body.items() if k != "crc32c"}):
                raise ValueError("its bytes are not those that were written")
            files = (
                {name: FileEntry(*entry) for name, entry in body["files"].items()} if version in READ_VERSIONS else {}
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"a step's manifest must be as it was written; {path} is damaged ({error}); use another step."
            ) from error
        if version not in READ_VERSIONS:
            raise CheckpointError(
                f"this mfdist reads checkpoint formats up to {FORMAT_VERSION}; {directory} has format {version}; "
                "use the mfdist that wrote it or a newer one."
            )
        named = parse_step_name(folder.name)
        if named is not None and named[0] != body["step"]:
            raise CheckpointError(
                f"a step must lie under its own name; {directory} holds step {body['step']}; rename it back."
            )
        return cls(
            step=body["step"],
            created=body["created"],
            arrays=tuple(body["arrays"]),
            written_bytes=body.get("written_bytes", sum(entry.num_bytes for entry in files.values())),
            files=files,
        )


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True).encode()


def _document(body: Mapping[str, Any]) -> bytes:
    attributes = {**body, "crc32c": checksum(_canonical(body))}
    return _canonical({"attributes": attributes, "node_type": "group", "zarr_format": 3}) + b"\n"
