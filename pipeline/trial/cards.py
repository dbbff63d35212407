"""Where the answer of a trial is left: a line in the winner's card, and for trial.auto the mask itself as masks/chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from alphatoken.pipeline.mask.card import card
from alphatoken.pipeline.mask.paired_rows import mask_part
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.trial.candidates import FIRST
from alphatoken.pipeline.trial.inputs import CHOSEN, masks_of


def note_winner(run: Run, summary: Mapping[str, Any]) -> None:
    """Write the sentence into the card of the mask that has won, and take it out of every other."""
    for name in masks_of(run):
        _write_card(run, name, summary["sentence"] if name == summary["winner"] else None)


def make_chosen(run: Run, summary: Mapping[str, Any]) -> str:
    """Make the winner once more as masks/chosen, from its settings; its labels are the same, its card says why.

    Where no mask beats it, that is everything, or everything but first tokens. Returns the name.
    """
    winner = summary["winner"]
    if run.storage.exists(f"masks/{winner}/summary.json"):
        recorded = run.storage.read_json(f"masks/{winner}/summary.json")["settings"]
        settings = MaskSettings(**{**recorded, "name": CHOSEN})
    else:
        settings = replace(MaskSettings(), score="full", skip_first=1 if winner == FIRST else 0, name=CHOSEN)
    run.manifest.forget(f"mask/{CHOSEN}")  # of an earlier trial
    run.storage.remove(f"masks/{CHOSEN}")
    make_mask(replace(run, settings=replace(run.settings, mask=settings)))
    _write_card(run, CHOSEN, summary["sentence"])
    return CHOSEN


def _write_card(run: Run, name: str, sentence: str | None) -> None:
    summary = run.storage.read_json(f"masks/{name}/summary.json")
    if sentence is not None:
        summary = {**summary, "trial": sentence}
    part = run.manifest.stage("prepare")["counts"]["parts"][0]
    with pq.ParquetFile(run.storage.path(f"masks/{name}/{mask_part(part)}"), filesystem=run.storage.fs) as file:
        schema = file.schema_arrow
    fingerprint = run.manifest.stage(f"mask/{name}")["fingerprint"]
    made = card(summary, schema, fingerprint).encode()
    if run.storage.read_bytes(f"masks/{name}/README.md") != made:
        run.storage.write_bytes(f"masks/{name}/README.md", made)
