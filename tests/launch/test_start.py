"""What a launch finds out about its cluster before anything is started."""

import pytest

from mfdist.config import load_config
from mfdist.launch.cluster import Host
from mfdist.launch.start import Fit, trainer_hosts


def cluster(cpus: tuple[float, ...], gpus: tuple[float, ...]) -> list[Host]:
    pairs = enumerate(zip(cpus, gpus, strict=True))
    return [Host(node_id=str(n), address=f"10.0.0.{n}", cpus=c, gpus=g, memory_bytes=1 << 30) for n, (c, g) in pairs]


@pytest.mark.parametrize(
    ("trainers", "gpus", "on"),
    [
        (8, (4, 4), 2),
        (4, (4, 4), 1),  # packed on one, though two are there
        (8, (4, 4, 4, 4), 2),
        (6, (4, 4), 1),  # four and two: no hosts of equally many
        (4, (3, 1), 1),
        (2, (1, 1, 0), 2),
        (3, (1, 1, 1), 3),
        (1, (8,), 1),
    ],
)
def test_a_plan_has_the_hosts_that_trainers_fill(trainers: int, gpus: tuple[int, ...], on: int) -> None:
    config = load_config("tiny", [f"launch.trainers={trainers}"])
    on_gpus = Fit(cpus=1.0, gpus=1.0, threads=1)
    assert trainer_hosts(config, cluster((64.0,) * len(gpus), tuple(map(float, gpus))), on_gpus) == on
    on_cpus = Fit(cpus=0.5, gpus=0.0, threads=1)
    assert trainer_hosts(config, cluster(tuple(each / 2 for each in gpus), (8.0,) * len(gpus)), on_cpus) == on


def test_a_run_may_say_on_how_many_hosts_it_is_to_be_planned() -> None:
    config = load_config("tiny", ["launch.trainers=4", "sharding.hosts=2"])
    assert trainer_hosts(config, cluster((8.0,), (4.0,)), Fit(cpus=1.0, gpus=1.0, threads=1)) == 2
