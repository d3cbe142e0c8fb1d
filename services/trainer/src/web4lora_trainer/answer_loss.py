"""The loss of answers through a frozen head, in chunks, and the scale that fp16 needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_POSITIONS_PER_CHUNK = 512


class AnswerLoss(torch.autograd.Function):
    """Cross entropy, summed, through a frozen head: a chunk of positions at a time.

    The gradient is made in the forward pass, so scores never exist for more than one chunk, and a vocabulary
    of 150,000 costs megabytes instead of gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of hidden (positions, width); weight is (vocabulary, width)."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], _POSITIONS_PER_CHUNK):
            part = slice(start, start + _POSITIONS_PER_CHUNK)
            scores = F.linear(hidden[part].to(weight.dtype), weight, bias).float()
            index = targets[part].unsqueeze(1)
            norm = scores.logsumexp(dim=1, keepdim=True)
            total += (norm - scores.gather(1, index)).sum()
            if gradient is not None:
                probabilities = scores.sub_(norm).exp_()
                probabilities.scatter_add_(1, index, torch.full_like(norm, -1.0))
                gradient[part] = (probabilities.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Scale the gradient that the forward pass made."""
        gradient: torch.Tensor = ctx.gradient
        return gradient.mul_(outer[0].to(gradient.dtype)), None, None, None


class ScaleGradient(torch.autograd.Function):
    """The identity; its backward pass multiplies, so that small fp16 gradients do not vanish."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the value as it is."""
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Multiply the gradient."""
        return outer[0] * ctx.scale, None
