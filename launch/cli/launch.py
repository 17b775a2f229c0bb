"""`mfdist launch`: train a run on a Ray cluster, which keeps it going when parts of it die."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mfdist.config import RunConfig, load_config, preset_names
from mfdist.errors import ConfigError
from mfdist.launch.cli import failures, wording

if TYPE_CHECKING:
    from mfdist.launch.job import Job, JobFiles
    from mfdist.launch.start import Wish

#: Ends the help of `launch`.
NOTES = (
    "Ctrl-C saves and stops the job, and the exit code is then 1; a second Ctrl-C ends it at once. With --detach the "
    "job goes on by itself: mfdist attach, status, logs, scale and stop take its RUN. If the machine of Ray's head "
    "died: --resume."
)


def launch(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A TOML file or a preset, as for train.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder to make for the run; by default runs/NAME of CONFIG.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run, from its last step.")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="A running Ray cluster that this host is part of; default: none, "
            "and a Ray of this machine alone is started.",
        ),
    ] = None,
    trainers: Annotated[int | None, typer.Option(min=1, metavar="N", help="As launch.trainers.")] = None,
    servers: Annotated[int | None, typer.Option(min=0, metavar="M", help="As launch.servers.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration, as for train."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Come back once the job runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON summary on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines, even on a terminal.")] = False,
) -> int:
    """Train on a Ray cluster: trainers, table servers, and a supervisor that replaces what dies.

    Example: mfdist launch demo --trainers 2 --servers 1

    Example: mfdist launch big.toml --out /shared/big --address auto --trainers 16 --servers 8 --detach

    Example: mfdist launch --resume /shared/big
    """
    began = time.monotonic()
    stream = sys.stderr if as_json else sys.stdout

    def tell(message: str) -> None:
        stream.write(f"[{time.monotonic() - began:4.1f} s] {message}\n")
        stream.flush()

    overrides = list(settings or ())
    overrides += [f"launch.trainers={trainers}"] if trainers is not None else []
    overrides += [f"launch.servers={servers}"] if servers is not None else []
    from mfdist.launch.cli import watching
    from mfdist.launch.cluster import check_installed
    from mfdist.launch.start import Wish

    check_installed()
    if resume is not None:
        if config is not None or out is not None:
            raise ConfigError("--resume goes on with a run in its own folder; got a configuration or --out too")
        job = _resumed(resume, Wish(address=address, overrides=tuple(overrides)), tell)
    else:
        if config is None:
            raise ConfigError(
                "launch needs a configuration or a run: mfdist launch demo, or mfdist launch --resume RUN"
            )
        job = _started(config, out or _default_folder(config), overrides, Wish(address=address), tell)
    if detach:
        run = wording.quoted(Path(job.run))
        tell(f"the job goes on by itself: mfdist attach {run}, mfdist status {run}, mfdist stop {run}")
        return failures.DONE
    return watching.watch(job, is_quiet=quiet, as_json=as_json, stops_job=True)


def _default_folder(config: str) -> Path:
    return Path("runs") / (config if config in preset_names() else Path(config).stem)


def _started(config: str, path: Path, overrides: Sequence[str], wish: "Wish", tell: Callable[[str], None]) -> "Job":
    """Launch a new run, which is made with `overrides` and has them from the first."""
    from mfdist.launch.job import JobFiles
    from mfdist.launch.start import check_wish

    chosen = load_config(config, overrides)
    check_wish(chosen, overrides, lambda more: load_config(config, more))
    files = JobFiles(path.absolute())
    _check_free(files)

    def create() -> None:
        from mfdist.training.run import RunDirectory

        RunDirectory.create(files.run, chosen)

    return _launched(files, chosen, wish, tell, create)


def _resumed(path: Path, wish: "Wish", tell: Callable[[str], None]) -> "Job":
    from mfdist.launch.holding import is_held
    from mfdist.launch.job import JobFiles
    from mfdist.launch.local_cluster import end_local, is_head_alive
    from mfdist.launch.start import check_wish

    tell("loading torch")
    from mfdist.training.resumption import check_commits
    from mfdist.training.run import RunDirectory

    run = RunDirectory.open(path.absolute())
    files = JobFiles(run.path)
    if is_held(files.folder):
        job = files.read_job()
        if not job.cluster.is_ours or is_head_alive(job.cluster):
            tell("the job is running; watching it")
            return job
    chosen = run.config_with((*wish.overrides, "servers.addresses=[]"))
    check_wish(chosen, wish.overrides, run.config_with)
    check_commits(run)
    with contextlib.suppress(ConfigError):  # a run of mfdist train was never launched
        earlier = files.read_job().cluster
        if earlier.temp_dir and Path(earlier.temp_dir).exists():
            tell("ending what is left of the earlier Ray")
        end_local(earlier)
    return _launched(files, chosen, wish, tell, lambda: None)


def _check_free(files: "JobFiles") -> None:
    """Refuse a folder of a live job, or of anything else, before a cluster is started."""
    from mfdist.launch.holding import Holding

    if files.folder.is_dir():
        Holding(files.folder).release()
    if (files.run / "metrics.jsonl").exists() or any((files.run / "checkpoints").glob("step-*")):
        run = wording.quoted(files.run)
        raise ConfigError(
            f"--out must name a new directory; {files.run} holds a run already; go on with it by "
            f"mfdist launch --resume {run}, or choose another name"
        )


def _launched(
    files: "JobFiles", config: RunConfig, wish: "Wish", tell: Callable[[str], None], create: Callable[[], None]
) -> "Job":
    from mfdist.launch import warm_kernels
    from mfdist.launch.start import check_this_machine, fit, has_gpus, starting

    if wish.address is None:
        check_this_machine(config)
        if config.model.kind == "memory" and not config.launch.servers and not has_gpus() and warm_kernels.is_cold():
            tell("compiling the kernels meanwhile, which is done once")
            warm_kernels.begin(config)
    with failures.hangup_terminates(), starting(wish, tell) as begun:
        if "torch" not in sys.modules:
            tell("loading torch")
        from mfdist.launch.cli.launch_plan import lines
        from mfdist.launch.cluster_plan import plan_job

        hosts = begun.join(tell)
        fitted = fit(config, hosts)
        plan = plan_job(config, hosts, fitted)
        for line in lines(config, hosts, fitted, plan):
            tell(line)
        begun.check(config, files.run, tell)
        create()
        return begun.supervise(files, config, fitted, plan.largest_server, tell)
