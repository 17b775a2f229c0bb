"""Collect some 250 MB of real prose and code from Debian's packages, installing none.

Example: python collect_text.py FOLDER

Needs apt-get and dpkg-deb, on Debian 12 or a relative. Each package's licence lies in its copyright file. A file of the
packages becomes a record, {"text": …}, of FOLDER/NAME.jsonl; dictionaries become many.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

#: Characters of a dictionary in one record.
ENTRIES_CHARS = 1 << 15
#: Where an entry of a dictionary begins: in the first column.
ENTRY = re.compile(r"\n(?=\S)")

LINUX_CODE = ("kernel", "mm", "fs", "net", "lib")
LINUX = "usr/src/linux-source-6.1.tar.xz"
#: Name → package, patterns of the paths in it (of the archive's, for Linux).
PARTS = {
    "linux-documentation": ("linux-source-6.1", ["*/Documentation/*.rst", "*/Documentation/*.txt"]),
    "linux-code": ("linux-source-6.1", [f"linux-source-6.1/{part}/*.[ch]" for part in LINUX_CODE]),
    "python-documentation": ("python3.11-doc", ["*.rst.txt"]),
    "perl-documentation": ("perl-doc", ["*.pod"]),
    "manual-pages": ("manpages", ["*.[1-9].gz"]),
    "programmers-manual-pages": ("manpages-dev", ["*.[1-9].gz"]),
    "git-documentation": ("git-doc", ["*.txt"]),
    "dictionary-gcide": ("dict-gcide", ["*.dict.dz"]),
    "dictionary-wordnet": ("dict-wn", ["*.dict.dz"]),
    "dictionary-of-computing": ("dict-foldoc", ["*.dict.dz"]),
}


def main() -> None:
    """Write every part, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = unpack(sorted({package for package, _ in PARTS.values()}), Path(scratch))
        for name, (package, patterns) in PARTS.items():
            num_chars = 0
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for content in contents(unpacked[package], patterns):
                    for text in records(content, is_dictionary=name.startswith("dictionary")):
                        num_chars += len(text)
                        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            sys.stdout.write(f"{name}: {num_chars / 1e6:.1f} million characters\n")
            sys.stdout.flush()


def unpack(packages: list[str], scratch: Path) -> dict[str, Path]:
    """Download packages and unpack them beside each other; return package → folder."""
    # Packages are fetched as this user, who owns the folder.
    subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=scratch, check=True)
    found = {package: scratch / package for package in packages}
    for file in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", file, found[file.name.partition("_")[0]]], check=True)
    return found


def contents(package: Path, patterns: list[str]) -> Iterator[bytes]:
    """Yield the contents of a package's files whose paths match, decompressed, always in the same order."""
    if (package / LINUX).exists():
        with tarfile.open(package / LINUX) as archive:
            for member in archive:
                if member.isfile() and any(fnmatch(member.name, pattern) for pattern in patterns):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    yield opened.read()
        return
    for path in sorted(package.rglob("*")):
        if path.is_file() and not path.is_symlink() and any(fnmatch(str(path), pattern) for pattern in patterns):
            yield gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()


def records(content: bytes, *, is_dictionary: bool) -> Iterator[str]:
    """Yield the text of a file, a dictionary's in pieces that end with an entry; what is no UTF-8 is left out."""
    text = content.decode("utf-8", errors="ignore")
    start = 0
    while is_dictionary and len(text) - start > ENTRIES_CHARS:
        end = ENTRY.search(text, start + ENTRIES_CHARS)
        if end is None:
            break
        yield text[start : end.start()]
        start = end.end()
    if text[start:].strip():
        yield text[start:]


if __name__ == "__main__":
    main()
