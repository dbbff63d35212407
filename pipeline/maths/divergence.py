"""How far a model has moved from its reference: the mean divergence of their predictions on the reference's own text.

    KL(ref || model) at a position = sum over the vocabulary of  p_ref (log p_ref - log p_model)     in nats, at least 0

On completions that the reference sampled, which stand for all that it could do before; no data are needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alphatoken.pipeline.maths.attention import intercepted
from alphatoken.pipeline.maths.batch import by_token_budget
from alphatoken.pipeline.maths.decoder import ScoredLayers, decoder_layers
from alphatoken.pipeline.maths.head import chunk_rows, logits_of, rows_in_cache, vocabulary_of
from alphatoken.pipeline.maths.learners import Learner, Weights
from alphatoken.pipeline.maths.trial import Entering, add_by_row

COPIES = 2  # of a chunk's logits that are held at once: the reference's and the model's


class ReferencePredictions:
    """What the reference predicts in its completions: last hidden states, and the head that makes logits of them.

    ``reference``: the reference with its head; of ``no_scored_layers``, or the scored layers of the policy where it is the
    same model. ``completions``: sequences, and of such a policy what enters its scored layers, so that it does not diverge
    from itself by what is rounded there. ``budget``: padded tokens of one pass. Logits are made anew each time: hidden states
    take a hundredth of the room.
    """

    def __init__(self, reference: ScoredLayers, completions: Entering, kernel: str, budget: int) -> None:
        self.reference, self.kernel = reference, kernel
        rows = completions.sequences
        self.groups = by_token_budget([len(ids) for ids in rows.input_ids], budget)
        self.hidden: list[torch.Tensor] = []
        self.outputs: Any = None
        for group in self.groups:
            batch, from_below = completions.batch(group, reference)
            with torch.no_grad(), from_below, intercepted(reference.decoder, kernel, None):
                self.outputs = reference.decoder(input_ids=batch.input_ids, use_cache=False)
            self.hidden.append(self.outputs.last_hidden_state.flatten(0, 1)[batch.predicting()])

    def without_layers(self) -> ReferencePredictions:
        """Let go of the reference's layers, of which only the head is needed any more."""
        _, stack = decoder_layers(self.reference.model)
        del stack[:]
        return self

    @torch.no_grad()
    def divergences(
        self, learner: Learner, weights: Weights, completions: Entering
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over positions of KL(reference || model with these weights), nats, and their number, per completion.

        ``completions``: the sequences that this was made of, with what enters the first scored layer of the learner's model.
        Two (completions,), float64. A result that is not finite is handed out as it is.
        """
        sums, counts = (torch.zeros(len(completions.sequences), dtype=torch.float64) for _ in range(2))
        scored = learner.scored
        for group, theirs in zip(self.groups, self.hidden, strict=True):
            batch, from_below = completions.batch(group, scored)
            with learner.holding(weights), from_below, intercepted(scored.decoder, self.kernel, None):
                outputs = scored.decoder(input_ids=batch.input_ids, use_cache=False)
            own = outputs.last_hidden_state.flatten(0, 1)[batch.predicting()]
            found = []
            rows = max(16, chunk_rows(scored.model, own) // COPIES)
            for start in range(0, len(own), rows):
                part = slice(start, start + rows)
                # One after the other: both may be the head of one model, and it may have learned.
                before = logits_of(self.reference, self.outputs, theirs[part], "reference")
                with learner.holding(weights):
                    now = logits_of(scored, outputs, own[part])
                found.append(_divergence(before, now))
            add_by_row(sums, counts, torch.cat(found) if found else own.new_zeros(0), batch, group)
        return sums, counts


def _divergence(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL (n,) of two sets of logits (n, V); a few rows at a time, which fit the cache.

    A token that cannot follow (a logit of minus infinity) adds nothing; infinity where the model alone rules one out.
    """
    rows = rows_in_cache(before)
    found = []
    for theirs, own in zip(before.split(rows), now.split(rows), strict=True):
        log_p = _log_probabilities(theirs)
        p = log_p.exp()
        found.append((p * (log_p - _log_probabilities(own)).masked_fill_(p == 0, 0.0)).sum(dim=1))
    return torch.cat(found)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def same_vocabulary(models: Sequence[Any]) -> bool:
    """Whether predictions of these models can be compared."""
    return len({vocabulary_of(model) for model in models}) == 1
