"""The head of a model seen twice: errors of the summed loss, and how they change when the hidden states move.

    losses l_i(z_i),   errors e_i = dl_i / dz_i,   curvature: v_i = (d e_i / d z_i) u_i

For a head that is one matrix Wh this is v = s Wh with s = p (q - sum of p q), q = u Wh^T, p the softmax. `tokens x
vocabulary` is held for one chunk at a time, in both passes; the model's own treatment of the logits is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from alphatoken.pipeline.maths.head import (
    HeadedModel,
    Predictions,
    chunk_rows,
    head_of,
    matrix_of,
    memory_of,
    product,
    read_head,
)


class TwiceDifferentiableHead:
    """The head over n predicting positions of one pass. After a second backward pass ``moved`` (n, d) is what came down.

    ``outputs``: what the decoder returned. ``targets`` (n,): the tokens that follow.
    """

    def __init__(self, scored: HeadedModel, outputs: Any, targets: torch.Tensor) -> None:
        self.scored, self.outputs, self.targets = scored, outputs, targets
        self.losses = torch.zeros(0)
        self.moved: torch.Tensor | None = None

    def errors(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d) -> the gradient (n, d) of the summed loss by the hidden states, itself differentiable once."""
        return _Errors.apply(hidden, self)

    def first(self, hidden: torch.Tensor) -> torch.Tensor:
        """The errors without a graph; leaves the losses (n,) in nats."""
        found, gradient = read_head(self.scored, self.outputs, hidden, self.targets, [Predictions.losses])
        assert gradient is not None
        self.losses = found[0]
        return gradient

    def second(self, hidden: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """The derivative (n, d) of the errors where the hidden states move along ``moved`` (n, d)."""
        self.moved = moved
        found: list[torch.Tensor] = []
        weight = matrix_of(self.scored, self.outputs, hidden)
        rows = max(1, chunk_rows(self.scored.model, hidden) // 2)  # logits and their derivative in the memory of one
        with head_of(self.scored, self.outputs) as head:
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                part, along = hidden.detach()[chunk], moved[chunk]
                if weight is not None:
                    found.append(self._product(part, along, weight))
                    continue
                with torch.enable_grad():
                    logits = head(part.requires_grad_(True))
                    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    loss = F.cross_entropy(wide, self.targets[chunk], reduction="sum")
                    (errors,) = torch.autograd.grad(loss, part, create_graph=True)
                    found.append(torch.autograd.grad(errors, part, along)[0])
        return torch.cat(found)

    def _product(self, hidden: torch.Tensor, moved: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        def logits(name: str, rows: torch.Tensor) -> torch.Tensor:
            found = product(rows, weight, memory_of(self.scored), name)
            return found.to(torch.promote_types(found.dtype, torch.float32))

        probability, slope = logits("logits", hidden), logits("moved", moved)
        probability.sub_(probability.amax(dim=1, keepdim=True)).exp_()
        probability.div_(probability.sum(dim=1, keepdim=True))
        slope.mul_(probability)
        slope.addcmul_(probability, slope.sum(dim=1, keepdim=True), value=-1)
        return slope.to(hidden.dtype) @ weight


class _Errors(torch.autograd.Function):
    """Hidden states -> errors; backward: the curvature of the loss along what comes down."""

    @staticmethod
    def forward(ctx, hidden, head):  # type: ignore[no-untyped-def]  # torch types neither ctx nor this
        ctx.head = head
        ctx.save_for_backward(hidden)
        return head.first(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, moved):  # type: ignore[no-untyped-def]  # as above
        (hidden,) = ctx.saved_tensors
        return ctx.head.second(hidden, moved), None
