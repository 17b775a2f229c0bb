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
trainer._host, trainer._gpu = "127.0.0.1", None
print(trainer.meet()[0])
"""

SERVE = """
from mfdist.launch.pulse import Answer, Post, Pulse
from mfdist.launch.server import Duty, TableServer

post = Post(kind="server", index=0, incarnation=1, log="", threads=1, silence_s=30.0)
server = TableServer.__new__(TableServer)
server._host, server._pulse = "127.0.0.1", Pulse(post, "127.0.0.1", lambda timeout_s, report: Answer(order="go on"))
ended = server.serve(Duty(data="", secrets=""))
print(ended.how, ended.kind, ended.error_kind, ended.message)
"""


def run(code: str, folder: str) -> "subprocess.CompletedProcess[str]":
    """Run it with a copy of this package alone."""
    environment = {**os.environ, "PYTHONPATH": folder}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)


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
    assert run(MEET, folder).stdout == "127.0.0.1\n"
    Path(folder, "mfdist", missing).unlink()
    said = run(MEET, folder).stderr.splitlines()[-1]
    assert f"a host must have all of mfdist; 127.0.0.1 has a part in {folder}" in said
    assert missing.removesuffix(".py") in said
    assert said.endswith(remedy.format(folder=folder))


def test_a_table_server_says_so_too() -> None:
    with copy_of_code() as folder:
        Path(folder, "mfdist/table_server/pairing.py").unlink()
        said = run(SERVE, folder).stdout
    assert said.startswith("failed server unavailable a host must have all of mfdist; 127.0.0.1 has a part in ")
    assert "pairing" in said


def test_another_module_that_is_missing_is_told_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), expected_whole("127.0.0.1"):
        __import__("no_such_module")
