"""The generated code is what the .proto file says."""

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parents[2] / "table_server" / "proto"


def test_generated_code_is_that_of_the_protocol(tmp_path: Path) -> None:
    """`make proto` was run after the last change of the protocol; versions in comments and guards may differ."""
    folder = tmp_path / "mfdist" / "table_server" / "proto"
    folder.mkdir(parents=True)
    (folder / "table_v1.proto").write_bytes((PROTO / "table_v1.proto").read_bytes())
    command = [
        "-m",
        "grpc_tools.protoc",
        "-I.",
        "--pyi_out=.",
        "--python_out=.",
        "mfdist/table_server/proto/table_v1.proto",
    ]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, timeout=60)
    descriptor = "DESCRIPTOR = _descriptor_pool"
    for name in ("table_v1_pb2.pyi", "table_v1_pb2.py"):
        made, kept = ((where / name).read_text("utf-8") for where in (folder, PROTO))
        if name.endswith(".py"):
            made, kept = (
                text[text.index(descriptor) : text.index("\n", text.index(descriptor))] for text in (made, kept)
            )
        assert made == kept, "run `make proto` and commit what it makes"
