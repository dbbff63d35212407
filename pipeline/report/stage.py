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
import pyarrow.parquet as pq
from alphatoken.data_schemas import COMPONENTS, GRADIENT_NORM
from alphatoken.pipeline.mask.comparison import MaskPlace, branches_of, compare
from alphatoken.pipeline.mask.paired_rows import IGNORED
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.maths.masking import token_values
from alphatoken.pipeline.report.heat_map import HeatMap, heat_map
from alphatoken.pipeline.report.histogram import HEIGHT, WIDTH, Histogram
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.run import Run

PAGE = "report/index.html"
TEMPLATE = "report.html.jinja"
EXAMPLES = 4
LOSS_NATS = 12.0
ROWS_AT_ONCE = 256


def make_report(run: Run) -> str:
    """Write report/index.html and return its path; the mask shown in detail is mask.name, else the first there is.

    Of preference pairs, each branch has its own histograms and examples. Raises RunFailed before there is a mask.
    """
    storage, manifest = run.storage, run.manifest
    manifest.require("value", "report")
    done = [s.partition("/")[2] for s in manifest.content["stages"] if s.startswith("mask/") and manifest.done(s)]
    names = [name for name in done if storage.exists(f"masks/{name}/summary.json")]  # some may have been removed since
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
    summaries = {name: storage.read_json(f"masks/{name}/summary.json") for name in names}
    places = [MaskPlace(storage, name, branch) for name in names for branch in branches_of(storage)]
    compared = compare(MaskPlace(storage, shown), places)
    decode, trouble = _decoder(manifest)
    pictures = [_look(place, decode, run.progress) for place in places if place.name == shown]
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


def _warnings(manifest: Manifest, summaries: dict[str, Any]) -> list[str]:
    """Everything that a reader of the numbers should know, one sentence each."""
    found = []
    prepared = manifest.stage("prepare")["counts"]
    if prepared.get("quarantined"):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in prepared.get("reasons", {}).items())
        found.append(f"{prepared['quarantined']:,} rows could not be used and are in quarantine/ ({reasons}).")
    if prepared.get("truncated"):
        found.append(f"{prepared['truncated']:,} examples are longer than data.max_length and were cut from the right.")
    anchor = manifest.stage("anchor").get("counts", {})
    left_out = anchor.get("coverage", {}).get("left_out", [])
    if left_out:
        found.append(f"{len(left_out)} matrices of the scored layers are not scored: {', '.join(left_out)}.")
    if anchor.get("drift") == "none" and not is_rehearsed(manifest.stage("value")["inputs"]):
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
    from alphatoken.pipeline.maths.models import ModelSource, UnreadableModel, load_tokenizer

    model = manifest.content["configuration"].get("model", {})
    place = manifest.stage("prepare")["counts"]["tokenizer"]
    source = ModelSource(place, model.get("revision"), trust_remote_code=model.get("trust_remote_code", False))
    try:
        tokenizer = load_tokenizer(source)
    except UnreadableModel as error:
        return lambda token: f"[{token}]", [f"Tokens are shown as numbers: {error}."]
    return lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False)), []


def _look(place: MaskPlace, decode: Callable[[int], str], progress: Progress) -> _Picture:
    """One pass over prepared, values and one mask, some rows at a time."""
    summary, parts = place.summary, Manifest(place.storage).stage("prepare")["counts"]["parts"]
    histograms = {}
    for column in (*COMPONENTS, "value"):
        reach = 3 * summary["columns"][column]["rms"] or 1.0
        histograms[column] = Histogram(column.replace("_", " "), -reach, reach)
    histograms["loss"] = Histogram("loss, nats", 0.0, LOSS_NATS)
    picture = _Picture(place.branch, histograms, Histogram("kept fraction of an example's response", 0.0, 1.0, 20))
    total = summary["rows"]
    wanted = {index * total // EXAMPLES for index in range(EXAMPLES)}
    row = 0
    with progress.task(f"report {place.branch}".rstrip(), total, "rows") as task:
        for part in parts:
            for batch in _rows(place, part):
                for one in batch:
                    _add(picture, one, summary, decode if row in wanted else None)
                    row += 1
                task.advance(len(batch))
    return picture


@dataclass(frozen=True, slots=True)
class _Row:
    """One example over its tokens."""

    id: str
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    kept: npt.NDArray[np.bool_]
    columns: dict[str, npt.NDArray[np.float32]]


def _rows(place: MaskPlace, part: str) -> Iterator[list[_Row]]:
    names = (f"prepared/{part}", f"values/{part}", f"masks/{place.name}/{part.replace('part-', 'train-', 1)}")
    opened = [pq.ParquetFile(place.storage.path(name), filesystem=place.storage.fs) for name in names]
    own = f"{place.branch}_" if place.branch else ""
    shown = [name for name in (*COMPONENTS, "loss", GRADIENT_NORM) if own + name in opened[1].schema_arrow.names]
    wanted = (["id", f"{own}input_ids", f"{own}labels"], [own + column for column in shown], [f"{own}labels"])
    try:
        batches = [f.iter_batches(ROWS_AT_ONCE, columns=c) for f, c in zip(opened, wanted, strict=True)]
        for prepared, values, masked in zip(*batches, strict=True):
            rows = []
            for i in range(prepared.num_rows):
                ids, labels = (prepared.column(c)[i].values.to_numpy() for c in wanted[0][1:])
                columns = {c: values.column(own + c)[i].values.to_numpy(zero_copy_only=False) for c in shown}
                kept = masked.column(0)[i].values.to_numpy() != IGNORED
                rows.append(_Row(prepared.column("id")[i].as_py(), ids, labels, kept, columns))
            yield rows
    finally:
        for file in opened:
            file.close()


def _add(picture: _Picture, row: _Row, summary: dict[str, Any], decode: Callable[[int], str] | None) -> None:
    response = row.labels != IGNORED
    settings = summary["settings"]
    value = token_values(
        row.columns, settings["stability_weight"], summary["scales"], settings.get("loss_weight", 0.0),
        settings.get("divide_by_gradient_norm", False),
    )  # fmt: skip
    columns = {"value": value, **row.columns}
    for name, histogram in picture.histograms.items():
        histogram.add(columns[name][response], row.kept[response])
    if response.any():
        picture.fractions.add(np.array([row.kept[response].mean()]), np.array([True]))
    if decode is not None:
        scale = summary["columns"]["value"]["rms"]
        picture.examples.append(
            heat_map(row.id, row.input_ids.tolist(), row.labels.tolist(), row.kept, columns, scale, decode)
        )
