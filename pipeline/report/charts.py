"""The counts of a run as the page's script draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alphatoken.data_schemas import COMPONENTS, SIGNED
from alphatoken.pipeline.mask.comparison import contributions
from alphatoken.pipeline.report.payload import clipped, rounded
from alphatoken.pipeline.report.sample import Sample
from alphatoken.pipeline.report.shown_masks import ShownMask
from alphatoken.pipeline.report.tally import POSITIONS, Counts, Tally
from alphatoken.pipeline.report.texts import Texts, in_a_line

STRINGS, SOURCES = 15, 20  # shown
SEVERAL = 5  # a token that occurs fewer times is not among the strings most kept or most dropped
# What the page says of a score beside its name.
ABOUT = {
    "information": "how much a step along the validation gradient moves the prediction; at least 0",
    "loss": "cross-entropy of the token under the policy, nats",
    "entropy": "entropy of the prediction before the token, nats",
    "gradient_norm": "size of the gradient of the position that predicts the token",
    "reference_loss": "cross-entropy under the reference, nats",
    **dict.fromkeys(COMPONENTS[:2], "above 0: learning the token lowers the validation loss"),
    **dict.fromkeys(COMPONENTS[2:], "above 0: learning the token moves the weights back toward the reference"),
    "adaptation_exact": "of the token's own loss; above 0: learning it lowers the validation loss",
    "stability_exact": "of the token's own loss; above 0: learning it moves the weights back toward the reference",
}


def scores_json(names: Sequence[str], samples: dict[str, Sample]) -> list[dict[str, Any]]:
    """One entry per score: name, label, what it says, whether it has a sign, and per branch its quantiles."""
    found = []
    for name in names:
        quantiles = [rounded(sample.quantiles(name)) for sample in samples.values()]
        signed = name in SIGNED or any(own[0] < 0 for own in quantiles)
        about = ABOUT.get(name, "what the mask compares with its threshold")
        found.append({"name": name, "label": label(name), "about": about, "signed": signed, "q": quantiles})
    return found


def masks_json(masks: Sequence[ShownMask]) -> list[dict[str, Any]]:
    """One entry per mask, with its own settings and per branch what its summary says."""
    return [
        {
            "name": mask.name,
            "score": mask.score,
            "settings": mask.settings,
            "always": mask.always.tolist(),
            "branches": [
                {
                    "kept": one["kept_fraction"],
                    "threshold": one["threshold"],
                    "thresholds": one["thresholds"],
                    "only": one["rows_with_only_always_kept"],
                    "empty": one["rows_with_nothing_kept"],
                    "parts": contributions(one),
                }
                for one in mask.summaries.values()
            ],
        }
        for mask in masks
    ]


def charts_json(tally: Tally, sample: Sample, texts: Texts) -> dict[str, Any]:
    """Everything that was counted over one branch."""
    return {
        "histograms": {
            name: {"edges": rounded(axis.edges()), "log": axis.logarithmic, **_counts(tally.histogram(name))}
            for name, axis in tally.axes.items()
        },
        "flat": [label(name) for name in sample.scores if name not in tally.axes],
        "positions": _without_empty(_ranges(POSITIONS), tally.positions()),
        "deciles": _without_empty(_losses(tally), tally.deciles()) if len(tally.borders) else None,
        "sources": _sources(tally),
        "strings": [_strings(tally.ids(), mask, texts) for mask in range(tally.masks)],
        "correlations": [[label(a), label(b), round(r, 3)] for (a, b), r in sample.correlations().items()],
        "sampled": sample.tokens,
        "whole": sample.whole,
        "agreement": [rounded(row) for row in tally.agreement()],
    }


def label(name: str) -> str:
    """A score for people."""
    return name if name.startswith("value of ") else name.replace("_", " ")


def _counts(counts: Counts) -> dict[str, Any]:
    return {"count": counts.count.tolist(), "kept": counts.kept.tolist()}


def _without_empty(names: Sequence[str], counts: Counts) -> dict[str, Any]:
    there = counts.count > 0
    return {
        "names": [name for name, one in zip(names, there, strict=True) if one],
        **_counts(Counts(counts.count[there], counts.kept[:, there])),
    }


def _ranges(starts: Sequence[int]) -> list[str]:
    ends = [*(start - 1 for start in starts[1:]), None]
    return [
        str(start) if end == start else f"{start:,}–{end:,}" if end else f"{start:,} on"
        for start, end in zip(starts, ends, strict=True)
    ]


def _losses(tally: Tally) -> list[str]:
    borders = [f"{border:.3g}" for border in tally.borders.tolist()]
    return [
        f"below {borders[0]}",
        *(f"{a}–{b}" for a, b in zip(borders, borders[1:], strict=False)),
        f"{borders[-1]} on",
    ]


def _sources(tally: Tally) -> dict[str, Any]:
    """The files with most tokens by themselves, the others together."""
    ordered = sorted(tally.sources().items(), key=lambda one: (-int(one[1][0]), one[0]))
    names = [clipped(name.rpartition("/")[2] or name) for name, _ in ordered[:SOURCES]]
    rows = [counts for _, counts in ordered[:SOURCES]]
    rest = sum((counts for _, counts in ordered[SOURCES:]), tally.other_sources)
    if rest[0]:
        more = "more than " if tally.other_sources[0] else ""
        names.append(f"{more}{max(1, len(ordered) - SOURCES):,} other files")
        rows.append(rest)
    table = np.array(rows, np.int64).reshape(len(rows), tally.masks + 1)
    return {"names": names, "count": table[:, 0].tolist(), "kept": table[:, 1:].T.tolist()}


def _strings(counts: Counts, mask: int, texts: Texts) -> dict[str, Any]:
    """Tokens kept most above, and most below, what the mask keeps of all tokens: by how many occurrences."""
    kept, total = counts.kept[mask], counts.count
    share = kept.sum() / max(1, total.sum())
    above = np.where(total >= SEVERAL, kept - share * total, 0.0)
    order = np.argsort(-above, kind="stable")

    def rows(ids: np.ndarray) -> list[list[Any]]:
        return [[in_a_line(texts.one(int(i))).replace(" ", "␣"), int(total[i]), int(kept[i])] for i in ids]

    most, least = order[:STRINGS], order[::-1][:STRINGS]
    return {"most": rows(most[above[most] > 0]), "least": rows(least[above[least] < 0])}
