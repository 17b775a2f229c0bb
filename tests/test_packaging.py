"""What is built from the tree: one top-level name, real files, and the same wheel from the sdist as from the tree."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(source: Path, out: Path, *kinds: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build(ROOT, out, "--sdist")
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(ROOT, out, "--wheel")
    return next(out.glob("*.whl"))


def laid_out(wheel: Path, target: Path) -> Path:
    """Lay a wheel out as an installer does with a pure one; return where."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return laid_out(wheel, tmp_path_factory.mktemp("site"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in contents(wheel)} == {"mfdist", "mfdist-0.1.0.dist-info"}
    assert wheel.name == "mfdist-0.1.0-py3-none-any.whl"


def test_the_wheel_holds_every_module_and_data_file_as_a_real_file(wheel: Path) -> None:
    in_tree = {
        str(Path(folder, file).relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "mfdist", followlinks=True)
        for file in files
        if not file.endswith((".pyc", ".nbi", ".nbc"))  # what Python and numba cache
    }
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.startswith("mfdist/")]
    assert {entry.filename for entry in entries} == in_tree
    assert {"mfdist/kernels/__init__.py", "mfdist/launch/cli/__init__.py", "mfdist/presets/demo.toml"} <= in_tree
    assert {"mfdist/py.typed", "mfdist/table_server/proto/table_v1.proto"} <= in_tree
    assert all((entry.external_attr >> 28) == 0o10 for entry in entries)  # regular files; a symlink would be 0o12


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert all(member.isreg() or member.isdir() for member in archive.getmembers())
        archive.extractall(tmp_path / "source", filter="data")
    build(next((tmp_path / "source").iterdir()), tmp_path / "again", "--wheel")
    assert contents(next((tmp_path / "again").glob("*.whl"))) == contents(wheel)


def run_installed(installed: Path, elsewhere: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_imports_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    code = (
        "import mfdist, mfdist.kernels, mfdist.launch.cli, mfdist.layers\n"
        "from mfdist.config import preset_names\n"
        "print(mfdist.kernels.__file__, mfdist.__version__, *preset_names())"
    )
    file, version, *presets = run_installed(installed, tmp_path, code).split()
    assert Path(file) == installed / "mfdist" / "kernels" / "__init__.py"
    assert (version, presets) == ("0.1.0", ["demo", "tiny", "small", "base"])


def test_the_installed_package_leaves_the_bare_names_to_others(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u\nprint([n for n in ('kernels', 'launch', 'table_server') if u.find_spec(n)])"
    assert run_installed(installed, tmp_path, code).strip() == "[]"


def test_the_console_command_is_there(wheel: Path) -> None:
    files = contents(wheel)
    assert b"mfdist = mfdist.launch.cli:main" in files["mfdist-0.1.0.dist-info/entry_points.txt"]
    metadata = files["mfdist-0.1.0.dist-info/METADATA"].decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "torch>=2.11\n" in metadata  # no upper bound: an installed torch is kept


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for group in project["optional-dependencies"].values() for line in group),
    ]
    named = {re.split(r"[\[><=; ]", line)[0] for line in wanted} - {"mfdist"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert named <= pinned.keys()
    # No local labels, such as +cpu; OpenTelemetry publishes some of its packages as betas alone.
    assert [line for line in pinned.items() if not re.fullmatch(r"[\d.]+((post|b)\d+)?", line[1])] == []
