"""Steps in an object store: a real S3 server on loopback."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import zarr
from moto.server import ThreadedMotoServer
from obstore.store import from_url
from zarr.storage import ObjectStore

from mfdist.checkpoint.background import BackgroundSaver
from mfdist.checkpoint.directory import CheckpointDirectory
from mfdist.checkpoint.lease import Lease
from mfdist.checkpoint.manifest import MANIFEST
from mfdist.checkpoint.object_store import ObjectSeries
from mfdist.checkpoint.retention import Retention
from mfdist.checkpoint.state import CheckpointState
from mfdist.checkpoint.step_info import StepInfo
from mfdist.config import parse_config
from mfdist.errors import CheckpointError, ConfigError, UnavailableError
from mfdist.training.loop import train
from mfdist.training.run import RunDirectory
from tests.checkpoint.divided import assert_holds, regions, save_in_threads, state_of_rank, whole_arrays

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # moto's and boto's

State = Callable[..., CheckpointState]
Contents = Callable[[CheckpointState], dict[str, object]]
BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


@pytest.fixture
def url(s3: object, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/runs/{abs(hash(request.node.name))}"


def keys(s3, url: str) -> set[str]:
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])}


def test_steps_are_saved_listed_loaded_verified_and_pruned(
    s3, url: str, small_state: State, contents: Contents
) -> None:
    directory = CheckpointDirectory(url)
    assert directory.steps() == []
    for step in (1, 2, 3):
        info = directory.save(small_state(step, seed=step))
    assert info.path == f"{url}/step-000000003"
    assert directory.steps()[-1] == info
    assert contents(directory.load(2)) == contents(small_state(2, seed=2))
    assert contents(CheckpointDirectory(url).load()) == contents(small_state(3, seed=3))
    assert directory.verify() == []
    assert directory.prune(1) == [1, 2]
    assert {key.split("/")[0] for key in keys(s3, url)} == {"step-000000003"}  # the lock is gone as well


def test_plain_zarr_opens_a_step(s3, url: str, small_state: State) -> None:
    state = small_state(1)
    CheckpointDirectory(url).save(state)
    root = zarr.open_group(ObjectStore(from_url(f"{url}/step-000000001"), read_only=True), mode="r")
    assert (root["tables/blocks.1.qkv/weight"][...] == state.tables["blocks.1.qkv"].weight.numpy()).all()


def test_what_did_not_change_is_copied_by_the_store(s3, url: str, small_state: State) -> None:
    directory = CheckpointDirectory(url)
    first = directory.save(small_state(1))
    second = directory.save(small_state(2))
    assert first.written_bytes == first.num_bytes
    assert second.written_bytes < second.num_bytes / 2
    directory.prune(1)
    assert directory.verify() == []  # whole by itself


def test_a_step_saved_again_supersedes_the_earlier(s3, url: str, small_state: State, contents: Contents) -> None:
    directory = CheckpointDirectory(url)
    directory.save(small_state(7, seed=1))
    info = directory.save(small_state(7, seed=2))
    assert info.path.endswith("step-000000007-2")
    assert contents(directory.load(7)) == contents(small_state(7, seed=2))
    assert not any(key.startswith("step-000000007/") for key in keys(s3, url))


def test_a_step_without_its_manifest_is_not_seen_and_cleaned(s3, url: str, small_state: State) -> None:
    # What a killed writer leaves: everything but the last object.
    directory = CheckpointDirectory(url)
    directory.save(small_state(1))
    directory.save(small_state(2))
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/step-000000002/{MANIFEST}")
    assert [info.step for info in directory.steps()] == [1]
    assert directory.load().step == 1
    directory.save(small_state(3))
    assert not any(key.startswith("step-000000002") for key in keys(s3, url))


def test_damage_is_found_and_named(s3, url: str, small_state: State) -> None:
    directory = CheckpointDirectory(url)
    directory.save(small_state(1))
    key = url.removeprefix(f"s3://{BUCKET}/") + "/step-000000001/tables/blocks.0.qkv/weight/c.0.0"
    body = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[17] ^= 1
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    [damage] = directory.verify()
    assert "table 'blocks.0.qkv' weight rows 0 to 63" in str(damage)
    with pytest.raises(CheckpointError, match=r"c\.0\.0 has crc32c"):
        directory.load()
    s3.delete_object(Bucket=BUCKET, Key=key)
    assert [damage.problem for damage in directory.verify()] == ["is missing"]


def test_ranks_save_and_load_shards(s3, url: str) -> None:
    tables = whole_arrays()
    saved = save_in_threads(url, [state_of_rank(tables, mine) for mine in regions("row", 2, tables)])
    assert all(isinstance(info, StepInfo) for info in saved), saved
    assert not any(".pieces" in key for key in keys(s3, url))
    mine = regions("column", 3, tables)[1]
    assert_holds(CheckpointDirectory(url).load(shards=mine), tables, mine)


def test_saves_go_on_in_the_background(s3, url: str, small_state: State) -> None:
    directory = CheckpointDirectory(url)
    with BackgroundSaver(directory, retention=Retention(keep_last=2)) as saver:
        for step in range(1, 5):
            saver.save(small_state(step))
        saver.wait()
    assert [info.step for info in directory.steps()] == [3, 4]


def test_a_second_writer_is_refused_and_a_dead_ones_lock_runs_out(s3, url: str, small_state: State) -> None:
    first, second = (CheckpointDirectory(url) for _ in range(2))
    for directory in (first, second):
        directory.series = ObjectSeries(url, lease_s=5.0)
    with first.writer_lock():
        with pytest.raises(UnavailableError, match=rf"pid {os.getpid()} on .* is writing to it"):
            second.save(small_state(1))
        first.save(small_state(2))
    second.save(small_state(3))
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/.writer.lock", Body=b"pid 7 on a host that died\n")
    second.series = ObjectSeries(url, lease_s=3.0)
    start = time.monotonic()
    second.save(small_state(4))
    assert time.monotonic() - start > 3.0  # not before it was watched for as long as a lease lasts


def test_a_writer_that_lost_its_lock_commits_nothing(s3, url: str, small_state: State) -> None:
    directory = CheckpointDirectory(url)
    directory.series = series = ObjectSeries(url, lease_s=5.0)
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    with directory.writer_lock():
        directory.save(small_state(1))
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/.writer.lock", Body=b"pid 7 on another host\n")
        assert series._lease is not None
        while series._lease.is_held():  # until a renewal finds it, or the lease has run out
            time.sleep(0.05)
        with pytest.raises(CheckpointError, match=r"has taken .* over"):
            directory.save(small_state(2))
    assert [info.step for info in directory.steps()] == [1]
    assert ".writer.lock" in keys(s3, url)  # it is the other's


def test_a_store_that_does_not_answer_is_said(s3, small_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="an object store must answer"):
        CheckpointDirectory("s3://no-such-bucket/runs").save(small_state(1))
    with pytest.raises(ConfigError, match="must be such as s3://"):
        CheckpointDirectory("what://is/this")


def test_a_run_keeps_its_checkpoints_there_and_goes_on_from_them(s3, url: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so much text, so little time. " * 400)
    settings = [f"checkpoint.url={url}", f"data.source={tmp_path / 'text.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    tiny = Path(__file__).parents[1] / "launch" / "tiny.toml"
    config = parse_config(
        tiny.read_text(), origin="test", overrides=[*settings, "training.steps=4", "checkpoint.every=2"]
    )
    run = RunDirectory.create(tmp_path / "run", config)
    train(run)
    assert [info.path for info in run.checkpoints.steps()] == [f"{url}/step-00000000{step}" for step in (2, 4)]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(RunDirectory.open(run.path), overrides=["training.steps=5"]).step == 5
    with pytest.raises(ConfigError, match=r"checkpoint\.url"):
        run.config_with(["checkpoint.url=s3://elsewhere/run"])


class OneObject:
    """A lock object in memory, to try leases on."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.held: tuple[bytes, str] | None = None
        self._count = 0

    def create(self, content: bytes) -> str:
        with self._guard:
            if self.held is not None:
                raise FileExistsError
            return self._set(content)

    def update(self, content: bytes, version: str) -> str:
        with self._guard:
            if self.held is None:
                raise FileNotFoundError
            if self.held[1] != version:
                raise FileExistsError
            return self._set(content)

    def read(self) -> tuple[bytes, str]:
        if self.held is None:
            raise FileNotFoundError
        return self.held

    def delete(self) -> None:
        self.held = None

    def _set(self, content: bytes) -> str:
        self._count += 1
        self.held = (content, str(self._count))
        return str(self._count)


def test_of_many_that_take_over_a_dead_lease_one_gets_it() -> None:
    lock = OneObject()
    lock.create(b"dead\n")
    leases, refused = [], []

    def take(number: int) -> None:
        try:
            leases.append(Lease(lock, "x", f"writer {number}", 0.4))
        except UnavailableError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(leases), len(refused)) == (1, 4)
    assert leases[0].is_held()
    leases[0].release()
    assert lock.held is None
