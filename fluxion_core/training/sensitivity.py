"""What a head's squared output error does to the next token: the weights of policy `marginal`.

For a small error of a head's output, the KL of the next-token distribution is half a quadratic form
in it, with the Fisher information as its matrix. For an error in any direction alike that is
`|error|^2 * E|gradient|^2 / (2 * head_dim)`, with the gradient of the log probability of a token
drawn from the model. Means over steps of texts, per layer and head, in nats per squared head output
error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.geometry import WindowSpec
from fluxion_core.models.decoder import Decoder
from fluxion_core.predictor.layer_step import LayerStep
from fluxion_core.training.replay import prefill, replay


def measure_sensitivity(
    decoder: Decoder,
    documents: Sequence[Sequence[int]],
    window: WindowSpec,
    *,
    steps: int = 24,
    draws: int = 4,
    seed: int = 0,
) -> Tensor:
    """[layers, heads] float32 on the CPU: nats per squared head output error.

    Args:
        decoder: float32.
        documents: token ids.
        window: the default window.
        steps: of each document, spread over its second half.
        draws: tokens drawn at each step.
        seed: of the draws.
    """
    device = decoder.embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for token_ids in documents:
        kv = prefill(decoder, token_ids)
        count = kv.token_ids.shape[0]
        positions = torch.linspace(count // 2, count - 1, steps, device=device).long()
        errors: list[Tensor] = []
        norms: list[Tensor] = []

        def attend(
            layer: int, step: LayerStep, errors: list[Tensor] = errors, norms: list[Tensor] = norms
        ) -> Tensor:
            del layer
            output = step.full_output.flatten(1, 2)
            errors.append(torch.zeros_like(output, requires_grad=True))
            norms.append(step.norm.detach())
            return output + errors[-1]

        hidden = replay(decoder, kv, positions, window, attend)
        log_probabilities = torch.log_softmax(decoder.logits(hidden), dim=-1)
        probabilities = log_probabilities.detach().exp()
        for _ in range(draws):
            tokens = torch.multinomial(probabilities, 1, generator=generator)
            drawn = log_probabilities.gather(1, tokens).sum()
            gradients = torch.autograd.grad(drawn, errors, retain_graph=True)
            squares = [
                gradient.square().sum(-1) * norm[:, None] ** 2
                for gradient, norm in zip(gradients, norms, strict=True)
            ]
            found.append(torch.stack(squares, 1).mean(0).cpu())
    return torch.stack(found).mean(0) / (2 * decoder.config.head_dim)
