"""What a reader of the numbers should know: warnings, where something may be wrong, and notes; each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphatoken.pipeline.mask.inputs import PLAIN_ALIGNMENT
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.mask.remarks import WARNED, each_once, mask_label
from alphatoken.pipeline.report.shown_masks import ShownMask
from alphatoken.pipeline.run.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Remarks:
    """One sentence each."""

    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def remarks(manifest: Manifest, masks: Sequence[ShownMask]) -> Remarks:
    """Of the data, of the directions, and of every mask; what several masks share is said once, with their names."""
    warnings, notes = _of_the_data(manifest), []
    anchor = manifest.stage("anchor").get("counts", {})
    if left_out := anchor.get("coverage", {}).get("left_out", []):
        warnings.append(f"{len(left_out)} matrices of the scored layers are not scored: {', '.join(left_out)}.")
    if anchor.get("drift") == "none" and not is_rehearsed(manifest.stage("value").get("inputs", {})):
        notes.append("There is no drift, so that stability values are zero.")
    noted = []
    for mask in masks:
        for branch, summary in mask.summaries.items():
            own = summary["notes"]
            if empty := summary["rows_with_nothing_kept"]:
                own = [f"{empty:,} examples have no kept token", *own]
            noted += [(mask_label(mask.name, branch), note) for note in own]
    for remark in each_once(noted):
        text = remark.first.removeprefix(WARNED)
        warned = text != remark.first or text == PLAIN_ALIGNMENT or text[0].isdigit()
        sentence = f"{remark.masks[0].upper()}{remark.masks[1:]}: {remark.text.removeprefix(WARNED)}."
        (warnings if warned else notes).append(sentence)
    return Remarks(tuple(warnings), tuple(notes))


def _of_the_data(manifest: Manifest) -> list[str]:
    found, prepared = [], manifest.stage("prepare")["counts"]
    if prepared.get("quarantined"):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in prepared.get("reasons", {}).items())
        found.append(f"{prepared['quarantined']:,} rows could not be used and are in quarantine/ ({reasons}).")
    if prepared.get("windows"):
        left_out = prepared.get("windows_left_out", 0)
        more = f", {left_out:,} more have no response token and were left out" if left_out else ""
        found.append(
            f"{prepared['split_rows']:,} rows are longer than data.max_length, or than the model's positions, and were split into "
            f"{prepared['windows']:,} windows{more}."
        )
    if prepared.get("truncated"):
        found.append(
            f"{prepared['truncated']:,} examples are longer than data.max_length, or than the model's positions, and were "
            "cut from the right."
        )
    return found
