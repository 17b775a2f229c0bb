"""Trainings in the suite of several GPUs: resumed on fewer, launched by Ray, over hosts, twice; each under torchrun."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.distributed.hosts import Hosts
from tests.distributed.ray_nodes import RayNodes

ROOT = Path(__file__).resolve().parents[2]
_STEPS, _SAVED = 12, 6
_GRACE_S = 40.0
_HOSTS = 2
#: What plans for one host as for so many.
_AS_APART = ("--set", f"sharding.hosts={_HOSTS}")
#: Device → the preset, and what makes its steps few and short.
_SETTINGS = {
    "cuda": ("tiny", {"training.batch_size": 16}),
    "cpu": ("demo", {"training.batch_size": 4, "training.seq_len": 64}),
}


def resumed_on_fewer(device, world_size, folder, timeout_s, preset=None, settings=()):
    """Train on so many ranks, resume the step saved midway on half of them; return both runs' events of each step.

    Args:
        device: cpu or cuda.
        world_size: of the first run.
        folder: empty, for two runs.
        timeout_s: of each run.
        preset: what to train; by default a small one.
        settings: KEY=VALUE, over those that make it short.
    """
    name, options = _asked(device, world_size, preset, settings)
    first, second = folder / "many", folder / "fewer"
    _run(device, world_size, timeout_s, "train", name, "--out", str(first), *options)
    second.mkdir()
    for file in ("config.toml", "tokenizer.json"):
        if (first / file).exists():
            shutil.copy(first / file, second)
    step = f"checkpoints/step-{_SAVED:09d}"
    shutil.copytree(first / step, second / step)
    _run(device, max(1, world_size // 2), timeout_s, "train", "--resume", str(second))
    return [_stepped(run)[-(_STEPS - _SAVED) :] for run in (first, second)]


def launched_and_trained(device, world_size, folder, timeout_s, preset=None, settings=()):
    """Train the same by `mfdist launch` and by `mfdist train`; return both runs' events of each step, see above."""
    name, options = _asked(device, world_size, preset, settings)
    launched, trained = folder / "launched", folder / "trained"
    _command(
        timeout_s,
        [
            sys.executable,
            "-m",
            "mfdist",
            "launch",
            name,
            "--out",
            str(launched),
            *options,
            *_wanted(device, world_size),
        ],
    )
    _run(device, world_size, timeout_s, "train", name, "--out", str(trained), *options)
    return [_stepped(run) for run in (launched, trained)]


def trained_over_hosts(device, world_size, folder, timeout_s, preset=None, settings=()):
    """Train the same grid on two hosts, which are network namespaces, and on one; return both runs' events, see above.

    Each host has half of the ranks and of the GPUs. Between hosts GPUs go by NCCL's sockets and CPUs by gloo.
    """
    name, options = _asked(device, world_size, preset, ("sharding.kind=grid", *settings))
    apart, together = folder / "apart", folder / "together"
    with Hosts(_HOSTS) as hosts, ThreadPoolExecutor(_HOSTS) as pool:
        launcher = ["torch.distributed.run", f"--nnodes={_HOSTS}", f"--nproc-per-node={world_size // _HOSTS}"]
        launcher += [f"--master-addr={hosts[0].address}", "--master-port=29500"]
        running = []
        for host in hosts:
            command = [sys.executable, "-m", *launcher, f"--node-rank={host.index}", f"--local-addr={host.address}"]
            command += ["-m", "mfdist", "train", name, "--out", str(apart), *options, "--device", device]
            variables = {**_threads(device), **_gpus_of(host.index, world_size)}
            running.append(pool.submit(_command, timeout_s, host.command(command), variables))
        for each in running:
            each.result()
    _run(device, world_size, timeout_s, "train", name, "--out", str(together), *options, *_AS_APART)
    return [_stepped(run) for run in (apart, together)]


def launched_over_hosts(device, world_size, folder, timeout_s, preset=None, settings=()):
    """Train the same by `mfdist launch` on a Ray cluster of two such hosts, and on one; return both runs' events."""
    name, options = _asked(device, world_size, preset, ("sharding.kind=grid", *settings))
    launched, together = folder / "launched", folder / "together"
    is_gpu = device == "cuda"
    cpus, of_host = _cpus(device, world_size), {each: _gpus_of(each, world_size) for each in range(_HOSTS)}
    resources = {
        "cpus": max(1, round(cpus * world_size / _HOSTS)),
        "gpus": is_gpu * world_size // _HOSTS,
        "of_host": of_host,
    }
    with Hosts(_HOSTS) as hosts, RayNodes(hosts, **resources, environment={"PYTHONPATH": _path()}) as nodes:
        command = [sys.executable, "-m", "mfdist", "launch", name, "--out", str(launched), *options]
        command += [*_wanted(device, world_size), "--address", nodes.address]
        _command(timeout_s, hosts[0].command(command), nodes.environment)
    _run(device, world_size, timeout_s, "train", name, "--out", str(together), *options, *_AS_APART)
    return [_stepped(run) for run in (launched, together)]


def repeated(device, world_size, folder, timeout_s, preset=None, settings=()):
    """Train the same twice; return how many files the last checkpoint has, and the names of those that differ.

    Its manifest, which has the time, is left out.
    """
    name, options = _asked(device, world_size, preset, settings)
    files = []
    for run in (folder / "once", folder / "again"):
        _run(device, world_size, timeout_s, "train", name, "--out", str(run), *options)
        step = run / f"checkpoints/step-{_STEPS:09d}"
        paths = [path.relative_to(step) for path in step.rglob("*") if path.is_file()]
        files.append({str(path): (step / path).read_bytes() for path in paths if path.parts[0] != "manifest"})
    once, again = files
    return len(once), sorted(name for name in {*once, *again} if once.get(name) != again.get(name))


def _asked(device, world_size, preset, settings):
    """Return what to train, and the options that make it short."""
    name, own = _SETTINGS[device]
    short = {
        **own,
        "training.batch_size": max(own["training.batch_size"], world_size),  # a sequence for each rank
        "data.source": f'"{ROOT / "docs"}"',  # a little text, tokenised within a second
        "training.steps": _STEPS,
        "training.precision": "fp32",
        "training.eval_every": _STEPS,
        "training.eval_sequences": world_size,
        "training.sample_prompt": '""',
        "training.twin_steps": 0,
        "optimizer.tables.rule": "rowwise_adagrad",
        "checkpoint.every": _SAVED,
        "checkpoint.keep_last": 9,
    }
    asked = [*(f"{key}={value}" for key, value in short.items()), *settings]
    return preset or name, [word for setting in asked for word in ("--set", setting)]


def _wanted(device, world_size):
    """Return the options of `mfdist launch` for so many trainers."""
    settings = (f"launch.cpus={_cpus(device, world_size)}", f"training.device={device}")
    return ["--trainers", str(world_size), *(word for setting in settings for word in ("--set", setting))]


def _cpus(device, world_size):
    """Return how many cores each trainer asks Ray for."""
    cores = os.cpu_count() or 1
    return min(8, max(1, cores // world_size)) if device == "cuda" else min(1.0, cores / world_size)


def _gpus_of(host, world_size):
    each = world_size // _HOSTS
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(host * each + place) for place in range(each))}


def _run(device, world_size, timeout_s, *arguments):
    launcher = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={world_size}"]
    started = [*launcher, "-m"] if world_size > 1 else []
    asked = [sys.executable, "-m", *started, "mfdist", *arguments, "--device", device]
    _command(timeout_s, asked, {**_threads(device), "GLOO_SOCKET_IFNAME": "lo"})


def _threads(device):
    return {"OMP_NUM_THREADS": "1" if device == "cpu" else "8"}


def _command(timeout_s, command, variables=None):
    """Run a command to its end; not a quiet one: what runs late says where it is.

    Raises:
        AssertionError: it failed or took too long; with the ends of what it said.
    """
    variables = variables or {}
    environment = {**os.environ, **variables, "PYTHONPATH": _path()}
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            out, err = _ended(process)
    if process.returncode:
        said = f"{out[-1500:]}\n{err[:2500]}\n…\n{err[-2500:]}" if len(err) > 5000 else f"{out[-1500:]}\n{err}"
        spent = f"ended with {process.returncode} after {time.monotonic() - began:.0f} s of {timeout_s:.0f}"
        raise AssertionError(f"{' '.join(command[:10])} … {spent}\n{said}")


def _ended(process):
    """End what took too long, and return what it said; on SIGTERM torchrun and `mfdist launch` end their ranks too."""
    process.terminate()
    try:
        return process.communicate(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate(timeout=_GRACE_S)


def _path():
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _stepped(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [event for event in events if event["event"] == "stepped"]
