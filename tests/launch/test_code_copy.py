"""This package as it is sent to other hosts, and a host that has a part of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mfdist.launch.code_copy import copy_of_code, expected_whole

MEET = """
from mfdist.launch.trainer import Trainer

trainer = Trainer.__new__(Trainer)
trainer._host = "127.0.0.1"
print(trainer.meet()[0])
"""


def meet(folder: str) -> "subprocess.CompletedProcess[str]":
    """Let a trainer load what it needs from a copy of this package alone."""
    environment = {**os.environ, "PYTHONPATH": folder}
    return subprocess.run([sys.executable, "-c", MEET], env=environment, cwd="/", capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("_ray_pkg_1a2b", "layers.py", "end its node, remove {folder} there, and start it again"),
        ("site", "quantities.py", "install it there again"),
    ],
)
def test_a_host_with_a_part_of_the_package_says_so_and_what_to_do(
    tmp_path: Path, name: str, missing: str, remedy: str
) -> None:
    folder = str(tmp_path / name)
    with copy_of_code() as copied:
        shutil.copytree(copied, folder)
    assert meet(folder).stdout == "127.0.0.1\n"
    Path(folder, "mfdist", missing).unlink()
    said = meet(folder).stderr.splitlines()[-1]
    assert f"a host must have all of mfdist; 127.0.0.1 has a part in {folder}" in said
    assert missing.removesuffix(".py") in said
    assert said.endswith(remedy.format(folder=folder))


def test_another_module_that_is_missing_is_told_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), expected_whole("127.0.0.1"):
        __import__("no_such_module")
