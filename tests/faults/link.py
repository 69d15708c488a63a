"""A network link between two namespaces that can be slow, lossy, narrow, or cut, for one port too.

Both ends are TUN devices; every packet passes through a thread of this process, which delays, drops
or forgets it. The kernel's own netem does the same, where it was built in.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000

NEAR_ADDRESS = "10.77.0.1"
FAR_ADDRESS = "10.77.0.2"


@dataclass(frozen=True)
class Far:
    """The other namespace."""

    pid: int
    """Of a process in it."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes a command run there."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")


class Link:
    """Forwards packets between two TUN devices.

    Set at any time: `delay_seconds` (one way), `loss` (a share), `is_cut`; `cut_port`, whose TCP
    packets alone are swallowed, both ways or those `from_near`, or those that are not;
    `max_packet_bytes`, above which a packet is swallowed and nobody is told.
    """

    def __init__(self, near_fd: int, far_fd: int) -> None:
        self._near_fd = near_fd
        self._other = {near_fd: far_fd, far_fd: near_fd}
        self._draw = random.Random(4)
        self._closed = threading.Event()
        self.heal()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def heal(self) -> None:
        """Neither slow, nor lossy, nor narrow, nor cut."""
        self.delay_seconds, self.loss, self.is_cut = 0.0, 0.0, False
        self.cut_port: int | None = None
        self.from_near: bool | None = None
        self.max_packet_bytes = 1 << 16

    def close(self) -> None:
        """Forward no more."""
        self._closed.set()
        self._thread.join()
        for fd in self._other:
            os.close(fd)

    def _run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._closed.is_set():
            pause = 0.05
            if waiting:
                pause = min(pause, max(0.0, waiting[0][0] - time.monotonic()))
            for fd in select.select(list(self._other), [], [], pause)[0]:
                packet = os.read(fd, 1 << 16)
                if self._swallows(fd, packet) or self._draw.random() < self.loss:
                    continue
                number += 1
                due = time.monotonic() + self.delay_seconds
                heapq.heappush(waiting, (due, number, self._other[fd], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(waiting)
                if not self.is_cut:
                    os.write(fd, packet)

    def _swallows(self, fd: int, packet: bytes) -> bool:
        if self.is_cut or len(packet) > self.max_packet_bytes:
            return True
        if self.cut_port is None or self.cut_port not in _tcp_ports(packet):
            return False
        return self.from_near is None or self.from_near == (fd == self._near_fd)


def _tcp_ports(packet: bytes) -> tuple[int, ...]:
    """Source and destination of a TCP packet over IPv4; nothing of another."""
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return ()
    ports: tuple[int, ...] = struct.unpack_from("!HH", packet, 4 * (packet[0] & 15))
    return ports


@contextmanager
def linked_namespace() -> Iterator[tuple[Link, Far]]:
    """A second network namespace, and a link to it from this process's own.

    Raises:
        OSError, CalledProcessError: this process may not do that.
    """
    # So that it ends with its input, even if this process is killed.
    holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
    far = Far(holder.pid)
    try:
        _wait_for_own_namespace(holder.pid)
        near_fd, far_fd = _open_tun(), _open_tun_in(holder.pid)
        for prefix, address in (((), NEAR_ADDRESS), (far.prefix, FAR_ADDRESS)):
            _ip(prefix, "link", "set", "lo", "up")
            _ip(prefix, "address", "add", f"{address}/24", "dev", "fault0")
            _ip(prefix, "link", "set", "fault0", "up")
        link = Link(near_fd, far_fd)
        try:
            yield link, far
        finally:
            link.close()
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdin is not None
        holder.stdin.close()


@contextmanager
def no_route() -> Iterator[None]:
    """Within the block, this process's namespace knows no way to the other end."""
    route = (f"{NEAR_ADDRESS.rpartition('.')[0]}.0/24", "dev", "fault0")
    _ip((), "route", "delete", *route)
    try:
        yield
    finally:
        _ip((), "route", "add", *route)


def _ip(prefix: tuple[str, ...], *arguments: str) -> None:
    subprocess.run([*prefix, "ip", *arguments], check=True)


def _wait_for_own_namespace(pid: int) -> None:
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:
        time.sleep(0.01)


def _open_tun() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", b"fault0", _IFF_TUN_WITHOUT_HEADER))
    return fd


def _open_tun_in(pid: int) -> int:
    """A TUN device of another namespace; a thread goes there for it, and ends."""
    opened: list[int | OSError] = []

    def open_there() -> None:
        try:
            there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(there, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            os.close(there)
            opened.append(_open_tun())
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join()
    if isinstance(opened[0], OSError):
        raise opened[0]
    return opened[0]
