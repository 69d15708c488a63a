"""Raw HTTP/2 from h2load at the gRPC port: answered or refused, and the node goes on.

h2load speaks no gRPC: frames come from files, and only HTTP statuses are looked at.
"""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path

import grpc
import pytest

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.tools import require_program

CONNECTIONS, STREAMS_EACH = 10, 16
SERVICE = "/fluxion.v1.Generation"


@pytest.fixture(autouse=True)
def _h2load() -> None:
    require_program("h2load", package="nghttp2-client")


def frame(message: bytes, length: int | None = None) -> bytes:
    """A gRPC message as it lies in HTTP/2's data, its length perhaps a lie."""
    return b"\0" + struct.pack(">I", len(message) if length is None else length) + message


async def succeeded(address: str, method: str, body: Path, requests: int, *flags: str) -> int:
    """Requests of a load that got an HTTP answer."""
    process = await asyncio.create_subprocess_exec(
        *("h2load", "-n", str(requests), "-c", str(CONNECTIONS), "-m", str(STREAMS_EACH)),
        *("-H", "content-type: application/grpc", "-H", "te: trailers"),
        *("-d", str(body), *flags, f"http://{address}{method}"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    (count,) = re.findall(rb"(\d+) succeeded", output)
    return int(count)


async def assert_goes_on(address: str) -> None:
    """It makes tokens, and nothing is held but by them."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        while (load := await stub.GetLoad(generate_pb2.GetLoadRequest())).running_requests:
            pass
        held = (load.waiting_requests, load.host_kv_reserved_bytes, load.host_kv_used_bytes)
        assert held == (0, 0, 0)
        request = generate_pb2.GenerateRequest(text="hello", max_new_tokens=4, ignore_eos=True)
        tokens = [token async for answer in stub.Generate(request) for token in answer.token_ids]
        assert len(tokens) == 4


@pytest.mark.parametrize(
    ("method", "body"),
    [
        (f"{SERVICE}/GetLoad", frame(b"")),
        (f"{SERVICE}/Tokenize", frame(generate_pb2.TokenizeRequest(text="hi").SerializeToString())),
        (f"{SERVICE}/Generate", frame(b"\xff" * 300)),
        (f"{SERVICE}/Generate", frame(b"x" * 100, length=100_000)),
        (f"{SERVICE}/Generate", frame(b"", length=0xFFFF_FFFF)),
        (f"{SERVICE}/Generate", b"\x07nonsense"),
        ("/no.such.Service/Method", frame(b"")),
    ],
    ids=["calls", "texts", "no message", "cut off", "4 GiB announced", "no frame", "no method"],
)
async def test_a_load_is_answered_to_its_last_request(
    start_prefill, start_decode, tmp_path: Path, method: str, body: bytes
):
    path = tmp_path / "body"
    path.write_bytes(body)
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        assert await succeeded(node.address, method, path, 1000) == 1000
        await assert_goes_on(node.address)


async def test_more_generation_than_there_is_room_for_is_refused_and_cut_connections_free_it(
    start_prefill, start_decode, tmp_path: Path
):
    path = tmp_path / "body"
    request = generate_pb2.GenerateRequest(text="hello", max_new_tokens=1500, ignore_eos=True)
    path.write_bytes(frame(request.SerializeToString()))
    limits = {"max_running_sequences": 2, "max_waiting_requests": 8}
    async with start_prefill() as prefill, start_decode(prefill.address, **limits) as node:
        # h2load cuts its connections after half a second; what was refused has an answer by then.
        await succeeded(
            node.address, f"{SERVICE}/Generate", path, 160, "-T", "500ms", "-N", "500ms"
        )
        await assert_goes_on(node.address)
