"""Turning a failed write in a run's directory into one line that says what is safe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mfdist.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CheckpointError, naming the file, where the body cannot write `path`: a full, failing or read-only disk."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"a run's directory must be writable; writing {path} failed ({error.strerror or error}); committed "
            "steps are intact: mend it or make room, and go on with --resume"
        ) from error
