"""What a client is told of a server that does not answer in time: real gRPC, a service of a method."""

import asyncio

import grpc
import pytest

from mfdist.errors import UnavailableError
from mfdist.table_server.owner import Membership, Owner
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.status import KIND_KEY

SERVICE = pb.DESCRIPTOR.services_by_name["TableService"].full_name


@pytest.mark.parametrize("was_said", [True, False])
def test_what_the_server_said_last_is_told_beside_that_it_does_not_answer(was_said: bool) -> None:
    calls = 0

    async def describe(request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        nonlocal calls
        calls += 1
        if was_said and calls == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "late: client 1", ((KIND_KEY, UnavailableError.kind),))
        await asyncio.sleep(60)
        return b""

    async def asked() -> None:
        server = grpc.aio.server()
        methods = {"Describe": grpc.unary_unary_rpc_method_handler(describe)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        owner = Owner(0, [address], Membership(0, 2, 1), deadline_s=3.0, failover_s=3.0, channel=None)
        try:
            await owner.once("Describe", pb.DescribeRequest())
        finally:
            await owner.close()
            await server.stop(0)

    told = r"^late: client 1 .*; asked again, it did not answer before the deadline$"
    with pytest.raises(UnavailableError, match=told if was_said else "must answer before the deadline"):
        asyncio.run(asked())
