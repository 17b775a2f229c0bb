"""Commands that need the packages of an extra say which one, where it is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

#: mfdist where none of these packages is installed.
_WITHOUT = """
import sys
for package in ("grpc", "grpc_health", "grpc_reflection", "google.protobuf", "prometheus_client", "cryptography"):
    sys.modules[package] = None
from mfdist.launch.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["serve", "--data", "state"], "grpc"),
        (["serve", "--init-tls", "tls"], "cryptography"),
        (["top", "127.0.0.1:1"], "grpc"),
        (["bench", "server"], "grpc"),
    ],
    ids=" ".join,
)
def test_table_servers_name_their_extra(arguments: list[str], package: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    said = f"mfdist: table servers need the package {package}, which is not installed; pip install 'mfdist[server]'"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
