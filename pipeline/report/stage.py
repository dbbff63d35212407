"""report: one self-contained HTML page about a run, from what the stages left. No model, no script, nothing loaded.

The page has no times in it: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from alphatoken.data_schemas import COMPONENTS, KEPT
from alphatoken.pipeline.mask.comparison import MaskPlace, branches_of, compare
from alphatoken.pipeline.mask.layout import is_finished, open_part, summary_of
from alphatoken.pipeline.mask.paired_rows import IGNORED, PairedParts, PairedRows
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.mask.valuing import Valuing
from alphatoken.pipeline.maths.masking import RANDOM, sums_by_row
from alphatoken.pipeline.report.dot_plot import dot_plot
from alphatoken.pipeline.report.heat_map import HeatMap, heat_map
from alphatoken.pipeline.report.histogram import HEIGHT, WIDTH, Histogram
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.trial.verdict import SEEN, SUMMARY

PAGE = "report/index.html"
TEMPLATE = "report.html.jinja"
EXAMPLES = 4
LOSS_NATS = 12.0
FRACTIONS = "kept fraction of an example's response"
ROWS_AT_ONCE = 256


def make_report(run: Run) -> str:
    """Write report/index.html and return its path; the mask shown in detail is mask.name, else the first there is.

    Of preference pairs, each branch has its own histograms and examples. Raises RunFailed before there is a mask.
    """
    storage, manifest = run.storage, run.manifest
    done = [s.partition("/")[2] for s in manifest.content["stages"] if s.startswith("mask/") and manifest.done(s)]
    names = [name for name in done if is_finished(storage, name)]  # some may have been removed since
    if not names:
        raise RunFailed(f"report needs a mask, and there is none in {storage.root}: run `alphatoken mask` first")
    shown = run.settings.mask.name if run.settings.mask.name in names else names[0]
    storage.write_bytes(PAGE, _page(run, names, shown).encode())
    run.progress.say(f"report: {storage.path(PAGE)}")
    return storage.path(PAGE)


@dataclass(slots=True)
class _Picture:
    """What one pass over the run finds, of pairs over one branch."""

    branch: str
    histograms: dict[str, Histogram]
    fractions: Histogram
    examples: list[HeatMap] = field(default_factory=list)


def _page(run: Run, names: list[str], shown: str) -> str:
    storage, manifest = run.storage, run.manifest
    summaries = {name: summary_of(storage, name) for name in names}
    places = [MaskPlace(storage, name, branch) for name in names for branch in branches_of(storage)]
    compared = compare(MaskPlace(storage, shown), places)
    decode, trouble = _decoder(manifest)
    trial = storage.read_json(SUMMARY) if manifest.done("trial") and storage.exists(SUMMARY) else None
    pictures = [_look(run, place, decode) for place in places if place.name == shown]
    stages = manifest.content["stages"]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        place=storage.root.rpartition("/")[2],
        shown=shown,
        summary=summaries[shown],
        compared=[(row, row.place.summary) for row in compared],
        components=COMPONENTS,
        pictures=pictures,
        trial=trial,
        learned=_learned(trial) if trial else "",
        plot=dot_plot(trial) if trial else None,
        seen=SEEN,
        width=WIDTH,
        height=HEIGHT,
        counts={stage: record["counts"] for stage, record in stages.items()},
        coverage=stages.get("anchor", {}).get("counts", {}).get("coverage"),
        warnings=[*_warnings(manifest, summaries), *trouble],
        settings={
            group: json.dumps(values, indent=2, ensure_ascii=False)
            for group, values in manifest.content["configuration"].items()
            if isinstance(values, dict) and group not in ("run", "cluster")  # where it ran is not what it is
        },
        versions=manifest.content["versions"],
        fingerprints={stage: record["fingerprint"] for stage, record in stages.items()},
    )


def _learned(trial: dict[str, Any]) -> str:
    """What the fine-tunes of a trial have changed."""
    own = trial["settings"]
    if own["train"] == "lora":
        return f"adapters of rank {own['rank']} on all layers"
    return "all weights" if own["train"] == "all" else f"the last {trial['layers']} layers"


def _warnings(manifest: Manifest, summaries: dict[str, Any]) -> list[str]:
    """Everything that a reader of the numbers should know, one sentence each."""
    found = []
    prepared = manifest.stage("prepare")["counts"]
    if prepared.get("quarantined"):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in prepared.get("reasons", {}).items())
        found.append(f"{prepared['quarantined']:,} rows could not be used and are in quarantine/ ({reasons}).")
    if prepared.get("truncated"):
        found.append(
            f"{prepared['truncated']:,} examples are longer than data.max_length, or than the model's positions, and were cut "
            "from the right."
        )
    anchor = manifest.stage("anchor").get("counts", {})
    left_out = anchor.get("coverage", {}).get("left_out", [])
    if left_out:
        found.append(f"{len(left_out)} matrices of the scored layers are not scored: {', '.join(left_out)}.")
    if anchor.get("drift") == "none" and not is_rehearsed(manifest.stage("value").get("inputs", {})):
        found.append("There is no drift, so that stability values are zero.")
    for name, summary in summaries.items():
        for branch, own in summary.get("branches", {"": summary}).items():
            if own["rows_with_nothing_kept"]:
                of = f" ({branch})" if branch else ""
                found.append(f"Mask {name}{of}: {own['rows_with_nothing_kept']:,} examples have no kept token.")
        found += [f"Mask {name}: {note}." for note in summary["notes"]]
    return found


def _decoder(manifest: Manifest) -> tuple[Callable[[int], str], list[str]]:
    """Token id -> text by the run's tokenizer; ids, and a warning, where that cannot be read any more."""
    from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_tokenizer

    model = manifest.content["configuration"].get("model", {})
    place = manifest.stage("prepare")["counts"]["tokenizer"]
    source = ModelSource(place, model.get("revision"), trust_remote_code=model.get("trust_remote_code", False))
    try:
        tokenizer = load_tokenizer(source)
    except UnreadableModel as error:
        return lambda token: f"[{token}]", [f"Tokens are shown as numbers: {error}."]
    return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False)), []


def _look(run: Run, place: MaskPlace, decode: Callable[[int], str]) -> _Picture:
    """One pass over prepared, values and one mask, some rows at a time."""
    summary, inputs = place.summary, run.manifest.stage("value").get("inputs", {})
    columns = [name for name in summary["columns"] if name != "value"]
    drawn = [RANDOM] if summary["score"] == "random" else []  # the values themselves, and no column
    there = [*inputs["columns"], *([KEPT] if is_rehearsed(inputs) else [])] if columns else []
    seed = run.manifest.stage(f"mask/{place.name}")["inputs"].get("run.seed", 0)
    parts = PairedParts(run, ROWS_AT_ONCE, there, seed, place.branch)
    valuing = Valuing(MaskSettings(**summary["settings"]), summary["scales"])
    picture = _Picture(place.branch, _histograms(summary, columns), Histogram(FRACTIONS, 0.0, 1.0, 20))
    total, row = summary["rows"], 0
    wanted = {index * total // EXAMPLES for index in range(EXAMPLES)}
    with run.progress.task(f"report {place.branch}".rstrip(), total, "rows") as task:
        for part in parts.rows:
            masked = _kept(place, part)
            for rows, kept in zip(parts.part(part, [*columns, *drawn], with_input_ids=True), masked, strict=True):
                shown = {"value": valuing.values(rows), **{name: rows.components[name] for name in columns}}
                _count(picture, rows, shown, kept)
                for index in sorted(wanted & set(range(row, row + len(rows)))):
                    picture.examples.append(_example(rows, shown, kept, index - row, summary, decode))
                row += len(rows)
                task.advance(len(rows))
    return picture


def _histograms(summary: dict[str, Any], columns: list[str]) -> dict[str, Histogram]:
    """Of the values and of every column; where it has no sign, from 0 on."""
    found = {}
    for name in ("value", *columns):
        own = summary["columns"][name]
        reach = 3 * own["rms"] or 1.0
        low = 0.0 if own["min"] >= 0 and own["max"] > 0 else -reach
        found[name] = Histogram(name.replace("_", " "), low, reach)
    if "loss" in found:
        found["loss"] = Histogram("loss, nats", 0.0, LOSS_NATS)
    return found


def _kept(place: MaskPlace, part: str) -> Iterator[npt.NDArray[np.bool_]]:
    """Which tokens a mask keeps, ``(tokens,)``, ROWS_AT_ONCE rows at a time."""
    column = f"{place.branch}_labels" if place.branch else "labels"
    with open_part(place.storage, place.name, part) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
            yield batch.column(0).flatten().to_numpy() != IGNORED


def _count(
    picture: _Picture, rows: PairedRows, shown: dict[str, npt.NDArray[Any]], kept: npt.NDArray[np.bool_]
) -> None:
    inside = kept[rows.response]
    for name, histogram in picture.histograms.items():
        histogram.add(shown[name], inside)
    sizes = np.diff(rows.offsets)
    fractions = sums_by_row(inside, rows.offsets)[sizes > 0] / sizes[sizes > 0]
    picture.fractions.add(fractions, np.ones(len(fractions), np.bool_))


def _example(
    rows: PairedRows,
    shown: dict[str, npt.NDArray[Any]],
    kept: npt.NDArray[np.bool_],
    index: int,
    summary: dict[str, Any],
    decode: Callable[[int], str],
) -> HeatMap:
    start, stop = rows.token_offsets()[index : index + 2]
    assert rows.input_ids is not None
    columns = {}
    for name, values in shown.items():
        full = np.zeros(len(rows.response), values.dtype)
        full[rows.response] = values
        columns[name] = full[start:stop]
    ids, labels = (column[index].values.to_pylist() for column in (rows.input_ids, rows.labels))
    scale = summary["columns"]["value"]["rms"]
    return heat_map(rows.ids[index].as_py(), ids, labels, kept[start:stop], columns, scale, decode)
