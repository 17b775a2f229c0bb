"""What a client refuses to do by itself: talk in the clear across a network, or show what others may read."""

import asyncio
from pathlib import Path

import grpc
import pytest
from pydantic import ValidationError

from mfdist.errors import ConfigError
from mfdist.table_server.channel import ChannelConfig, client_channel
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.sections import SecurityConfig
from tests.table_server.served import Config, serving


def connect(address: str, config: ChannelConfig) -> None:
    async def make() -> None:
        await client_channel(address, config).close()

    asyncio.run(make())


@pytest.fixture
def token_file(tmp_path: Path, tokens: dict[str, str]) -> Path:
    path = tmp_path / "trainer.token"
    path.touch(0o600)
    path.write_text(f"{tokens['trainer']}\n", "ascii")
    return path


def test_a_token_goes_with_every_kind_of_call_over_plain_loopback(tmp_path: Path, token_file: Path) -> None:
    async def talk(address: str) -> None:
        async with client_channel(address, ChannelConfig(token_file=token_file)) as channel:
            stub = TableServiceStub(channel)  # type: ignore[no-untyped-call]
            assert (await stub.Describe(pb.DescribeRequest(), timeout=10)).server_id == "echo"
            assert [rows.version async for rows in stub.Gather(pb.GatherRequest(), timeout=10)] == [0, 1, 2]
            replies = stub.Lookup(iter([pb.LookupRequest()] * 2), timeout=10)
            assert len([reply async for reply in replies]) == 2
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Write(iter([pb.WriteRequest()]), timeout=10)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    with serving(Config(security=SecurityConfig(token_file=tmp_path / "tokens.toml"))) as served:
        asyncio.run(talk(served.address))


def test_another_address_than_loopback_needs_tls(token_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"reached by TLS unless it is on loopback; got 10\.0\.0\.7:7400 without ca"):
        connect("10.0.0.7:7400", ChannelConfig())
    with pytest.raises(ConfigError, match=r"a token must not travel in the clear; got 10\.0\.0\.7:7400"):
        connect("10.0.0.7:7400", ChannelConfig(insecure=True, token_file=token_file))
    connect("10.0.0.7:7400", ChannelConfig(insecure=True))


@pytest.mark.parametrize("content", ["", "\n", "two words", "two\nlines", "naïve"])
def test_a_token_file_holds_one_token(token_file: Path, content: str) -> None:
    token_file.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="one token and nothing else") as caught:
        connect("127.0.0.1:1", ChannelConfig(token_file=token_file))
    assert not content.strip() or content not in str(caught.value)


def test_a_token_that_others_may_read_is_not_used(token_file: Path) -> None:
    token_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        connect("127.0.0.1:1", ChannelConfig(token_file=token_file))


def test_a_certificate_needs_its_key_and_an_authority() -> None:
    for given in ({"certificate": "a.pem", "ca": "ca.pem"}, {"certificate": "a.pem", "private_key": "a.key"}):
        with pytest.raises(ValidationError):
            ChannelConfig.model_validate(given)
