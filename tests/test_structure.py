"""The shape of the tree: what may import what, what is loaded when, how long a file may be. Part of `make check`."""

import ast
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mfdist
from mfdist import errors

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "launch", "table_server")  # real folders at the top, imported through symlinks in mfdist/

# Third-party library → the only modules (or folders, with a dot at the end) that import it.
DOORS = {
    "zarr": (),  # checkpoints are written and read without its code; tests compare
    "tensorstore": (),
    "obstore": ("mfdist.checkpoint.object_store",),
    "safetensors": ("mfdist.checkpoint.safetensors_format",),
    "crc32c": ("mfdist.checkpoint.checksum",),
    "xxhash": ("mfdist.checkpoint.checksum",),
    "grpc": ("mfdist.table_server.",),
    "grpc_health": ("mfdist.table_server.server",),
    "grpc_reflection": ("mfdist.table_server.server",),
    "google": ("mfdist.table_server.",),
    "prometheus_client": ("mfdist.table_server.metrics",),
    "cryptography": ("mfdist.table_server.certificates",),
    "opentelemetry": ("mfdist.table_server.traces",),
    "numba": ("mfdist.kernels.",),
    "triton": ("mfdist.kernels.",),
    "plotly": ("mfdist.report.page",),
    "jinja2": ("mfdist.report.page",),
    "tokenizers": ("mfdist.training.data.tokenizer",),
    "pyarrow": ("mfdist.training.data.text_files",),
    "datasets": ("mfdist.training.data.hugging_face",),
    "zstandard": ("mfdist.training.data.file_text",),
    "transformers": ("mfdist.hugging_face.library",),
    "fbgemm_gpu": ("mfdist.benchmarks.fbgemm_contenders",),
    "torchrec": ("mfdist.benchmarks.torchrec_contender",),
    "tensorboard": ("mfdist.training.metrics",),
    "torch.utils.tensorboard": ("mfdist.training.metrics",),
    "torch.distributed": (
        "mfdist.benchmarks.checkpoint",
        "mfdist.benchmarks.plan_choice",
        "mfdist.benchmarks.sharding_exchange",
        "mfdist.benchmarks.sharding_ranks",
        "mfdist.benchmarks.torchrec_contender",
        "mfdist.checkpoint.dcp_format",
        "mfdist.checkpoint.dense_shard",
        "mfdist.checkpoint.ranks",
        "mfdist.launch.connection_checks",
        "mfdist.parallelize",
        "mfdist.sharding.",
        "mfdist.table_server.saving",
        "mfdist.testing.",
        "mfdist.training.spread",
        "mfdist.training.world",
    ),
    "pydantic": (
        "mfdist.config",
        "mfdist.config_errors",
        "mfdist.config_places",
        "mfdist.config_values",
        "mfdist.table_server.",
    ),
    "ray": ("mfdist.launch.cluster", "mfdist.launch.local_head", "mfdist.launch.ray_contender"),
    "tomli_w": ("mfdist.config",),
    "typer": ("mfdist.launch.cli.",),
    "rich": ("mfdist.launch.cli.",),
}
HEAVY = (
    "torch",
    "numpy",
    "zarr",
    "grpc",
    "ray",
    "google.protobuf",
    "numba",
    "triton",
    "tokenizers",
    "pyarrow",
    "datasets",
    "transformers",
    "pydantic",
    "typer",
    "rich",
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def sources() -> list[tuple[str, Path]]:
    """Return (module name, file) of every module of the package, kernels and launch included."""
    found = []
    for folder, _, files in os.walk(ROOT / "mfdist", followlinks=True):
        for file in sorted(files):
            if file.endswith(".py") and "_pb2" not in file:  # generated
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append((".".join(part for part in parts if part != "__init__"), path))
    assert len(found) > 20
    return found


def imported_modules(path: Path) -> Iterator[str]:
    """Yield every module a file imports, inside functions too; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package.rstrip('.')}.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_top_folder_is_reached_through_a_relative_symlink(folder: str) -> None:
    link = ROOT / "mfdist" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bare_import_of_a_top_folder_says_what_to_import(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"ImportError: .*mfdist\.{folder}", done.stderr)


def test_one_library_has_one_door() -> None:
    strays = [
        f"{module} imports {library}"
        for module, path in sources()
        for imported in imported_modules(path)
        for library, doors in DOORS.items()
        if within(imported, library)
        and not any(within(module, door) if door.endswith(".") else module == door for door in doors)
    ]
    assert sorted(set(strays)) == []


def test_kernels_know_nothing_of_the_library_but_its_errors() -> None:
    strays = [
        f"{module} imports {imported}"
        for module, path in sources()
        if within(module, "mfdist.kernels")
        for imported in imported_modules(path)
        if within(imported, "mfdist")
        and not within(imported, "mfdist.kernels")
        and not within(imported, "mfdist.errors")
    ]
    assert strays == []


def test_no_file_imports_a_top_folder_by_its_bare_name() -> None:
    strays = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix == ".py" and any(within(name, folder) for name in imported_modules(path) for folder in FOLDERS)
    ]
    assert strays == []


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import mfdist").isdisjoint(HEAVY)


def test_importing_the_layers_loads_only_torch() -> None:
    loaded = loaded_by("from mfdist import MemoryFormer, MemoryLayer, LocalTable")
    assert "torch" in loaded
    assert loaded.isdisjoint({"zarr", "numba", "triton", "tokenizers", "pyarrow", "datasets", "typer", "rich"})


def test_help_and_version_load_no_torch() -> None:
    loaded = loaded_by("import contextlib, io\nfrom mfdist.launch.cli.app import run\n"
                       "with contextlib.redirect_stdout(io.StringIO()):\n    run(['train', '--help'])")  # fmt: skip
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "zarr", "numba", "triton", "tokenizers", "pyarrow", "datasets"})


def test_the_public_names_are_these() -> None:
    assert set(mfdist.__all__) == {
        "DenseTransformer", "LocalTable", "MemoryFormer", "MemoryLayer", "RowAdagrad", "RowAdam", "RowSGD",
        "RunConfig", "ShardedTable", "ShardingPlan", "Table", "__version__", "load_config", "replace_linear", "shard",
        "table_parameters",
    }  # fmt: skip
    for name in mfdist.__all__:
        assert name in dir(mfdist)
        assert getattr(mfdist, name) is not None
    assert mfdist.MemoryLayer.__module__ == "mfdist.layers"
    with pytest.raises(AttributeError, match="no attribute 'MemoryLayr'"):
        _ = mfdist.MemoryLayr  # type: ignore[attr-defined]


def test_every_module_says_what_it_is() -> None:
    silent = [module for module, path in sources() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


def test_a_modules_name_says_what_it_defines() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "core", "base"}
    assert [module for module, _ in sources() if vague & set(module.split("."))] == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in tracked_files()
        if path.suffix == ".py" and "_pb2" not in path.name
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_tests_mirror_the_source() -> None:
    """A test file stands where its module stands, so that it can be found; suites across modules have own folders."""
    across = {
        "compat",
        "test_documents.py",
        "test_makefile.py",
        "test_packaging.py",
        "test_pytorch_conventions.py",
        "test_structure.py",
        "benchmarks",
        "distributed",
    }
    tops = {path.name for path in (ROOT / "mfdist").iterdir()} | across
    strays = [
        path.name
        for path in (ROOT / "tests").iterdir()
        if (path.is_dir() or path.name.startswith("test_"))
        and path.name not in tops
        and path.name.removeprefix("test_") not in tops
        and path.name != "__pycache__"
    ]
    assert strays == []


def test_no_line_names_a_machine_it_was_written_on() -> None:
    private = re.compile(r"(?<![\w.~}$/-])/(root|home|Users|work|mnt|srv)/\w")
    named = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1)
        if private.search(line)
    ]
    assert named == []


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_survives_pickling_and_refines_a_builtin(error: type[errors.MfdistError]) -> None:
    again = pickle.loads(pickle.dumps(error('row id 7 is outside table "x" (num_rows=7); ids come from bits=2')))
    assert type(again) is error
    assert str(again).startswith("row id 7")
    if error is not errors.MfdistError:
        assert any(base.__module__ == "builtins" and base is not Exception for base in error.__mro__[1:-3])


def test_every_kind_of_error_has_an_outcome_and_every_outcome_an_error() -> None:
    assert {error.kind for error in ERRORS} == set(errors.OUTCOMES)
    assert {code for code, _ in errors.OUTCOMES.values()} == {1, 2}
    kinds = [error.kind for error in ERRORS if error is not errors.MfdistError]
    assert len(kinds) == len(set(kinds))


def test_modules_can_be_imported_from_the_last_to_the_first() -> None:
    """The reverse of the usual order shows import cycles; Triton kernels are left to what has triton."""
    modules = [module for module, _ in sources() if not module.endswith("triton_impl")]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *reversed(modules)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
