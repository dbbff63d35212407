"""Where the answer of a trial is left: a line in the winner's card, and for trial.auto the mask itself as masks/chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alphatoken.pipeline.mask.card import card
from alphatoken.pipeline.mask.layout import has_shards, is_finished, mask_card, mask_place, open_part, summary_of
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.trial.candidates import FIRST
from alphatoken.pipeline.trial.inputs import CHOSEN, masks_of


def note_winner(run: Run, summary: Mapping[str, Any]) -> None:
    """Write the sentence into the card of the mask that has won, and take it out of every other."""
    for name in (one for one in masks_of(run) if has_shards(run.storage, one)):
        _write_card(run, name, summary["sentence"] if name == summary["winner"] else None)


def make_chosen(run: Run, summary: Mapping[str, Any]) -> str:
    """Make the winner once more as masks/chosen, from its settings; its labels are the same, its card says why.

    Where no mask beats it, that is everything, or everything but first tokens. Returns the name.
    """
    winner = summary["winner"]
    if is_finished(run.storage, winner):
        recorded = summary_of(run.storage, winner)["settings"]
        settings = MaskSettings(**{**recorded, "name": CHOSEN})
    else:
        settings = replace(MaskSettings(), score="full", skip_first=1 if winner == FIRST else 0, name=CHOSEN)
    run.manifest.forget(f"mask/{CHOSEN}")  # of an earlier trial
    run.storage.remove(mask_place(CHOSEN))
    make_mask(replace(run, settings=replace(run.settings, mask=settings)))
    _write_card(run, CHOSEN, summary["sentence"])
    return CHOSEN


def _write_card(run: Run, name: str, sentence: str | None) -> None:
    summary = summary_of(run.storage, name)
    if sentence is not None:
        summary = {**summary, "trial": sentence}
    part = run.manifest.stage("prepare")["counts"]["parts"][0]
    with open_part(run.storage, name, part) as file:
        schema = file.schema_arrow
    fingerprint = run.manifest.stage(f"mask/{name}")["fingerprint"]
    made = card(summary, schema, fingerprint).encode()
    if run.storage.read_bytes(mask_card(name)) != made:
        run.storage.write_bytes(mask_card(name), made)
