"""One model type: the engine's columns against the oracle's, and what that makes of the type."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.pipeline.maths.batch import IGNORED, Batch, collate
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel, scored_layers
from alphatoken.pipeline.maths.directions import Directions
from alphatoken.pipeline.maths.guard import Guard
from alphatoken.pipeline.maths.value_projection import value_projections
from alphatoken.pipeline.maths.valuer import ALL, TokenValuer, check_model
from benchmarks.models.double import Double
from benchmarks.models.eager import attention_of
from benchmarks.models.oracle import (
    DIRECTIONS,
    NotText,
    Scored,
    Wanted,
    causal,
    is_causal,
    padding_changes,
    runs_on_text,
    want,
)
from benchmarks.models.small import ModelType, NotSmall, build

LAYERS, WINDOW, KERNEL = 2, 6, "sdpa"
LENGTHS = (23, 14)
TOLERANCE = 1e-6

RIGHT, PARTLY, REFUSED, WRONG, RAW, NOT_SMALL = (
    "right", "right without the causal path", "refused", "WRONG", "raw exception", "not built small",
)  # fmt: skip
OUTCOMES = (RIGHT, PARTLY, REFUSED, WRONG, RAW, NOT_SMALL)


@dataclass(frozen=True, slots=True)
class Row:
    """What the survey says of one type: the outcome, its reason, the scored fraction, layers with a causal path, the
    largest error of a column relative to its largest value, and remarks."""

    title: str
    owner: str
    outcome: str
    reason: str = ""
    coverage: float | None = None
    causal: str = ""
    error: float | None = None
    notes: tuple[str, ...] = ()
    trace: str = ""


def survey(kind: ModelType) -> Row:
    """Build the type small and compare. Never raises."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    row = {"title": kind.title, "owner": kind.owner}
    try:
        with Double():
            return _survey(kind, row)
    except NotSmall as error:
        return Row(**row, outcome=NOT_SMALL, reason=str(error))
    except UnsupportedModel as error:
        return Row(**row, outcome=REFUSED, reason=str(error))
    except Exception as error:
        return Row(**row, outcome=RAW, reason=said(error), trace=traceback.format_exc())
    finally:
        torch.set_default_dtype(usual)


def said(error: BaseException) -> str:
    """An exception in one line, with the place that raised it and the engine's line that led there."""
    frames = [("/".join(f.filename.split("/")[-2:]), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    places = [f"{place}:{line}" for place, line in frames]
    engine = [spot for spot, (place, _) in zip(places, frames, strict=True) if place.startswith(("maths/", "scores/"))]
    led = f", from {engine[-1]}" if engine and engine[-1] != places[-1] else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({places[-1]}{led})"


def some_rows() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids and labels of sequences of unequal length; a gap in the labels of the first."""
    generator = torch.Generator().manual_seed(3)
    ids, labels = [], []
    for length in LENGTHS:
        tokens = torch.randint(3, 79, (length,), generator=generator)
        wanted = tokens.clone()
        wanted[: length // 3] = IGNORED
        if length == LENGTHS[0]:
            wanted[11:13] = IGNORED
        ids.append(tokens)
        labels.append(wanted)
    return ids, labels


def _survey(kind: ModelType, row: dict[str, str]) -> Row:
    model = build(kind)
    plain, untouched = copy.deepcopy(model), copy.deepcopy(model)  # some models keep states of their last pass
    ids, labels = some_rows()
    reason = None
    try:
        runs_on_text(plain, ids[0])
    except NotText as error:
        reason = f"does not run on text alone: {error}"
    scored = scored_layers(model, LAYERS)
    Guard(scored, KERNEL, WINDOW)([row.tolist() for row in ids])
    generator = torch.Generator().manual_seed(7)
    named = {
        d: {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in scored.weights().items()}
        for d in DIRECTIONS
    }
    batch = collate([i.tolist() for i in ids], [x.tolist() for x in labels])
    valuer, found, refusal = _valued(model, scored, Directions(named), batch)
    facts: dict[str, Any] = {**row, "coverage": scored.coverage.fraction}
    if reason is not None:
        return Row(**facts, outcome=WRONG, reason=f"valued, though the model {reason}")
    if not is_causal(plain, ids[0]):
        return Row(**facts, outcome=WRONG, reason="valued, though the model is not causal")
    what = described(scored)
    rows = [want(plain, what, named, i, x) for i, x in zip(ids, labels, strict=True)]
    notes = dict.fromkeys(note for one in rows for note in one.notes)
    errors = _errors(found, rows)
    everywhere = valuer.value(batch, positions=torch.arange(batch.input_ids.numel()))
    for d in DIRECTIONS:
        errors[f"sum of {d}_direct"] = _sum_error(everywhere[f"{d}_direct"], rows, d)
    values, layers = _value_rows(scored), valuer.causal_layers
    errors |= _causal_errors(untouched, found, rows, named, what, values, ids, labels, notes) if layers else {}
    facts |= {"causal": f"{layers} of {LAYERS}", "error": max(errors.values()), "notes": tuple(notes)}
    if rows[0].unused:
        names = f"{len(rows[0].unused)} of {len(what.modules)} scored weights"
        notes[f"{names} do not enter the loss ({rows[0].unused[0]})"] = None
        facts["notes"] = tuple(notes)
        if len(rows[0].unused) == len(what.modules):
            return Row(**facts, outcome=WRONG, reason="none of the scored weights enters the loss")
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong and (change := padding_changes(plain, ids[1])) > TOLERANCE:
        notes[f"padding on the right changes the model's own logits by {change:.1e}"] = None
        facts["notes"] = tuple(notes)
    if wrong:
        said_before = f" ({refusal})" if refusal else ""
        return Row(**facts, outcome=WRONG, reason=", ".join(f"{n} {e:.1e}" for n, e in wrong.items()) + said_before)
    if "information" not in found:
        return Row(**facts, outcome=REFUSED, reason=f"{refusal} (all other columns are right)")
    return Row(**facts, outcome=RIGHT if layers else PARTLY, reason=refusal)


def _valued(
    model: Any, scored: ScoredLayers, directions: Directions, batch: Batch
) -> tuple[TokenValuer, dict[str, torch.Tensor], str]:
    """The engine's columns, and why those along a tangent are not among them; "": they are."""
    scores, exact, refusal = ALL, True, ""
    try:
        check_model(scored, scores, WINDOW, KERNEL, exact)
    except UnsupportedModel as error:
        if "valuation.exact=false" not in str(error):
            raise
        scores, exact, refusal = tuple(s for s in scores if s != "information"), False, str(error)
        check_model(scored, scores, WINDOW, KERNEL, exact)
    valuer = TokenValuer(model, directions, LAYERS, WINDOW, KERNEL, scores, exact)
    return valuer, valuer.value(batch), refusal


def described(scored: ScoredLayers) -> Scored:
    """The names of what is scored, for the oracle."""
    names = {module: name for name, module in scored.model.named_modules()}
    return Scored(
        {m.name: names[m.module] for m in scored.maps},
        {m.name: m.transposed for m in scored.maps},
        {m.name: m.experts for m in scored.maps},
        tuple(names[layer] for layer in scored.layers),
    )


def _value_rows(scored: ScoredLayers) -> dict[str, tuple[torch.Tensor, str]]:
    """Parameter -> rows that are values and the attention's name, as the engine finds them by differentiation."""
    found, names = {}, {module: name for name, module in scored.model.named_modules()}
    for name, projection in value_projections(scored, KERNEL).items():
        parameter = projection.map.parameter
        width = parameter.shape[1] if projection.map.transposed else parameter.shape[0]
        found[name] = projection.of(torch.arange(width)), names[projection.attention]
    return found


def relative(error: torch.Tensor, scale: float) -> float:
    """The largest error relative to ``scale``; as it is where that is zero."""
    largest = float(error.abs().max())
    return largest / scale if scale > 0 else largest


def _errors(found: Mapping[str, torch.Tensor], rows: list[Wanted]) -> dict[str, float]:
    """Column -> largest error over the rows, relative to the column's largest value."""
    errors = {}
    for name in rows[0].columns:
        if name not in found or any(name not in row.columns for row in rows):
            continue
        scale = max(float(row.columns[name].abs().max()) for row in rows)
        parts = [found[name][i, : len(row.columns[name])] - row.columns[name] for i, row in enumerate(rows)]
        errors[name] = max(relative(part, scale) for part in parts)
    return errors


def _sum_error(everywhere: torch.Tensor, rows: list[Wanted], direction: str) -> float:
    """The direct column added up over all positions of a row, against the whole gradient's product."""
    flat, length = everywhere.flatten(), everywhere.shape[1]
    scale = max(abs(row.sums[direction]) for row in rows)
    worst = 0.0
    for i, row in enumerate(rows):
        first = i * length + 1  # the value of position p stands at p + 1
        total = flat[first : first + len(row.columns["loss"])].sum()
        worst = max(worst, relative(total - row.sums[direction], scale))
    return worst


def _causal_errors(
    plain: Any,
    found: Mapping[str, torch.Tensor],
    rows: list[Wanted],
    named: Mapping[str, Mapping[str, torch.Tensor]],
    what: Scored,
    values: Mapping[str, tuple[torch.Tensor, str]],
    ids: list[torch.Tensor],
    labels: list[torch.Tensor],
    notes: dict[str, None],
) -> dict[str, float]:
    wanted = []
    for one, i, x in zip(rows, ids, labels, strict=True):
        attention = attention_of(plain, what, i)
        reached = None if attention is None else causal(one, named, what, attention, values, WINDOW)
        if reached is None:
            notes["causal path not compared"] = None
            return {}
        at = torch.tensor([t for t in range(1, len(i)) if int(x[t]) >= 0])
        columns = {}
        for name, column in reached.items():
            columns[name] = torch.zeros(len(i))
            columns[name][at] = column[at - 1]
        wanted.append(Wanted(columns, {}, {}, {}, ()))
    return _errors(found, wanted)
