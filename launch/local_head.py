"""The process that is a Ray cluster of one machine: Ray's own head, and the end of its folder with it.

Started by `mfdist.launch.local_cluster.LocalHead` as `python -m mfdist.launch.local_head TEMP_DIR CPUS`. SIGTERM ends
it and all it started; if it is killed instead, the kernel ends them.
"""

import shutil
import sys


def main() -> None:
    """Run until SIGTERM."""
    from ray.scripts.scripts import main as ray

    temp_dir, cpus = sys.argv[1:3]
    # 127.0.0.1 would be replaced by this machine's own address.
    sys.argv = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.2", "--port=0", f"--num-cpus={cpus}"),
        *(f"--temp-dir={temp_dir}", "--include-dashboard=false", "--disable-usage-stats"),
        f"--object-store-memory={2**27}",  # no tensors pass through it
    ]
    try:
        ray()
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
