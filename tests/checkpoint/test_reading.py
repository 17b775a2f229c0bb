"""Files come and go whole, whether by way of the page cache or past it, from memory on page boundaries or not."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mfdist.checkpoint.direct_io import PageMemory
from mfdist.checkpoint.durability import write_file
from mfdist.checkpoint.reading import read_file


def put_out_of_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def flags_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The flags that files were read with."""
    seen: list[int] = []
    preadv = os.preadv

    def watched(fd: int, *args: object) -> int:
        seen.append(fcntl.fcntl(fd, fcntl.F_GETFL))
        return preadv(fd, *args)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "preadv", watched)
    yield seen


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 100_001, 1 << 20, (1 << 20) + 68])
@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_comes_whole(tmp_path: Path, size: int, is_cached: bool) -> None:
    path, content = tmp_path / "file", np.random.default_rng(size).bytes(size)
    path.write_bytes(content)
    memory = PageMemory()
    for buffer in (memory.of(size), memoryview(bytearray(size + 100))[3:], memoryview(bytearray(size))):
        if not is_cached:
            put_out_of_cache(path)
        assert read_file(path, buffer) == size
        assert bytes(buffer[:size]) == content


def test_a_size_other_than_expected_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1024)
    put_out_of_cache(path)
    buffer = memoryview(bytearray(100_000))
    assert read_file(path, buffer) == 256 * 1024
    assert bytes(buffer) == (bytes(range(256)) * 1024)[:100_000]


def test_the_page_cache_is_passed_by_where_a_file_is_not_in_it(tmp_path: Path, flags_seen: list[int]) -> None:
    path, memory = tmp_path / "file", PageMemory()
    path.write_bytes(bytes(1 << 20))
    read_file(path, memory.of(1 << 20))
    assert not any(flags & os.O_DIRECT for flags in flags_seen)  # just written, so there
    try:
        with path.open("rb") as file:
            fcntl.fcntl(file.fileno(), fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("this file system reads by way of the page cache only")
    put_out_of_cache(path)
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            pytest.skip("this file system does not tell what is in the page cache")
    flags_seen.clear()
    for _ in range(100):  # pages that the kernel still reads ahead, for the look above, are not put out
        put_out_of_cache(path)
        read_file(path, memory.of(1 << 20))
        if any(flags & os.O_DIRECT for flags in flags_seen):
            break
    else:
        pytest.fail("no read passed the page cache by")


@pytest.mark.parametrize("size", [0, 1, 65536, 100_001, 1 << 20, (5 << 20) + 68])
def test_what_is_written_from_pages_or_from_elsewhere_is_the_same(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    pages = PageMemory().of(size)
    pages[:size] = content
    for number, part in enumerate((pages[:size], content, memoryview(b"xyz" + content)[3:])):
        path = tmp_path / str(number)
        os.close(write_file(path, part, b"the end"))
        assert path.read_bytes() == content + b"the end"


def test_pages_are_written_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "asked").open("wb") as file:
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("this file system writes by way of the page cache only")
    seen: list[tuple[int, int]] = []
    write = os.write

    def watched(fd: int, content: memoryview) -> int:
        seen.append((len(content), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return write(fd, content)

    monkeypatch.setattr(os, "write", watched)
    os.close(write_file(tmp_path / "file", PageMemory().of(1 << 20)[: (1 << 20) - 1], b"the end"))
    assert seen == [((1 << 20) - 4096, os.O_DIRECT), (4095, 0), (7, 0)]
