"""Compiles the kernels of a run on CPUs beside Ray's start: once, and not in every trainer's first step.

What is compiled stays in numba's cache, so this is work for the first launch of an installation alone.
"""

import atexit
import contextlib
import subprocess
import sys
from pathlib import Path

from mfdist import kernels
from mfdist.config import RunConfig, parse_config

_MOST_TOKENS = 4096  # enough for every way that kernels go
_MOST_WIDTH = 512  # which types kernels are compiled for does not depend on sizes


def is_cold() -> bool:
    """Return whether nothing has been compiled yet, where kernels keep it beside their sources."""
    return not any(Path(kernels.__file__).parent.glob("*/__pycache__/*.nbc"))


def begin(config: RunConfig) -> None:
    """Begin to compile what a run needs, in a process that ends by itself, and with this one."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin as stdin:
        stdin.write(config.to_toml())


def main() -> None:
    """Go forward and backward once through one layer of the configuration on stdin."""
    import torch

    from mfdist.models import build_model

    config = parse_config(sys.stdin.read(), origin="stdin")
    shape = config.model
    changes: dict[str, object] = {"num_layers": 1, "vocab_size": 256}
    if shape.hidden_dim > _MOST_WIDTH:
        changes |= {"hidden_dim": shape.bits * max(1, _MOST_WIDTH // shape.bits), "num_heads": 1}
    torch.set_num_threads(1)
    model = build_model(shape.model_copy(update=changes))
    length = min(config.training.seq_len, _MOST_TOKENS)
    tokens = torch.zeros(max(1, _MOST_TOKENS // length), length, dtype=torch.long)
    model(tokens).float().square().mean().backward()


if __name__ == "__main__":
    main()
