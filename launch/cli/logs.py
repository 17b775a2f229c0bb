"""`mfdist logs`: what an actor of a launched job has said."""

import difflib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mfdist.errors import ConfigError
from mfdist.launch.cli import failures

_LOOK_S = 0.2
_BLOCK = 1 << 16


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a launched run.")],
    actor: Annotated[str, typer.Argument(metavar="ACTOR", help="Such as trainer-0, server-1 or supervisor.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it says more, until Ctrl-C.")] = False,
) -> int:
    """Print the log of one actor, over all its starts.

    Example: mfdist logs runs/demo trainer-0 --follow
    """
    from mfdist.launch.start import find_job

    files = find_job(run).files
    path = files.log(actor)
    if not path.is_file() or path.parent != files.logs:
        known = sorted(found.stem for found in files.logs.glob("*.log"))
        close = difflib.get_close_matches(actor, known, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ConfigError(f'ACTOR must be one of {", ".join(known) or "none yet"}; got "{actor}"{hint}')
    with path.open("r", encoding="utf-8", errors="replace") as file:
        try:
            while True:
                while block := file.read(_BLOCK):
                    sys.stdout.write(block)
                sys.stdout.flush()
                if not follow:
                    return failures.DONE
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            return failures.DONE
