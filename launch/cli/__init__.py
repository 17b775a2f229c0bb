"""The command `mfdist`: one file a verb. Nothing heavy is imported until a verb runs."""

import sys


def main() -> None:
    """Run the command line and exit with its code: 0 done, 1 failed, 2 misuse."""
    from mfdist.launch.cli.app import run

    sys.exit(run(sys.argv[1:]))
