"""report/index.html: one pass over prepared rows, values and masks, some rows at a time; no model.

The page has no times in it: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken.data_schemas import COMPONENTS
from alphatoken.pipeline.mask.comparison import contributions
from alphatoken.pipeline.mask.layout import summary_of
from alphatoken.pipeline.report.affected import Affected
from alphatoken.pipeline.report.charts import charts_json, label, masks_json, scores_json
from alphatoken.pipeline.report.choice import Chosen
from alphatoken.pipeline.report.content import Window
from alphatoken.pipeline.report.dot_plot import dot_plot
from alphatoken.pipeline.report.page import Page
from alphatoken.pipeline.report.payload import RowPayload, as_script
from alphatoken.pipeline.report.reading import Batch, Reading
from alphatoken.pipeline.report.remarks import remarks
from alphatoken.pipeline.report.sample import Sample, take_samples
from alphatoken.pipeline.report.shown_masks import MOST, ShownMask, finished, shown_masks
from alphatoken.pipeline.report.tally import Tally, kept_by_row
from alphatoken.pipeline.report.texts import Texts
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.trial.verdict import SEEN, SUMMARY

PAGE = "report/index.html"
LIMIT = 9_000_000  # bytes of the page; rows are left out, and counted, where it would be longer
WINDOW = Window(before=60, after=400)  # tokens of a row that are shown
LONGEST_SETTINGS = 20_000  # characters of a group of settings


def make_report(run: Run) -> str:
    """Write report/index.html and return its path; the mask shown first is mask.name, else the first there is.

    Raises RunFailed before there is a mask, and for parts that do not belong together.
    """
    names = finished(run)
    first = run.settings.mask.name if run.settings.mask.name in names else names[0]
    masks = shown_masks(run, [first, *(name for name in names if name != first)])
    found = _look(run, Reading(run, masks[:MOST]))
    texts = Texts.of(run.manifest)
    page = Page(_facts(run, masks, found, texts))
    run.storage.write_bytes(PAGE, page.render(_data(run, masks, found, texts, page)).encode())
    run.progress.say(f"report: {run.storage.shown(PAGE)}")
    return run.storage.path(PAGE)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one pass over the run finds; ``samples``, ``tallies``: by branch."""

    reading: Reading
    samples: dict[str, Sample]
    tallies: dict[str, Tally]
    chosen: Chosen


def _look(run: Run, reading: Reading) -> _Found:
    samples = take_samples(reading)
    tallies = {branch: Tally(sample, len(reading.masks)) for branch, sample in samples.items()}
    affected = Affected(reading.masks)
    chosen = Chosen(affected.choices, WINDOW)
    with run.progress.task("report", reading.total, "rows") as task:
        for batch in reading.all():
            files, of = _files(batch)
            kept = [kept_by_row(one) for one in batch.branches]
            for tally, one, own in zip(tallies.values(), batch.branches, kept, strict=True):
                tally.add(one, own, files, of)
            affected.offer(batch, np.sum(kept, axis=0))
            chosen.take(batch)
            task.advance(len(batch))
    return _Found(reading, samples, tallies, chosen)


def _files(batch: Batch) -> tuple[list[str], np.ndarray]:
    """The files that rows come from, and the place of each row's among them."""
    files = pc.replace_substring_regex(batch.sources, r":\d+$", "")
    encoded = pa.chunked_array(files).combine_chunks().dictionary_encode() if len(batch) else None
    return (encoded.dictionary.to_pylist(), encoded.indices.to_numpy()) if encoded else ([], np.zeros(0, np.int64))


def _data(run: Run, masks: Sequence[ShownMask], found: _Found, texts: Texts, page: Page) -> dict[str, Any]:
    """For the page's script: rows in turn, as many as fit."""
    reading, choices = found.reading, found.chosen.choices
    data: dict[str, Any] = {
        "total": reading.total,
        "branches": list(reading.branches),
        "masks": masks_json(reading.masks),
        "scores": scores_json(reading.scores, found.samples),
        "charts": [charts_json(tally, found.samples[b], texts) for b, tally in found.tallies.items()],
        "choices": [],
        "rows": [],
        "tokens": {},
    }
    left = LIMIT - len(page.render(data)) - 300 * len(choices)
    payload, known = RowPayload(reading.scores, texts), set[int]()
    why: dict[int, list[int]] = {}
    for number, choice in enumerate(choices):
        for row in choice.rows.tolist():
            why.setdefault(row, []).append(number)
    for number in found.chosen.in_turn():
        row = payload.row(found.chosen.contents[number], why[number])
        new = {str(token): text for token, text in payload.texts_of([row]).items() if token not in known}
        left -= len(as_script(row)) + len(as_script(new))
        if left < 0:
            break
        known.update(int(token) for token in new)
        data["rows"].append(row)
        data["tokens"].update(new)
    for number, choice in enumerate(choices):
        here = sum(number in row["why"] for row in data["rows"])
        data["choices"].append(
            {"kind": choice.kind, "mask": choice.mask, "title": choice.title, "of": choice.eligible, "here": here}
        )
    return data


def _facts(run: Run, masks: Sequence[ShownMask], found: _Found, texts: Texts) -> dict[str, Any]:
    """What stands in the page without its script."""
    storage, manifest, stages = run.storage, run.manifest, run.manifest.content["stages"]
    trial = storage.read_json(SUMMARY) if manifest.done("trial") and storage.exists(SUMMARY) else None
    said = remarks(manifest, masks)
    summary = summary_of(storage, masks[0].name)
    shown = found.reading.masks
    return {
        "place": storage.root.rpartition("/")[2],
        "shown": masks[0].name,
        "summary": summary,
        "pairs": manifest.pairs,
        "masks": [_line(mask, branch, found, shown) for mask in masks for branch in mask.summaries],
        "left_out": [mask.name for mask in masks[MOST:]],
        "components": [(name, label(name)) for name in COMPONENTS],
        "trial": trial,
        "learned": _learned(trial) if trial else "",
        "plot": dot_plot(trial) if trial else None,
        "seen": SEEN,
        "coverage": stages.get("anchor", {}).get("counts", {}).get("coverage"),
        "warnings": [*said.warnings, *([texts.trouble] if texts.trouble else [])],
        "notes": said.notes,
        "settings": {
            group: _clipped(json.dumps(values, indent=2, ensure_ascii=False))
            for group, values in manifest.content["configuration"].items()
            if isinstance(values, dict) and group not in ("run", "cluster", "mask")  # where it ran is not what it is
        },
        "mask_settings": json.dumps(masks[0].settings, indent=2, ensure_ascii=False),
        "versions": manifest.content["versions"],
        "fingerprints": {stage: record["fingerprint"] for stage, record in stages.items()},
    }


def _learned(trial: dict[str, Any]) -> str:
    """What the fine-tunes of a trial have changed."""
    own = trial["settings"]
    if own["train"] == "lora":
        return f"adapters of rank {own['rank']} on all layers"
    return "all weights" if own["train"] == "all" else f"the last {trial['layers']} layers"


def _line(mask: ShownMask, branch: str, found: _Found, shown: Sequence[ShownMask]) -> dict[str, Any]:
    """One line of the table of masks. ``agreement``: with the first mask, None where it is not counted."""
    summary, number = mask.summaries[branch], next((i for i, one in enumerate(shown) if one is mask), None)
    agreement = None if number is None else float(found.tallies[branch].agreement()[0, number])
    return {
        "name": mask.name,
        "branch": branch,
        "number": number,
        "place": list(mask.summaries).index(branch),
        "kept": summary["kept_fraction"],
        "only": summary["rows_with_only_always_kept"],
        "empty": summary["rows_with_nothing_kept"],
        "changed": summary["decisions_changed_by_stability"],
        "agreement": agreement,
        "parts": contributions(summary),
        "threshold": summary["threshold"],
        "grouped": summary["thresholds"] is not None,
    }


def _clipped(text: str) -> str:
    if len(text) <= LONGEST_SETTINGS:
        return text
    return f"{text[:LONGEST_SETTINGS]}\n… {len(text) - LONGEST_SETTINGS:,} more characters: see run.json"
