"""Prompts computed on the device that decodes them: a chunk at a time over host and device KV.

All tokens of a chunk attend at once, and what is stored before them is read once for all: each
layer's keys and values are gathered from their slabs in host memory, and from the device tier where
it holds them, a piece ahead of the attention to them. A chunk's own keys and values take part from
the device, in bfloat16 as they are stored, and go to the store while the device goes on. So a chunk
costs about what its gathering costs, whether it has one token or some hundreds; and it may stop
between two layers, so that streams need not wait for all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fluxion_core.decode.chunk import PromptEnds
from fluxion_core.decode.step import PromptEnd
from fluxion_core.decode.work import ChunkAppend
from fluxion_core.geometry import BLOCK_TOKENS, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention.parts import attend_part, merge_parts
from fluxion_core.kernels.tier.gather import ResidentUnits, UnitGather
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.planning.profiled_queries import ProfiledPositions
from fluxion_core.pool.cpu_pool import CpuPool

PIECE_BYTES = 64 << 20
"""Keys and values that are gathered at a time, of one layer; there is room for two such pieces."""

_FIRST_BYTES_PER_SECOND = 3e10
"""That a chunk is thought to gather, before it has shown it."""

_LEAST_LAYER_SECONDS = 3e-4
"""That a layer is thought to take before that: its launches."""


class DevicePromptComputer(PromptEnds):
    """Computes prompts for a body on a device, on the current stream. The body's thread only.

    Args:
        decoder: the model.
        store: whose memory the device can address.
        pool: threads that make profiles.
        usage: gets bytes over the link, and seconds.
        residents: says, at the beginning of each call, which units of a sequence are read on the
            device; None: none. It must hold until the call returns: what moves units goes on the
            current stream, before or after.
        piece_bytes: that are gathered at a time; twice as much is taken on the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: HostKvStore,
        pool: CpuPool,
        usage: DeviceUsage,
        residents: Callable[[SequenceKv], ResidentUnits | None] = lambda _: None,
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(decoder, pool)
        self._model, self._usage, self._residents = decoder, usage, residents
        device = decoder.embedding.device
        self._device = device
        self._geometry = store.geometry
        gather = UnitGather(store.geometry, store.arena_address, store.slab_stride_bytes)
        self._pieces = _StoredPieces(gather, device, piece_bytes)
        self._chunk: _Chunk | None = None

    @torch.inference_mode()
    def compute_chunk(
        self,
        sequence: SequenceKv,
        token_ids: Sequence[int],
        profile_window: WindowSpec | None,
        *,
        seconds: float | None = None,
    ) -> PromptEnd | None:
        """Compute and store a prompt's next tokens, or some layers of them; see DecodeStep."""
        started = time.perf_counter()
        chunk, self._chunk = self._chunk, None
        if chunk is None or chunk.append.sequence is not sequence:
            chunk = self._begin(sequence, token_ids, wants_profile=profile_window is not None)
        self._pieces.resume(self._residents(sequence))
        try:
            hidden, num_layers = chunk.advance(seconds)
        finally:
            # One that fails too: what it gathers must have been read before units are moved.
            self._pieces.rest()
        chunk.layer_seconds = (time.perf_counter() - started) / num_layers
        gathered_bytes = self._pieces.take_host_units() * self._geometry.block_bytes
        self._usage.pcie_bytes["host_to_device", "missing_kv"] += gathered_bytes
        end = None
        if hidden is None:
            self._chunk = chunk
        else:
            chunk.append.finish()
            self._count_returned(chunk)
            self._keep(sequence, [query.cpu() for query in chunk.attention.queries])
            if chunk.is_last:
                end = self._end(sequence, hidden[-1:], profile_window)
        taken = time.perf_counter() - started
        self._usage.busy_seconds += taken
        self._pace.chunk_took(taken)
        return end

    def _begin(
        self, sequence: SequenceKv, token_ids: Sequence[int], *, wants_profile: bool
    ) -> _Chunk:
        first, count = sequence.num_tokens, len(token_ids)
        is_last = first + count == sequence.num_prompt_tokens
        append = ChunkAppend(sequence, count)
        self._pieces.begin(sequence)
        attention = _GatheredAttention(
            self._pieces,
            _KvReturn(append.append, sequence, count, self._device),
            self._profiled(sequence) if wants_profile else None,
            first,
        )
        ids = torch.tensor(token_ids, device=self._device)
        positions = torch.arange(first, first + count, device=self._device)
        layers = self._model.by_layers(ids, positions, attention)
        gathering = first * self._geometry.layer_token_bytes / _FIRST_BYTES_PER_SECOND
        layer_seconds = max(_LEAST_LAYER_SECONDS, gathering)
        return _Chunk(append, count, attention, layers, is_last, layer_seconds)

    def _count_returned(self, chunk: _Chunk) -> None:
        config, moved = self._model.config, self._usage.pcie_bytes
        kv_floats = config.num_layers * chunk.count * 2 * config.num_kv_heads * config.head_dim
        query_bytes = sum(query.nbytes for query in chunk.attention.queries)
        moved["device_to_host", "queries"] += kv_floats * 4 + query_bytes


@dataclass
class _Chunk:
    """A chunk on its way through the layers."""

    append: ChunkAppend
    count: int
    attention: _GatheredAttention
    layers: Iterator[Tensor | None]
    """As of `Decoder.by_layers`."""
    is_last: bool
    """Of its prompt."""
    layer_seconds: float
    """That a layer takes; until its first call has shown it, what its gathering may take."""

    def advance(self, seconds: float | None) -> tuple[Tensor | None, int]:
        """Compute as many layers as there is time for, at least one; None: all that are left.

        Returns:
            The hidden states after the last layer, None before it; layers computed.
        """
        # By the layers' own time, not by the clock: the device is layers behind when they have
        # been launched.
        most = None if seconds is None else max(1, int(seconds / self.layer_seconds))
        outcomes = list(islice(self.layers, most))
        hidden = outcomes[-1]
        if hidden is not None:
            self.attention.finish()
        return hidden, len(outcomes)


class _GatheredAttention:
    """Attention port of one chunk.

    Args:
        pieces: of what is stored before it.
        kv_return: takes its keys and values.
        profiled: whose queries are picked, for a profile; None for no profile.
        first_token: of the chunk.
    """

    def __init__(
        self,
        pieces: _StoredPieces,
        kv_return: _KvReturn,
        profiled: ProfiledPositions | None,
        first_token: int,
    ) -> None:
        self._pieces, self._kv_return = pieces, kv_return
        self._profiled, self._first_token = profiled, first_token
        self.queries: list[Tensor] = []
        """Picked ones of each layer, [rows, heads, head_dim] on the device; empty without a
        profile."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer; see AttentionPort."""
        if self._profiled is not None:
            self.queries.append(self._profiled.pick(query, self._first_token))
        # What is stored is what is attended to.
        key, value = key.bfloat16(), value.bfloat16()
        self._kv_return.send(layer, key, value)
        count, heads, head_dim = query.shape
        kv_heads, dtype = key.shape[1], query.dtype
        group = heads // kv_heads
        own = (x.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
        part, lse = attend_part(query.transpose(0, 1), *own, is_causal=True)
        output = part.float()
        folded = query.reshape(count, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        folded = folded.reshape(kv_heads, group * count, head_dim)
        for stored_key, stored_value in self._pieces.of_next_layer():
            part, part_lse = attend_part(folded, stored_key.to(dtype), stored_value.to(dtype))
            output, lse = merge_parts(
                output, lse, part.reshape(output.shape), part_lse.reshape(lse.shape)
            )
        # The device has this layer to do: time for the one before.
        self._kv_return.store(layer)
        return output.transpose(0, 1).to(dtype)

    def finish(self) -> None:
        """Store what is left after the last layer."""
        self._kv_return.store_last()


class _KvReturn:
    """Keys and values of a chunk, on their way from the device to the store.

    Args:
        append: to the store.
        sequence: that it appends to.
        count: tokens of the chunk.
        device: where they come from.
    """

    def __init__(
        self, append: StepAppend, sequence: SequenceKv, count: int, device: torch.device
    ) -> None:
        geometry = sequence.store.geometry
        self._append = append
        # Two layers, one that arrives and one that is stored.
        self._kv = torch.empty(
            *(2, 2, count, geometry.num_kv_heads, geometry.head_dim),
            pin_memory=device.type == "cuda",
        )
        events = torch.get_device_module(device)
        self._has_arrived = [events.Event() for _ in self._kv]
        self._sent: list[int] = []

    def send(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy a layer's to pinned memory, on the current stream.

        Args:
            layer: the next one.
            key: [tokens, kv_heads, head_dim].
            value: like key.
        """
        place = layer % 2
        for at, tensor in zip(self._kv[place], (key, value), strict=True):
            at.copy_(tensor.float(), non_blocking=True)
        self._has_arrived[place].record()
        self._sent.append(layer)

    def store(self, newest: int) -> None:
        """Append layers before the newest one, once they have arrived."""
        while self._sent and self._sent[0] < newest:
            self._store_first()

    def store_last(self) -> None:
        """Append what is left."""
        while self._sent:
            self._store_first()

    def _store_first(self) -> None:
        layer = self._sent.pop(0)
        self._has_arrived[layer % 2].synchronize()
        self._append.append(layer, *self._kv[layer % 2])


class _StoredPieces:
    """Keys and values that a sequence has stored, layer after layer, in pieces.

    While one piece is attended to, the next one is gathered beside it, on a stream of its own.

    Args:
        gather: out of the store.
        device: that it is gathered on.
        piece_bytes: the most that a piece may take.
    """

    def __init__(self, gather: UnitGather, device: torch.device, piece_bytes: int) -> None:
        self._gather, self._device = gather, device
        geometry = gather.geometry
        block_bytes = geometry.layer_token_bytes * BLOCK_TOKENS
        self._most_blocks = max(1, piece_bytes // block_bytes)
        room = self._most_blocks * BLOCK_TOKENS
        self._buffers = [gather.buffer(room, device) for _ in range(2)]
        self._streams = torch.get_device_module(device)
        self._stream = self._streams.Stream()
        self._is_gathered = [self._streams.Event() for _ in self._buffers]
        self._is_free = [self._streams.Event() for _ in self._buffers]
        self._rests = self._streams.Event()
        self._host_units = torch.zeros(1, dtype=torch.int64, device=device)
        self._slabs = torch.zeros(0, dtype=torch.int64, device=device)
        self._runs: list[range] = []
        self._num_gathered = self._num_taken = 0
        self._resident: ResidentUnits | None = None

    def begin(self, sequence: SequenceKv) -> None:
        """Begin with the first layer of what a sequence has stored by now."""
        tokens, geometry = sequence.num_tokens, self._gather.geometry
        self._slabs = sequence.slab_table[: geometry.slabs_for(tokens)].to(
            self._device, non_blocking=True
        )
        blocks = ceil_div(tokens, BLOCK_TOKENS)
        num_runs = ceil_div(blocks, self._most_blocks)
        run_tokens = ceil_div(blocks, max(1, num_runs)) * BLOCK_TOKENS
        self._runs = [
            range(first, min(first + run_tokens, tokens))
            for first in range(0, tokens, max(1, run_tokens))
        ]
        self._num_gathered = self._num_taken = 0

    def resume(self, resident: ResidentUnits | None) -> None:
        """Go on behind what the current stream has to do.

        Args:
            resident: units that are read on the device until `rest`.
        """
        self._resident = resident
        self._stream.wait_stream(self._streams.current_stream())

    def of_next_layer(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of the next layer, piece after piece.

        Yields:
            [kv_heads, tokens, head_dim] bfloat16 each, of disjoint tokens, for the current stream,
            until the next one is asked for.
        """
        for run in self._runs:
            self._gather_ahead()
            place = self._num_taken % 2
            self._is_gathered[place].wait()
            key, value = self._buffers[place][:, :, : len(run)]
            yield key, value
            self._is_free[place].record()
            self._num_taken += 1
        self._gather_ahead()

    def rest(self) -> None:
        """Wait for what was gathered and for the current stream, and for nothing else that the
        device does: nothing is gathered, and no resident unit read, until `resume`."""
        self._streams.current_stream().wait_stream(self._stream)
        self._rests.record()
        self._rests.synchronize()

    def take_host_units(self) -> int:
        """Take the count of units that were read in host memory since the last call."""
        units = int(self._host_units)
        self._host_units.zero_()
        return units

    def _gather_ahead(self) -> None:
        """Gather into buffers that are free, or will be when what reads them has ended."""
        total = len(self._runs) * self._gather.geometry.num_layers
        with self._streams.stream(self._stream):
            while self._num_gathered < min(total, self._num_taken + len(self._buffers)):
                layer, ordinal = divmod(self._num_gathered, len(self._runs))
                place = self._num_gathered % 2
                self._is_free[place].wait()
                self._gather.launch(
                    self._slabs,
                    layer,
                    self._runs[ordinal],
                    self._buffers[place],
                    self._host_units,
                    self._resident,
                )
                self._is_gathered[place].record()
                self._num_gathered += 1
