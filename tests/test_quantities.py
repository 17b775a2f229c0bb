"""Quantities read as people write them, at every border between units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist import quantities
from mfdist.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (950, "950"), (999, "999"), (999.6, "1.0k"), (8123, "8.1k"), (12_400_000, "12.4M"), (142e9, "142B")],
)
def test_count(value, expected):
    assert quantities.count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (512, "512 B"), (1024, "1.0 KiB"), (1_288_490_188, "1.2 GiB"), (1 << 60, "1024 PiB")],
)
def test_num_bytes(value, expected):
    assert quantities.num_bytes(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", 512),
        ("80GB", 80_000_000_000),
        ("64GiB", 64 << 30),
        ("79.6 gib", int(79.6 * 2**30)),
        (" 1 TB ", 10**12),
        ("2k", 2000),
        ("1B", 1),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert quantities.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "0GB", "8 0GB", "1e9", "80 GB of it"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="a size must be"):
        quantities.parse_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0.0s"),
        (0.42, "0.4s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (100, "1m40s"),
        (3599.7, "1h00m"),
        (11_100, "3h05m"),
        (187_200, "2d04h"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_duration(seconds, expected):
    assert quantities.duration(seconds) == expected


def test_share():
    assert quantities.share(0.414) == "41 %"


def test_threads():
    assert [quantities.threads(number) for number in (1, 2)] == ["1 thread", "2 threads"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_question_mark(value):
    assert quantities.count(value) == quantities.num_bytes(value) == "?"


@given(st.text())
def test_printable_text_holds_no_control_characters(text):
    shown = quantities.printable(text)
    assert len(shown) == len(text)
    assert all(char in "\n\t" or char.isprintable() for char in shown)


def test_printable_keeps_ordinary_text():
    assert quantities.printable("def f():\n\treturn 'é漢🙂'") == "def f():\n\treturn 'é漢🙂'"
