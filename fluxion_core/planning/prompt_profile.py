"""The profile of a prompt's heads: the predictor's estimates by prefill, and their wire bytes.

The prefill node has full attention at hand; the decode node does not. So prefill looks at what some
of the prompt's queries would have needed, and sends that along with the KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import FrameFormatError
from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.planning.constants import BUDGETS, NUM_KV_STATISTICS


@dataclass(frozen=True)
class PromptProfile:
    """Profile of a prompt by prefill, for one layer. float32.

    Estimates are means over its last 16 queries, of what those would have needed; but for the last
    field, which is over the spread queries too (profiled_queries.py).
    Tensors may have leading dimensions: of prompts, or of rows.
    """

    log_squares: Tensor
    """[heads, levels, len(BUDGETS)]: log of the mean squared head output error."""
    worst_log_squares: Tensor
    """[heads, 2]: largest over the queries, at budget 0 and at 1/32 and block size 16."""
    region_mass: Tensor
    """[heads, 2]: log of region mass / window mass, mean and largest over the queries."""
    bounds: Tensor
    """[heads, 2]: mean bound_lse and largest bound_1st over the queries."""
    kv: Tensor
    """[kv_heads, 5]: the features of the group kv_distribution."""
    spread_log_squares: Tensor
    """[heads, levels, len(BUDGETS)]: like log_squares."""


@dataclass(frozen=True)
class QueryNeeds:
    """Needs of single queries, for one layer. float32, rows are queries."""

    log_squares: Tensor
    """[rows, heads, levels, len(BUDGETS)]: log of the squared head output error."""
    worst_log_squares: Tensor
    """[rows, heads, 2]: at budget 0 and at 1/32 and block size 16."""
    region_mass: Tensor
    """[rows, heads]: log of region mass / window mass."""
    bound_lse: Tensor
    """[rows, heads]: see features.py."""
    bound_1st: Tensor
    """[rows, heads]."""

    def summarize(
        self, prompts: int, kv: Tensor, spread_log_squares: Tensor | None = None
    ) -> PromptProfile:
        """Profiles of prompts, with a leading dimension of them.

        Args:
            prompts: rows are those of the first one, then of the second, as many of each.
            kv: [prompts, kv_heads, 5]: see PromptProfile.
            spread_log_squares: [prompts, spread queries, heads, levels, len(BUDGETS)]: log of the
                squared head output error of further queries; None if there are none.
        """

        def of_prompt(rows: Tensor) -> Tensor:
            return torch.unflatten(rows, 0, (prompts, -1))

        everywhere = of_prompt(self.log_squares)
        if spread_log_squares is not None:
            everywhere = torch.cat((spread_log_squares, everywhere), 1)
        mass = of_prompt(self.region_mass)
        bound_lse, bound_1st = of_prompt(self.bound_lse), of_prompt(self.bound_1st)
        return PromptProfile(
            log_squares=of_prompt(self.log_squares).exp().mean(1).log(),
            worst_log_squares=of_prompt(self.worst_log_squares).amax(1),
            region_mass=torch.stack((mass.mean(1), mass.amax(1)), -1),
            bounds=torch.stack((bound_lse.mean(1), bound_1st.amax(1)), -1),
            kv=kv,
            spread_log_squares=everywhere.exp().mean(1).log(),
        )


def join_needs(parts: Sequence[QueryNeeds]) -> QueryNeeds:
    """The rows of all parts, in order."""
    return QueryNeeds(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(QueryNeeds))
    )


def profile_shapes(num_heads: int, num_kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's PromptProfile, its fields in order."""
    return {
        "log_squares": (num_heads, len(BLOCK_SIZES), len(BUDGETS)),
        "worst_log_squares": (num_heads, 2),
        "region_mass": (num_heads, 2),
        "bounds": (num_heads, 2),
        "kv": (num_kv_heads, NUM_KV_STATISTICS),
        "spread_log_squares": (num_heads, len(BLOCK_SIZES), len(BUDGETS)),
    }


def packed_bytes(num_layers: int, num_heads: int, num_kv_heads: int) -> int:
    """Bytes of a whole model's profile: 77 kB for SmolLM2-135M, 292 kB for Llama-3.1-8B."""
    shapes = profile_shapes(num_heads, num_kv_heads).values()
    return num_layers * sum(int(np.prod(shape)) for shape in shapes) * 4


def pack(profiles: Sequence[PromptProfile]) -> bytes:
    """Little-endian float32, layer by layer, the fields in order, each row-major."""
    parts = [getattr(profile, f.name) for profile in profiles for f in fields(PromptProfile)]
    flat = torch.cat([part.detach().float().cpu().flatten() for part in parts])
    return flat.numpy().astype("<f4").tobytes()


def unpack(
    payload: bytes | memoryview, *, num_layers: int, num_heads: int, num_kv_heads: int
) -> list[PromptProfile]:
    """Profiles per layer.

    Raises:
        FrameFormatError: the payload has another size, or a value is not finite.
    """
    expected = packed_bytes(num_layers, num_heads, num_kv_heads)
    if len(payload) != expected:
        raise FrameFormatError(
            f"prompt profile of {len(payload)} B; {num_layers} layers of {num_heads} heads need "
            f"{expected}"
        )
    numbers = np.frombuffer(payload, dtype="<f4").astype(np.float32)
    # NumPy's check wakes no threads: the caller is an event loop.
    if not np.isfinite(numbers).all():
        raise FrameFormatError("prompt profile holds values that are not finite")
    shapes = profile_shapes(num_heads, num_kv_heads)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    profiles = []
    for layer in torch.from_numpy(numbers).view(num_layers, -1):
        parts = layer.split(sizes)
        named = zip(shapes.items(), parts, strict=True)
        profiles.append(PromptProfile(**{name: part.view(shape) for (name, shape), part in named}))
    return profiles
