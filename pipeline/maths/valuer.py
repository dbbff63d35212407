"""The token valuer: a batch of sequences in, one number per column and response token out.

This is the library's front door; it needs torch and transformers alone. A token's way from ``input_ids`` to its numbers
leads through three places: here its sequence becomes a row of a right-padded batch and the token t a network position
p = t - 1 (``value``, ``_at_token``); in ghost.py the batch goes forward and backward once, the softmax of every position
is shown to readings and every scored linear map's input h_p and output error d_p to visitors; in scores/ each column says
what it makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from alphatoken.data_schemas import SCORES as COLUMNS_OF
from alphatoken.pipeline.maths.attention import KERNELS
from alphatoken.pipeline.maths.batch import IGNORED, Batch
from alphatoken.pipeline.maths.capture import Captured, swapped
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, no_scored_layers, scored_layers
from alphatoken.pipeline.maths.directions import NAMES, Directions
from alphatoken.pipeline.maths.ghost import read_pass
from alphatoken.pipeline.maths.lower import lower_layers_once
from alphatoken.pipeline.maths.nonfinite import NonFinite, locate
from alphatoken.pipeline.maths.placement import device_of
from alphatoken.pipeline.maths.scores import SCORES, HeadScore, LayerScore
from alphatoken.pipeline.maths.scores.paper import Paper
from alphatoken.pipeline.maths.tangents import Tangents
from alphatoken.pipeline.maths.value_projection import layers_with

ALL = tuple(COLUMNS_OF)


def needs_directions(scores: Sequence[str]) -> bool:
    """Whether any of ``scores`` looks at the directions."""
    return any(_looks_along(score) for score in scores)


def looks_at_layers(scores: Sequence[str]) -> bool:
    """Whether any of ``scores`` looks at the scored layers, and not at the softmax alone."""
    return any(bool(s.along) if isinstance(s, HeadScore) else True for s in map(SCORES.__getitem__, scores))


class TokenValuer:
    """Values every response token along the given directions, all columns from one pass.

    ``model``: a causal language model of transformers, the policy. ``directions``: at the same point of the
    trajectory; where they bring their own scored weights, those are used inside each call; None where no score looks at
    them. ``layers`` K: the last K decoder layers are scored. ``window`` W: reach of the causal path in tokens; 0 leaves
    it out. ``attention``: sdpa | flash_attention_2 | eager. ``scores``: of paper | information | loss | entropy |
    gradient_norm; ``exact``: the columns adaptation_exact and stability_exact as well, one more pass of the scored layers
    where there is a drift. Raises ValueError when the directions are not for these layers or a score is unknown,
    UnsupportedModel when the model cannot be scored.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions | None,
        layers: int = 3,
        window: int = 32,
        attention: str = "sdpa",
        scores: Sequence[str] = ALL,
        exact: bool = False,
    ) -> None:
        if unknown := sorted(set(scores) - set(ALL)):
            raise ValueError(f"scores={unknown[0]}: must be among {', '.join(ALL)}")
        if attention not in KERNELS:
            raise ValueError(f"attention={attention}: must be one of {', '.join(KERNELS)}")
        names = [name for name in SCORES if name in scores] + ["exact"] * exact
        if directions is None and needs_directions(names):
            raise ValueError(f"scores={', '.join(names)} need directions: Directions.load('RUN/anchors/snapshot-00')")
        if directions is not None:
            for name in names:
                if missing := [d for d in _looks_along(name) if d not in directions.named]:
                    raise ValueError(f"there is no direction {missing[0]}, which scores={name} looks at")
        swaps = directions is not None and directions.weights is not None
        looks = swaps or looks_at_layers(names)
        self.scored = scored_layers(model, layers) if looks else no_scored_layers(model)
        weight = next(model.parameters())
        self.device, self.dtype = device_of(model), torch.promote_types(weight.dtype, torch.float32)
        self.weights: dict[str, torch.Tensor] | None = None
        if directions is not None and looks:
            directions.check(self.scored.weights())
            self.weights = dict(directions.weights) if directions.weights is not None else None
        self.window, self.attention = window if "paper" in names else 0, attention
        self.head = [score for score in map(SCORES.__getitem__, names) if isinstance(score, HeadScore)]
        looked_at = {direction for score in self.head for direction in score.along}
        self.along = _moving(self.scored, directions, looked_at) if directions is not None else {}
        given = next(iter(self.along), None)
        self.layers: list[LayerScore] = []
        columns: list[str] = []
        for score in map(SCORES.__getitem__, names):
            if isinstance(score, HeadScore):
                columns += score.readings
            else:
                self.layers.append(score(self.scored, directions, window, attention, given))
                columns += self.layers[-1].columns
        self.columns = tuple(columns)

    @property
    def causal_layers(self) -> int:
        """How many of the scored layers the causal path leads through; 0 where it is left out."""
        return sum(layers_with(score.values.values()) for score in self.layers if isinstance(score, Paper))

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Column name -> float32 tensor (batch, length); float64 for a float64 model.

        ``attention_mask`` (batch, length): 1 at tokens, 0 at padding on either side; None: no padding. ``labels``: -100
        outside the response. Columns: as in `values/`, see data_schemas/values.py for meaning, unit and sign. Index i
        speaks of token i as a PREDICTED token; 0.0 outside the response.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch, columns = _right_padded(*(t.to(self.device) for t in (input_ids, attention_mask, labels)))
        found = self.value(batch)
        return {name: torch.zeros_like(v).scatter(1, columns, v) for name, v in found.items()}

    def value(self, batch: Batch, positions: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """As ``__call__`` for a right-padded batch.

        ``positions``: flat network positions whose layer scores (paper, gradient_norm) are wanted instead of those that
        predict a response token; their values stand at the following index.
        """
        predicting = batch.predicting()
        chosen = predicting if positions is None else positions
        visitors = [score.visitor(chosen, batch.shape) for score in self.layers]

        def visit(captured: Captured) -> None:
            for visitor in visitors:
                visitor(captured)

        readings = {column: reading for score in self.head for column, reading in score.readings.items()}
        several = len(self.along) > 1
        with swapped(self.scored, self.weights), lower_layers_once(self.scored) if several else nullcontext():
            read = read_pass(
                self.scored,
                batch,
                list(readings.values()),
                visit if visitors else None,
                self.along,
                self.attention,
                self.window,
                chosen,
            )
            columns = {name: (predicting, values) for name, values in zip(readings, read, strict=True)}
            for score, visitor in zip(self.layers, visitors, strict=True):
                columns |= {name: (chosen, v) for name, v in zip(score.columns, visitor.found(), strict=True)}
            finite = torch.stack([torch.isfinite(values).all() for _, values in columns.values()])
            if not finite.all():  # one answer for the host to wait for
                where = torch.cat([places[~torch.isfinite(values)] for places, values in columns.values()])
                raise locate(self.scored, batch, self.attention, int(where[0]) // batch.shape[1])
        return {name: _at_token(*columns[name], batch, self.dtype) for name in self.columns}


def check_model(scored: ScoredLayers, scores: Sequence[str], window: int, attention: str, exact: bool = False) -> None:
    """Raise UnsupportedModel where these scores cannot be computed with this model.

    Values two tokens, along directions that mean nothing, so that a run ends before its Fisher and not after.
    """
    small = {m.name: torch.full_like(m.parameter, 2.0**-10) for m in scored.maps}
    some = Directions(dict.fromkeys(NAMES, small))
    valuer = TokenValuer(scored.model, some, len(scored.layers), window, attention, scores, exact)
    ids = torch.arange(2, device=scored.maps[0].parameter.device)[None]
    batch = Batch(ids, torch.where(ids > 0, ids, IGNORED), torch.full((1,), 2, device=ids.device))
    try:
        valuer.value(batch)
    except NonFinite:
        pass  # said where an example can be named
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:  # whatever an operation says that has no forward-mode derivative
        if not valuer.along:
            raise
        reason = str(error).partition("\n")[0]
        without = ",".join(score for score in scores if score != "information")
        raise UnsupportedModel(
            f"its scored layers cannot be differentiated in forward mode ({type(error).__name__}: {reason}): set "
            f"valuation.scores=[{without}]" + (" and valuation.exact=false" if exact else "")
        ) from error


def _looks_along(score: str) -> tuple[str, ...]:
    """The directions that a score looks at."""
    kind = SCORES[score]
    if isinstance(kind, HeadScore):
        return kind.along
    return NAMES if kind.directed else ()


def _moving(scored: ScoredLayers, directions: Directions, names: set[str]) -> dict[str, Tangents]:
    """The directions that are looked at, but for those that are zero everywhere: they would cost a pass for nothing."""
    found = {name: Tangents(scored, directions.named[name]) for name in NAMES if name in names}
    return {name: tangents for name, tangents in found.items() if not tangents.still}


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
