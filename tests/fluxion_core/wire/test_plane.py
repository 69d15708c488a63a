"""A data connection's first bytes: those of the specification, and nothing else passes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import FrameFormatError
from fluxion_core.wire import plane
from fluxion_core.wire.plane import Hello

CALL_ID, SECRET = bytes(range(16)), bytes(range(32, 64))
# By hand: sockets (2), connection 3 of 4.
SAID = bytes.fromhex("46555844 0100 0200 0300 0400 00000000") + CALL_ID
PROOF = "1ebec8075de42868a2847cf7de7ce13610a413231ad2a63f1b6ca5fbd4ac3246"
VECTOR = SAID + bytes.fromhex(PROOF)


def test_the_bytes_are_those_of_the_specification():
    hello = Hello(Carrier.SOCKETS, 3, 4, CALL_ID)
    assert plane.pack_hello(hello, SECRET) == VECTOR
    assert plane.parse_hello(VECTOR) == hello
    assert plane.READY.hex(" ", 2) == "4655 5852 0100 0000"
    plane.check_ready(plane.READY)


def test_a_proof_is_of_one_secret_and_of_every_byte_that_is_said():
    assert plane.is_proven(VECTOR, SECRET)
    assert not plane.is_proven(VECTOR, bytes(32))
    for position in range(len(VECTOR)):
        changed = bytearray(VECTOR)
        changed[position] ^= 1
        assert not plane.is_proven(bytes(changed), SECRET)


@given(
    way=st.sampled_from([Carrier.SOCKETS, Carrier.SHARED_MEMORY]),
    of=st.integers(1, 16),
    data=st.data(),
    call_id=st.binary(min_size=16, max_size=16),
    secret=st.binary(min_size=32, max_size=32),
)
def test_a_hello_survives_the_wire(way: Carrier, of: int, data, call_id: bytes, secret: bytes):
    hello = Hello(way, data.draw(st.integers(0, of - 1)), of, call_id)
    message = plane.pack_hello(hello, secret)
    assert plane.parse_hello(message) == hello
    assert plane.is_proven(message, secret)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, "47", "begins with 47555844"),
        (4, "0200", "version 2"),
        (6, "0000", "way 0"),
        (6, "0100", "way 1"),
        (6, "0400", "way 4"),
        (8, "0400", "connection 4 of 4"),
        (10, "0000", "connection 3 of 0"),
        (10, "1100", "connection 3 of 17"),
        (12, "01000000", "reserved"),
    ],
)
def test_hellos_that_must_fail(offset: int, value: str, words: str):
    damaged = bytearray(VECTOR)
    damaged[offset : offset + len(value) // 2] = bytes.fromhex(value)
    with pytest.raises(FrameFormatError, match=words):
        plane.parse_hello(bytes(damaged))


@given(st.binary(max_size=80))
def test_noise_is_refused(noise: bytes):
    with pytest.raises(FrameFormatError):
        plane.parse_hello(noise)
    with pytest.raises(FrameFormatError):
        plane.check_ready(noise)


def test_a_machines_id_is_every_processs_and_shows_nothing_of_it():
    found = plane.machine_id()
    assert len(bytes.fromhex(found)) == 32
    program = "from fluxion_core.wire.plane import machine_id; print(machine_id())"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert other.stdout.strip() == found


def test_another_user_is_another_machine(monkeypatch: pytest.MonkeyPatch):
    own = plane.machine_id()
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert plane.machine_id() != own
