"""What is shipped to deploy with: a manifest that KubeRay's schema allows, a Slurm script, a unit of systemd."""

import os
import shlex
import subprocess
import sys
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mfdist.training.run import RunDirectory
from tests.distributed.hosts import Hosts, why_not
from tests.launch import jobs

DEPLOY = Path(__file__).resolve().parents[2] / "launch" / "deploy"


def record(*required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that may have these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?$"},
}
CONTAINER = record(
    "name",
    name=TEXT,
    image=TEXT,
    env=list_of(record("name", name=TEXT, value=TEXT)),
    ports=list_of(record("containerPort", name=TEXT, containerPort=COUNT)),
    resources=record(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=list_of(record("name", "mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    "name",
    name=TEXT,
    persistentVolumeClaim=record("claimName", claimName=TEXT),
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
POD = record(
    spec=record(
        "containers",
        terminationGracePeriodSeconds=COUNT,
        containers={**list_of(CONTAINER), "minItems": 1},
        volumes=list_of(VOLUME),
    )
)
#: The part of ray.io/v1 that the manifest uses, written down by hand from ray-operator/config/crd/bases and from the
#: reference of KubeRay 1.6 (authOptions); what is required there is required here, and nothing else is allowed.
RAY_CLUSTER = record(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=record("name", name=TEXT),
    spec=record(
        "headGroupSpec",
        rayVersion=TEXT,
        authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
        headGroupSpec=record("template", "rayStartParams", rayStartParams=TEXTS, template=POD),
        workerGroupSpecs=list_of(
            record(
                *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=TEXTS,
                template=POD,
            )
        ),
    ),
)


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((DEPLOY / "raycluster.yaml").read_text("utf-8"))


def test_the_manifest_is_what_the_schema_allows(manifest: Any) -> None:
    jsonschema.validate(manifest, RAY_CLUSTER)
    groups = [manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert manifest["spec"]["rayVersion"] == metadata.version("ray")
    for pod in pods:
        (container,) = pod["containers"]
        assert container["image"] == pods[0]["containers"][0]["image"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < pod["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpecs"), {}),
        (("spec", "authOptions", "mode"), "yes"),
        (("spec", "workerGroupSpecs", 0, "replicas"), "2"),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "num-gpus"), 8),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumesMounts"), []),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "16 GB"),
    ],
)
def test_the_schema_refuses_what_a_cluster_would(manifest: Any, path: tuple[Any, ...], value: Any) -> None:
    wrong = deepcopy(manifest)
    *parents, last = path
    place = wrong
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAY_CLUSTER)


def test_the_slurm_script_is_bash_and_says_how_it_is_used() -> None:
    script = str(DEPLOY / "mfdist.sbatch")
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch mfdist.sbatch CONFIG RUN")


def test_the_unit_starts_what_exists() -> None:
    lines = (DEPLOY / "ray-node.service").read_text("utf-8").splitlines()
    (start,) = (line.partition("=")[2] for line in lines if line.startswith("ExecStart="))
    options = [word.partition("=")[0] for word in shlex.split(start) if word.startswith("--")]
    helped = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True, timeout=60
    )
    assert len(options) >= 4
    assert all(option in helped.stdout for option in options), helped.stdout


#: Stand-ins: what Slurm would run on a host runs in one of ours, by the script enter-HOST.
_SRUN = """#!/bin/bash
hosts=({hosts}) chosen=({hosts}) number=0
while [[ $1 == --* ]]; do
  case $1 in
    --nodelist=*) chosen=("${{1#*=}}") ;;
    --exclude=*) chosen=("${{hosts[@]/${{1#*=}}/}}") ;;
  esac
  shift
done
trap 'kill $(jobs -p)' TERM
for host in "${{chosen[@]}}"; do
  number=$((number + 1))
  if [[ -n $host ]]; then SLURM_NODEID=$number "{bin}/enter-$host" "$@" & fi
done
wait
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_slurm_script_trains_on_three_hosts_and_goes_on(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    config = jobs.config_file(tmp_path, steps=20, every=10)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    with Hosts(3) as hosts:
        names = " ".join(host.name for host in hosts)
        programs = {
            "srun": _SRUN.format(hosts=names, bin=stand_ins),
            "scontrol": f'#!/bin/bash\n[[ $1 == show ]] && printf "%s\\n" {names}\n',
            **{f"enter-{host.name}": f'#!/bin/bash\nexec {shlex.join(host.command([]))} "$@"\n' for host in hosts},
        }
        for name, text in programs.items():
            (stand_ins / name).write_text(text)
            (stand_ins / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "host[0-2]",
        }
        for steps in (20, 40):
            said = tmp_path / f"slurm-{steps}.out"
            with said.open("wb") as file:
                job = hosts[0].start(
                    [
                        *("bash", str(DEPLOY / "mfdist.sbatch"), str(config), str(tmp_path / "run"), "--trainers=2"),
                        *("--servers=1", "--set", "launch.cpus=1", "--set", f"training.steps={steps}"),
                    ],
                    env=environment,
                    stdout=file,
                    stderr=file,
                )
                assert job.wait(400) == 0, said.read_text("utf-8")
            assert RunDirectory.open(tmp_path / "run").checkpoints.steps()[-1].step == steps
            for host in hosts:
                host.kill()  # as Slurm does at a job's end
