"""The loss of weighted fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_loss(logits: Tensor, input_ids: Tensor, weights: Tensor, *, chunk_tokens: int = 1024) -> Tensor:
    """The sum of `weights[:, i] * cross entropy of token i`; the first token of a row is never predicted.

    `logits` (rows, tokens, vocabulary) is used up: where it needs a gradient it is overwritten with that, so
    that no second tensor of its size is ever held. Only tokens with a weight cost anything.
    """
    vocabulary = logits.shape[-1]
    # The score of token i + 1 is at place i: shift the small tensors instead of copying the large one.
    targets, shifted = torch.roll(input_ids, -1, dims=1), torch.roll(weights, -1, dims=1)
    shifted[:, -1] = 0
    total: Tensor = _WeightedCrossEntropy.apply(
        logits.reshape(-1, vocabulary), targets.reshape(-1), shifted.reshape(-1), chunk_tokens
    )
    return total


# mypy sees no torch in the control environment.
class _WeightedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Computes the gradient together with the loss, a chunk of float32 log-probabilities at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, chunk_tokens: int) -> Tensor:
        counted = weights.nonzero().squeeze(1)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in counted.split(chunk_tokens):
            logps = logits[rows].float().log_softmax(-1)
            wanted, weight = targets[rows].unsqueeze(1), weights[rows].float()
            total -= (weight * logps.gather(1, wanted).squeeze(1)).double().sum()
            if ctx.needs_input_grad[0]:
                slope = logps.exp_()
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
                # Chunks are disjoint: none reads what another has overwritten.
                logits[rows] = slope.mul_(weight.unsqueeze(1)).to(logits.dtype)
        if ctx.needs_input_grad[0]:
            logits[weights == 0] = 0
            ctx.gradient = logits.detach()
        return total.float()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor = ctx.gradient.mul_(scale)
        ctx.gradient = None
        return gradient, None, None, None
