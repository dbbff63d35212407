"""The survey as a page: counts, what they mean, and a row per model type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from benchmarks.models.compare import LAYERS, LENGTHS, OUTCOMES, TOLERANCE, WINDOW, Row

_HEAD = """# Models

Made by `python -m benchmarks.models --write docs/models.md`; regenerated, not edited.

Every causal and image-text model type of transformers {transformers} (torch {torch}), built small from its configuration
class with random weights, the last {layers} layers scored, window {window}. The engine values a right-padded batch of
{lengths} tokens in float64; the oracle is plain autograd on the untouched model, one unpadded sequence at a time: loss and
entropy by a plain forward, exact and information by a backward pass of a backward pass, direct and the gradient norm by
hooks on the model's own linear maps (and, for all types, the direct column added up over every position against the
gradient's product with the direction), the causal path by the attention probabilities of the model in eager attention.
From the engine the oracle takes the names of what is scored and the rows of the value projections, no number; the guard
of every run is asked first.
What models raise to float32 is computed in float64 on both sides, so that rounding hides nothing.

- **right**: every column within {tolerance:.0e} of the column's largest value.
- **right without the causal path**: so is every other column; the scored layers have no softmax attention whose value is
  one of their linear maps, and the engine says so.
- **refused**: the engine ends with the reason that is given.
- **WRONG**, **raw exception**: a fault of the engine.
- **not built small**: no fault of the engine; transformers asks for more than a configuration.

"coverage": matrix parameters of the scored layers that are scored. "causal": scored layers that the causal path goes
through. "error": the largest of a column, relative to the column's largest value.

"""


def counted(rows: Sequence[Row]) -> str:
    """One line: how many of which outcome."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    head = _HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        layers=LAYERS,
        window=WINDOW,
        lengths=", ".join(map(str, LENGTHS)),
        tolerance=TOLERANCE,
    )
    lines = [f"{len(rows)} types: {counted(rows)}.", "", "| type | class | outcome | coverage | causal | error |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [_line(row) for row in sorted(rows, key=lambda row: row.title)]
    return head + "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    said = "; ".join(part for part in (row.reason, *row.notes) if part)
    outcome = row.outcome + (f": {said}" if said else "")
    coverage = "" if row.coverage is None else f"{row.coverage:.1%}"
    error = "" if row.error is None else f"{row.error:.0e}"
    cells = (f"`{row.title}`", f"`{row.owner}`", outcome.replace("|", "\\|"), coverage, row.causal, error)
    return "| " + " | ".join(cells) + " |"
