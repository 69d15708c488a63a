"""Known bytes over PCIe beside what the card says of them, on a GPU machine.

python -m fluxion_core.lab.benchmark.nvml_agreement --seconds 4 --json agreement.json

Host memory is read in place, copied to the device and copied back, for some seconds each. The card
is looked at as a node does (services/gpu_metrics.py). What it says should be the payload and the
packets' headers: see `wire_factor`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Protocol

import torch

from fluxion_core.config.command_options import JsonOption
from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.lab.benchmark.read_rates import launch_read
from fluxion_core.lab.machine import describe_machine
from fluxion_core.observe.device_usage import PcieDirection
from fluxion_core.observe.nvml import NvmlReadings, open_nvml

PACKET_OVERHEAD_BYTES = 20
"""Of a packet with data: 12 of header, 4 of framing and sequence number, 4 of checksum."""

_LOOK_SECONDS = 1.0
_LATENCY_SECONDS = 0.3
"""The card's figures may come this late."""

_PIECE_BYTES = 2 << 30


class CardReader(Protocol):
    """An NvmlReader, as far as it is needed here."""

    def look(self) -> None:
        """Add what happened since the last look."""

    def read(self) -> NvmlReadings:
        """Look, and tell all that was seen."""
        ...


@dataclass(frozen=True)
class Agreement:
    """One way to move bytes."""

    name: str
    direction: PcieDirection
    seconds: float
    payload_bytes: int
    """That were moved."""
    card_bytes: int
    """In this direction, as the card says."""
    opposite_bytes: int
    """In the other one: requests to read, acknowledgements."""

    @property
    def ratio(self) -> float:
        """Card over payload."""
        return self.card_bytes / self.payload_bytes


def wire_factor(packet_bytes: int) -> float:
    """Bytes on the link for each byte of payload, if all packets are full.

    Args:
        packet_bytes: payload of a packet, at most the link's MaxPayloadSize: 128 or 256.
    """
    return 1 + PACKET_OVERHEAD_BYTES / packet_bytes


def measure(
    name: str,
    direction: PcieDirection,
    move: Callable[[], int],
    card: CardReader,
    seconds: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> Agreement:
    """Move bytes for some seconds, and ask the card.

    Args:
        name: of the way.
        direction: of the payload.
        move: moves some bytes, waits until they are there, and returns how many.
        card: whose link it is.
        seconds: to go on for.
        sleep: for tests.
        clock: for tests.
    """
    sleep(_LATENCY_SECONDS)
    before = card.read().pcie_bytes
    begin = looked = clock()
    moved = 0
    while (now := clock()) < begin + seconds:
        if now > looked + _LOOK_SECONDS:
            card.look()
            looked = now
        moved += move()
    took = clock() - begin
    sleep(_LATENCY_SECONDS)
    after = card.read().pcie_bytes
    grown = {way: after[way] - before[way] for way in after}
    opposite: PcieDirection = (
        "device_to_host" if direction == "host_to_device" else "host_to_device"
    )
    return Agreement(name, direction, took, moved, grown[direction], grown[opposite])


def run(seconds: float) -> list[Agreement]:
    """Read in place, copy there, copy back.

    Raises:
        ConfigError: there is no CUDA device, or its driver does not tell of PCIe.
    """
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device to ask")
    device = torch.device("cuda")
    card = open_nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    if card is None or card.pcie_source == "none":
        raise ConfigError("the driver tells nothing of this card's PCIe link")
    print(f"{describe_machine()}; the card's bytes from {card.pcie_source}")
    store = HostKvStore(KvGeometry(32, 8, 128), _PIECE_BYTES, model_key=b"", populate=True)
    registered = RegisteredStore(store)
    host = torch.zeros(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(_PIECE_BYTES, dtype=torch.uint8, device=device)

    def read_in_place() -> int:
        count = launch_read(store, store.arena_bytes)
        torch.cuda.synchronize(device)
        return count

    def copy_to_device() -> int:
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        return _PIECE_BYTES

    def copy_to_host() -> int:
        host.copy_(there, non_blocking=True)
        torch.cuda.synchronize(device)
        return _PIECE_BYTES

    read_in_place()
    try:
        return [
            measure("read in place", "host_to_device", read_in_place, card, seconds),
            measure("copy to the device", "host_to_device", copy_to_device, card, seconds),
            measure("copy to the host", "device_to_host", copy_to_host, card, seconds),
        ]
    finally:
        registered.close()


@dataclass(frozen=True, kw_only=True)
class NvmlAgreementBench(JsonOption, Command):
    """Compare known bytes over PCIe with what the card says of them."""

    seconds: Annotated[float, within(0.1)] = 4.0
    """Of each transfer, s."""

    def __call__(self) -> None:
        """Print lines; keep the figures."""
        console = self.console(width=200)
        rows = run(self.seconds)
        for row in rows:
            console.print(
                f"{row.name:20} {row.direction}: {row.payload_bytes / row.seconds / 1e9:5.1f} GB/s "
                f"for {row.seconds:.1f} s; payload {row.payload_bytes / 1e9:7.2f} GB, card "
                f"{row.card_bytes / 1e9:7.2f} GB, {row.ratio:.3f} times that; "
                f"the other way {row.opposite_bytes / 1e9:.2f} GB",
                highlight=False,
            )
        console.print(
            f"full packets of 128 bytes: {wire_factor(128):.3f}, of 256: {wire_factor(256):.3f}",
            highlight=False,
        )
        self.write([asdict(row) | {"ratio": row.ratio} for row in rows])


if __name__ == "__main__":
    sys.exit(run_module(NvmlAgreementBench))
