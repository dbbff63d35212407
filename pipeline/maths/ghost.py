"""One ghost pass: forward, losses at the response, backward through the scored layers; a visitor sees every (h, d).

All quantities of the method are visitors of this pass: token values contract (h, d) with a direction, the validation
gradient sums d h^T, the Fisher sums d^2 (h^2)^T. What is read off the softmax comes with it, and, along a direction, the
derivative of the logits (forward over the same pass; see tangents.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.capture import Visitor, captured
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.head import Predictions, Reading, read_head
from alphatoken.pipeline.maths.tangents import Tangents, dual_level, tangent_of, without_tangent


def ghost_pass(
    scored: ScoredLayers, batch: Batch, visitor: Visitor, kernel: str = "sdpa", window: int = 0
) -> torch.Tensor:
    """Run one batch; ``visitor`` is called once per scored linear map (and expert), from the last to the first.

    Errors are those of L = the SUM of the response tokens' cross-entropies. Returns the loss of every predicting
    position (n,), in the order of ``batch.predicting()``, in nats.
    """
    return read_pass(scored, batch, [Predictions.losses], visitor, {}, kernel, window)[0]


def read_pass(
    scored: ScoredLayers,
    batch: Batch,
    readings: Sequence[Reading],
    visitor: Visitor | None,
    along: Mapping[str, Tangents],
    kernel: str,
    window: int = 0,
    keep: torch.Tensor | None = None,
    weigh: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """A ghost pass that reads more than losses off the softmax: (readings, n), in the order of ``batch.predicting()``.

    ``visitor`` None: forward alone. ``along``: direction name -> direction; the readings find the logits' derivative
    along each. The first shares the forward pass, each further one takes a forward pass of its own: let
    ``lower_layers_once`` hand the lower layers on. ``keep``: flat positions whose products M h of the first the visitor is
    shown. ``weigh``: the first reading (n,) -> factors (n,), held constant, of
    every position's loss in the sum whose errors the visitor sees.
    """
    positions = batch.predicting()
    if not len(positions):
        return torch.zeros(len(readings), 0, device=batch.input_ids.device)
    targets = batch.labels.flatten()[positions + 1]
    names = list(along)
    first = along[names[0]] if names else None
    moved = {name: _moved(scored, batch, positions, kernel, along[name]) for name in names[1:]}
    with ExitStack() as stack:
        # Left before the backward pass: its formulas would be derived as well.
        level = stack.enter_context(ExitStack())
        if first is not None:
            level.enter_context(dual_level())
        stack.enter_context(captured(scored, visitor, kernel, window, first, keep))
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = without_tangent(outputs.last_hidden_state).flatten(0, 1)[positions]
        if first is not None:
            moved[names[0]] = _derivative(outputs, positions)
        level.close()
        scales = {name: one.scale for name, one in along.items()}
        found, gradient = read_head(scored, outputs, hidden, targets, readings, moved, visitor is not None, scales)
        if gradient is not None:
            factors = None if weigh is None else weigh(found[0]).to(gradient.dtype)
            hidden.backward(gradient if factors is None else gradient * factors[:, None])
    return found


def _moved(
    scored: ScoredLayers, batch: Batch, positions: torch.Tensor, kernel: str, direction: Tangents
) -> torch.Tensor:
    """The derivative (n, d) of the last hidden states at ``positions``, by a forward pass of its own."""
    with dual_level(), captured(scored, None, kernel, 0, direction):
        return _derivative(scored.decoder(input_ids=batch.input_ids, use_cache=False), positions)


def _derivative(outputs: Any, positions: torch.Tensor) -> torch.Tensor:
    tangent = tangent_of(outputs.last_hidden_state)
    if tangent is None:
        raise UnsupportedModel("the derivative gets lost between the scored layers and the last hidden state")
    return tangent.flatten(0, 1)[positions]
