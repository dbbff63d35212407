"""What a reader of the numbers should know: warnings, where something may be wrong, and notes; each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphatoken.pipeline.mask.inputs import PLAIN_ALIGNMENT
from alphatoken.pipeline.mask.rehearsed import is_rehearsed
from alphatoken.pipeline.report.shown_masks import ShownMask
from alphatoken.pipeline.run.manifest import Manifest

WARNED = "WARNING: "  # how notes of a mask begin that are one


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
    names: dict[str, list[str]] = {}
    for mask in masks:
        for branch, summary in mask.summaries.items():
            of = f"{mask.name} ({branch})" if branch else mask.name
            if empty := summary["rows_with_nothing_kept"]:
                names.setdefault(f"{empty:,} examples have no kept token", []).append(of)
            for note in summary["notes"]:
                names.setdefault(note, []).append(of)
    for note, of_masks in names.items():
        warned, text = note.startswith(WARNED), note.removeprefix(WARNED)
        sentence = f"{'Mask' if len(of_masks) == 1 else 'Masks'} {', '.join(of_masks)}: {text}."
        (warnings if warned or text == PLAIN_ALIGNMENT or text[0].isdigit() else notes).append(sentence)
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
