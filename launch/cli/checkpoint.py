"""`mfdist checkpoint`: list and verify the committed steps of a run."""

import typer

app = typer.Typer(help="List and verify the checkpoints of a run.", no_args_is_help=False)
