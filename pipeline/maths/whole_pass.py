"""A pass through the whole model forward and back, by torch's own gradients: for what learns below the scored layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import ScoredLayers
from alphatoken.pipeline.maths.head import chunk_rows, head_of

COPIES = 4  # of a chunk's logits that are held at once
Weigh = Callable[[torch.Tensor], torch.Tensor]


def whole_pass(scored: ScoredLayers, batch: Batch, kernel: str, weigh: Weigh | None = None) -> torch.Tensor:
    """Losses (n,) in nats, in the order of ``batch.predicting()``; whatever wants a gradient is given one.

    The gradient is that of their sum, each loss times ``weigh(losses)``, which is held constant. `tokens x vocabulary` is
    never held whole, so that the head runs twice where ``weigh`` has to see every loss first.
    """
    positions = batch.predicting()
    if not len(positions):
        return torch.zeros(0, device=batch.input_ids.device)
    targets = batch.labels.flatten()[positions + 1]
    with torch.enable_grad(), intercepted(scored.decoder, kernel, None):
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
        last = hidden.detach().requires_grad_()
        size = max(16, chunk_rows(scored.model, hidden) // COPIES)
        parts = [slice(start, start + size) for start in range(0, len(positions), size)]
        with head_of(scored, outputs) as head:

            def losses_of(part: slice) -> torch.Tensor:
                logits = head(last[part])
                return cross_entropy(
                    logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[part], reduction="none"
                )

            factors = None
            if weigh is not None:
                with torch.no_grad():
                    factors = weigh(torch.cat([losses_of(part) for part in parts]))
            found = []
            for part in parts:
                losses = losses_of(part)
                (losses if factors is None else losses * factors[part]).sum().backward()
                found.append(losses.detach())
        hidden.backward(last.grad)
    return torch.cat(found)
