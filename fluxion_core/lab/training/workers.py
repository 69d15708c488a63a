"""Documents, spread over processes that hold the model each.

On a GPU, collecting samples and replaying decisions are many small kernels and keep one core busy
with launching them; several processes share the GPU well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from fluxion_core.models.decoder import Decoder
from fluxion_core.models.weights import LoadedModel, load_model

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_models: dict[str, LoadedModel] = {}


@dataclass(frozen=True)
class Workers:
    """Processes to do errands in, and the model that each loads.

    Args:
        count: 1 for this process alone.
        model: GGUF file or model directory.
        device: of the model.
    """

    count: int
    model: Path
    device: str

    def map(
        self, function: Callable[[Decoder, ItemT], ResultT], items: Sequence[ItemT]
    ) -> Iterator[ResultT]:
        """Results in the items' order; `function` must be a module's own."""
        if self.count == 1:
            yield from (function(self.decoder(), item) for item in items)
            return
        with ProcessPoolExecutor(
            self.count, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            calls = [pool.submit(_call, self, function, item) for item in items]
            yield from (call.result() for call in calls)

    def decoder(self) -> Decoder:
        """The model of this process, loaded once."""
        return self.loaded().decoder

    def loaded(self) -> LoadedModel:
        """The model of this process, with what identifies it."""
        key = f"{self.model} {self.device}"
        if key not in _models:
            device = torch.device(self.device)
            _models[key] = load_model(self.model, device=device, dtype=torch.float32)
        return _models[key]


def _call(workers: Workers, function: Callable[[Decoder, ItemT], ResultT], item: ItemT) -> ResultT:
    return function(workers.decoder(), item)
