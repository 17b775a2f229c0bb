"""What exactly is running: the version, where it comes from, what it was built with, which formats it speaks."""

import platform
import subprocess
from pathlib import Path

import mfdist
from mfdist.launch import machine

_ROOT = Path(mfdist.__file__).absolute().parents[1]
_DEADLINE_S = 5.0


def build_facts() -> list[str]:
    """Return lines that say what is running; the first is `mfdist` and the version alone, for programs."""
    versions = machine.versions()
    libraries = [f"{name} {versions[name] or 'missing'}" for name in ("torch", "triton", "numba", "ray", "grpcio")]
    return [
        f"mfdist {mfdist.__version__}",
        f"from {_origin()}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}; {', '.join(libraries)}",
    ]


def _origin() -> str:
    if not (_ROOT / ".git").exists():
        return str(_ROOT / "mfdist")
    commit = _git("describe", "--always", "--abbrev=10", "--dirty=, changed", "--exclude=*")
    return f"a checkout in {_ROOT}" + (f", commit {commit}" if commit else "")


def _git(*arguments: str) -> str:
    """Return what git says, or nothing where it is missing or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
