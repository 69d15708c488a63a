"""Channels over real connections."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fluxion_core.config.settings import ClientSettings
from fluxion_core.wire.channel import open_channel
from tests.faults.relay import relay_to


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_no_proxy_stands_between_nodes(monkeypatch, variable: str):
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    # Nobody listens there.
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}", ClientSettings()) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)


async def test_a_connection_may_take_connect_seconds_to_be_made():
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def check(channel: grpc.aio.Channel) -> int:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest())).status

    async with (
        relay_to(f"127.0.0.1:{port}") as relay,
        open_channel(relay.address, ClientSettings(connect_seconds=0.2)) as impatient,
        open_channel(relay.address, ClientSettings(connect_seconds=60)) as patient,
    ):
        relay.may_pass.clear()
        checking = asyncio.ensure_future(check(patient))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await check(impatient)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        relay.may_pass.set()
        assert await checking == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)
