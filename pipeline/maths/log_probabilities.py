"""Log-probabilities of response tokens by a forward pass alone."""

from __future__ import annotations

import torch

from pipeline.maths.attention import intercepted
from pipeline.maths.batch import Batch
from pipeline.maths.decoder import ScoredLayers
from pipeline.maths.head import chunk_rows, head_of
from pipeline.maths.nonfinite import locate


def token_log_probabilities(scored: ScoredLayers, batch: Batch, kernel: str) -> torch.Tensor:
    """(batch, length) float32, in nats; index i speaks of token i as a PREDICTED token, 0.0 outside the response.

    ``kernel``: the attention implementation. Raises NonFinite where the model gives NaN or infinity.
    """
    positions = batch.predicting()
    found = torch.zeros(batch.shape, dtype=torch.float32, device=batch.input_ids.device)
    if not len(positions):
        return found
    targets = batch.labels.flatten()[positions + 1]
    with torch.no_grad(), intercepted(scored.model, kernel, None):
        outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)[positions]
        rows, chosen = chunk_rows(scored.model, hidden), []
        with head_of(scored, outputs) as head:
            for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
                logits = head(part)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                chosen.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=-1))
    logps = torch.cat(chosen)
    if not bool(torch.isfinite(logps).all()):
        raise locate(scored, batch, kernel)
    found.view(-1)[positions + 1] = logps.float()
    return found
