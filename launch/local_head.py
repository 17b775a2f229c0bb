"""The process that is a Ray cluster of one machine: Ray's own head, and the end of its folder with it.

Started by `mfdist.launch.local_cluster.LocalHead` as `python -m mfdist.launch.local_head TEMP_DIR CPUS`, with a pipe
from the launcher as its stdin. SIGTERM ends it and all it started; if it is killed instead, the kernel ends them. It
ends too where the launcher dies before it has said that a supervisor has taken over.
"""

import os
import shutil
import signal
import sys
import threading
from types import FrameType

#: What the launcher says once a supervisor has taken over.
TAKEN_OVER = b"taken over\n"


def main() -> None:
    """Run until SIGTERM, or until the launcher dies too early."""
    temp_dir, cpus = sys.argv[1:3]
    signal.signal(signal.SIGTERM, _end)  # until Ray sets its own, which ends what it started too
    try:
        _begin_to_watch()
        from ray.scripts.scripts import main as ray

        # 127.0.0.1 would be replaced by this machine's own address.
        sys.argv = [
            *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.2", "--port=0", f"--num-cpus={cpus}"),
            *(f"--temp-dir={temp_dir}", "--include-dashboard=false", "--disable-usage-stats"),
            f"--object-store-memory={2**27}",  # no tensors pass through it
        ]
        ray()
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _begin_to_watch() -> None:
    """Watch the launcher in a thread; Ray, and what it starts, get an empty stdin."""
    launcher = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    threading.Thread(target=_watch, args=(launcher,), name="mfdist-launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    said = os.read(launcher, len(TAKEN_OVER))
    os.close(launcher)
    if not said:  # it is gone
        os.kill(os.getpid(), signal.SIGTERM)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(1)


if __name__ == "__main__":
    main()
