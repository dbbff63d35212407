"""The token valuer: a batch of sequences in, one number per component and response token out.

This is the library's front door; it needs torch and transformers alone. A token's way from ``input_ids`` to its four
numbers leads through three files: here its sequence becomes a row of a right-padded batch and the token t a network
position p = t - 1 (``value``, ``_at_token``); in ghost.py the batch goes forward and backward, and every scored linear
map shows its input h_p and output error d_p to a visitor; in contraction.py that visitor adds up
d_p^T M h_p and e_p^T M_v h_p for both directions.
"""

from __future__ import annotations

import torch
from alphatoken.pipeline.maths.batch import IGNORED, Batch
from alphatoken.pipeline.maths.capture import swapped
from alphatoken.pipeline.maths.contraction import Contraction, StackedDirections
from alphatoken.pipeline.maths.decoder import ScoredLayers, scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.exact import check_forward_mode, exact_values
from alphatoken.pipeline.maths.ghost import ghost_pass
from alphatoken.pipeline.maths.nonfinite import locate
from alphatoken.pipeline.maths.value_projection import ValueProjection, value_projections
from torch import nn

ESTIMATORS = ("ghost", "exact", "information")


def check_estimator(scored: ScoredLayers, estimator: str, window: int, attention: str) -> dict[str, ValueProjection]:
    """Raise UnsupportedModel where the estimator cannot value with this model; returns what its causal path needs.

    Runs a few tokens, so that a run ends before its Fisher and not after. See value_projections for what is returned.
    """
    if estimator != "ghost":
        check_forward_mode(scored, attention)
        return {}
    return value_projections(scored, attention) if window > 0 else {}


class TokenValuer:
    """Values every response token along the given directions (Eqs. 8, 9 and 11).

    ``model``: a causal language model of transformers, the policy. ``directions``: at the same point of the
    trajectory; where they bring their own scored weights, those are used inside each call. ``layers`` K: the last K
    decoder layers are scored. ``window`` W: reach of the causal path in tokens; 0 leaves it out. ``attention``: sdpa |
    flash_attention_2 | eager. ``estimator``: ghost (the paper's, by position) | exact (the derivative of each token's
    own loss) | information (adaptation: how much a step along the direction moves the token's prediction, whatever its
    label, never negative; stability as exact); the last two know no paths: the causal columns are 0.
    None: the one that the run of the directions has valued with, else ghost.
    ``gradient_norm``: with a column of that name, the Frobenius norm over the scored maps of what the token's position
    adds to the gradient, ``sqrt(sum of |d|^2 |h|^2)``; by position as the direct columns, so that it knows no causal
    path and the ghost estimator alone has it. Raises ValueError when the directions are not for these layers,
    UnsupportedModel when the model cannot be scored.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        layers: int = 3,
        window: int = 32,
        attention: str = "sdpa",
        estimator: str | None = None,
        gradient_norm: bool = False,
    ) -> None:
        estimator = estimator or directions.estimator or "ghost"
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator={estimator}: must be one of {', '.join(ESTIMATORS)}")
        if gradient_norm and estimator != "ghost":
            raise ValueError("gradient_norm: forward-mode differentiation forms no gradient; use estimator=ghost")
        self.gradient_norm = gradient_norm
        self.scored = scored_layers(model, layers)
        self.estimator, self.named = estimator, directions.named
        self.without_sign = [n for n in self.named if n != "stability"] if estimator == "information" else []
        directions.check(self.scored.weights())
        self.weights = dict(directions.weights) if directions.weights is not None else None
        self.window, self.attention = window, attention
        self.values = check_estimator(self.scored, estimator, window, attention)
        if estimator != "ghost":  # a pass for each direction, but none for those without a drift
            moving = {n: d for n, d in self.named.items() if any(bool(t.any()) for t in d.values())} or self.named
            parameters = {m.name: m.parameter for m in self.scored.maps}
            self.moving = {n: {k: t.to(parameters[k]) for k, t in d.items()} for n, d in moving.items()}
            return
        self.directions = StackedDirections(self.scored, directions.named, set(self.values))

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Column name -> float32 tensor (batch, length); float64 for a float64 model.

        ``attention_mask`` (batch, length): 1 at tokens, 0 at padding on either side; None: no padding. ``labels``: -100
        outside the response. Columns: ``<direction>_direct``, ``<direction>_causal``, ``loss`` (nats), and
        ``gradient_norm`` where it was asked for. Index i speaks
        of token i as a PREDICTED token; 0.0 outside the response. Positive: learning the token moves the weights
        along the direction's descent (adaptation: lowers the validation loss; stability: back to the reference); with
        ``information`` adaptation has no sign.
        """
        device = self.scored.maps[0].parameter.device
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch, columns = _right_padded(input_ids.to(device), attention_mask.to(device), labels.to(device))
        found = self.value(batch)
        return {name: torch.zeros_like(v).scatter(1, columns, v) for name, v in found.items()}

    def value(self, batch: Batch, positions: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """As ``__call__`` for a right-padded batch.

        ``positions``: flat network positions to contract instead of those that predict a response token; their values
        stand at the following index.
        """
        if self.estimator != "ghost":
            return self._forward_mode(batch)
        predicting = batch.predicting()
        chosen = predicting if positions is None else positions
        contraction = Contraction(self.directions, self.values, chosen, batch.shape, self.gradient_norm)
        with swapped(self.scored, self.weights):
            losses = ghost_pass(self.scored, batch, contraction, self.attention, self.window)
            columns = {"loss": (predicting, losses)}
            for row, name in enumerate(self.directions.names):
                columns[f"{name}_direct"] = (chosen, contraction.direct[row])
                columns[f"{name}_causal"] = (chosen, contraction.causal[row])
            if contraction.squares is not None:
                columns["gradient_norm"] = (chosen, contraction.squares.sqrt())
            finite = torch.stack([torch.isfinite(values).all() for _, values in columns.values()])
            if not finite.all():  # one answer for the host to wait for
                raise locate(self.scored, batch, self.attention)
        return {name: _at_token(where, values, batch, contraction.dtype) for name, (where, values) in columns.items()}

    def _forward_mode(self, batch: Batch) -> dict[str, torch.Tensor]:
        predicting = batch.predicting()
        with swapped(self.scored, self.weights):
            losses, derivatives = exact_values(self.scored, batch, self.moving, self.attention, self.without_sign)
            if not (torch.isfinite(losses).all() & torch.isfinite(derivatives).all()):  # one answer to wait for
                raise locate(self.scored, batch, self.attention)
        columns = {"loss": losses}
        moved = dict(zip(self.moving, derivatives, strict=True))
        for name in self.named:
            columns[f"{name}_direct"] = moved.get(name, torch.zeros_like(losses))
            columns[f"{name}_causal"] = torch.zeros_like(losses)
        return {name: _at_token(predicting, values, batch, losses.dtype) for name, values in columns.items()}


def _at_token(positions: torch.Tensor, values: torch.Tensor, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Values computed at network positions p, stored at the tokens p + 1 that they predict: (batch, length)."""
    rows, length = batch.shape
    flat = torch.zeros(rows * length + 1, dtype=dtype, device=values.device)
    flat[positions + 1] = values.to(dtype)
    return flat[:-1].unflatten(0, (rows, length))


def _right_padded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[Batch, torch.Tensor]:
    """The same sequences padded on the right, and the column (batch, length) where each of its entries came from."""
    mask = attention_mask.bool()
    steps = (mask[:, 1:] != mask[:, :-1]).sum(dim=1)
    if not bool(mask.any(dim=1).all()) or bool((steps > 1 + (~mask[:, 0]).long()).any()):
        raise ValueError("attention_mask: the tokens of a sequence must stand together, with padding before or after")
    columns = torch.argsort((~mask).long(), dim=1, stable=True)
    kept = mask.gather(1, columns)
    ids = input_ids.gather(1, columns).masked_fill(~kept, 0)
    targets = labels.gather(1, columns).masked_fill(~kept, IGNORED)
    return Batch(ids, targets, mask.sum(dim=1)), columns
