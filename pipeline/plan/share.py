"""Runs that are equal upstream share it: finished stages of one run directory appear in another, by fingerprint.

Files are hard links where both runs lie on one disk, else copies. Links are safe: no file of a run is ever changed in
place, a new one takes its name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from alphatoken.pipeline.anchor.inputs import anchor_inputs, drift_of, fisher_inputs
from alphatoken.pipeline.anchor.places import FISHER
from alphatoken.pipeline.anchor.tensors import read_metadata
from alphatoken.pipeline.prepare.inputs import open_data, prepare_inputs
from alphatoken.pipeline.run.fingerprint import digest
from alphatoken.pipeline.run.manifest import OUTPUTS, Manifest
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.value.inputs import value_inputs

UPSTREAM = ("prepare", "anchor", "value")


def stage_inputs(run: Run) -> dict[str, dict[str, Any]]:
    """What prepare, anchor and value, as far as they are run, would depend on; opens the data, loads no model.

    Raises SettingsWrong for data or a drift that cannot be used.
    """
    models, raw, settings = run.models, open_data(run.settings), run.settings
    prepare = prepare_inputs(run, raw)
    found: dict[str, dict[str, Any]] = {"prepare": prepare}
    if settings.valuation.needs_directions:
        found["anchor"] = anchor_inputs(settings, models, prepare, drift_of(settings, models))
    if raw.preference or settings.columns:
        anchor = digest(found["anchor"]) if "anchor" in found else None
        found["value"] = value_inputs(settings, models, digest(prepare), anchor, raw.preference)
    return found


def share_upstream(run: Run, donors: Sequence[Storage]) -> list[str]:
    """Take over every upstream stage that a donor has finished with equal inputs, and else its Fisher if that is equal.

    A stage that was begun here already is left alone. Returns what was taken, as ``"prepare from <place>"``. Raises as
    `stage_inputs`.
    """
    storage, manifest, inputs = run.storage, run.manifest, stage_inputs(run)
    taken: list[str] = []
    for donor in donors:
        other = Manifest(donor)
        for stage in inputs:
            if own := manifest.stage(stage):
                if own["fingerprint"] != digest(inputs[stage]):
                    return taken  # this command is going to be refused there, or to start anew from there
                continue
            if other.done(stage) and other.stage(stage)["fingerprint"] == digest(inputs[stage]):
                for directory in OUTPUTS[stage]:
                    _share(donor, storage, directory)
                manifest.adopt(stage, other.stage(stage))
                taken.append(f"{stage} from {donor.root}")
        if "anchor" not in inputs:
            continue
        fisher = digest(fisher_inputs(inputs["anchor"]))
        missing = not manifest.stage("anchor") and not storage.exists(FISHER)
        if missing and read_metadata(donor, FISHER).get("fingerprint") == fisher:
            _share(donor, storage, FISHER)
            taken.append(f"the Fisher from {donor.root}")
    return taken


def _share(source: Storage, target: Storage, name: str) -> None:
    """Make a file, or all files below a directory, of ``source`` appear in ``target``; hidden files are left out."""
    info = source.fs.get_file_info(source.path(name))
    if info.type == pafs.FileType.NotFound:
        return
    if info.type == pafs.FileType.Directory:
        for entry in source.fs.get_file_info(pafs.FileSelector(info.path)):
            if not entry.base_name.startswith("."):
                _share(source, target, f"{name}/{entry.base_name}")
        return
    if source.local and target.local:
        place = Path(target.path(name))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(source.path(name), place)
            return
        except OSError:  # another disk, or one without links
            pass
    target.write_bytes(name, source.read_bytes(name))
