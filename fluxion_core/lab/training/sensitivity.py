"""Effect of a head's squared output error on the next token: the weights of policy `marginal`.

For a small error of a head's output, the KL of the next-token distribution is half a quadratic form
in it, with the Fisher information as its matrix: half the mean over tokens drawn from the model of
`(gradient . error)^2`, with the gradient of the drawn token's log probability. Errors do not point
anywhere: they are taken to lie as the error of the window alone does. Means over steps of texts,
per layer and head, in nats per squared head output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training.replay import prefill, replay
from fluxion_core.lab.training.workers import Workers
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.constants import TINY_MASS
from fluxion_core.planning.layer_step import LayerStep


@dataclass(frozen=True)
class _Text:
    token_ids: Sequence[int]
    window: WindowSpec
    steps: int
    draws: int
    seed: int


def measure_sensitivity(
    workers: Workers,
    documents: Sequence[Sequence[int]],
    window: WindowSpec,
    *,
    steps: int = 24,
    draws: int = 4,
) -> Tensor:
    """[layers, heads] float32 on the CPU: nats per squared head output error.

    Args:
        workers: that do it.
        documents: token ids.
        window: the default window.
        steps: of each document, spread over its second half.
        draws: tokens drawn at each step.
    """
    texts = [_Text(ids, window, steps, draws, seed) for seed, ids in enumerate(documents)]
    parts = list(workers.map(_of_text, texts))
    changes = torch.stack([change for change, _ in parts]).mean(0)
    squares = torch.stack([square for _, square in parts]).mean(0)
    return changes / (2 * squares).clamp(min=TINY_MASS)


def _of_text(decoder: Decoder, text: _Text) -> tuple[Tensor, Tensor]:
    """Mean squared changes of log probability, and mean squared errors: [layers, heads] each."""
    device = decoder.embedding.device
    generator = torch.Generator(device).manual_seed(text.seed)
    kv = prefill(decoder, text.token_ids)
    count = kv.token_ids.shape[0]
    positions = torch.linspace(count // 2, count - 1, text.steps, device=device).long()
    errors: list[Tensor] = []
    windows: list[Tensor] = []
    squares: list[Tensor] = []

    def attend(layer: int, step: LayerStep) -> Tensor:
        del layer
        output = step.full_output.flatten(1, 2)
        errors.append(torch.zeros_like(output, requires_grad=True))
        alone = (step.window_sum / step.window_mass[..., None]).flatten(1, 2).detach()
        windows.append(alone - output.detach())
        relative = torch.linalg.vector_norm(windows[-1], dim=-1) / step.norm.detach()[:, None]
        squares.append(relative.square())
        return output + errors[-1]

    hidden = replay(decoder, kv, positions, text.window, attend)
    log_probabilities = torch.log_softmax(decoder.logits(hidden), dim=-1)
    probabilities = log_probabilities.detach().exp()
    found = []
    for _ in range(text.draws):
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        drawn = log_probabilities.gather(1, tokens).sum()
        gradients = torch.autograd.grad(drawn, errors, retain_graph=True)
        changes = [
            (gradient * window_error).sum(-1).square()
            for gradient, window_error in zip(gradients, windows, strict=True)
        ]
        found.append(torch.stack(changes, 1).mean(0))
    return torch.stack(found).mean(0).cpu(), torch.stack(squares, 1).mean(0).cpu()
