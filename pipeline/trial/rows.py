"""Rows of a trial: a sample of the training rows with the labels that each mask leaves them, and the held-out rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import PREPARED
from alphatoken.pipeline.mask.layout import mask_part, open_part, require_shards
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.prepare.reader import prepared_rows, sequences_of
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.trial.candidates import Labels

LEAST_HELD_OUT = 2  # rows: one says nothing about any other


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``seen``: whether these rows have made the directions that masks come from."""

    rows: Sequences
    seen: bool


def drawn_rows(run: Run, count: int) -> dict[str, list[int]]:
    """``count`` training rows, or all there are, drawn with run.seed: part -> row numbers, ascending."""
    sizes = prepared_rows(run)
    total = sum(sizes.values())
    chosen = sorted(random.Random(f"{run.settings.run.seed} trial").sample(range(total), min(count, total)))
    found, start = {}, 0
    for part, size in sizes.items():
        own = [row - start for row in chosen if start <= row < start + size]
        start += size
        if own:
            found[part] = own
    return found


def sample_of(run: Run, places: dict[str, list[int]]) -> Sequences:
    """The prepared rows at ``places``."""
    found = Sequences([], [], [])
    for part, rows in places.items():
        some = sequences_of(run.storage.read_table(f"prepared/{part}", PREPARED).take(rows))
        found.ids.extend(some.ids)
        found.input_ids.extend(some.input_ids)
        found.labels.extend(some.labels)
    return found


def mask_labels(run: Run, mask: str, places: dict[str, list[int]], sample: Sequences) -> Labels:
    """The labels of a mask at ``places``; raises RunFailed for a mask of other rows, or one that keeps nothing of these."""
    require_shards(run.storage, mask)
    fingerprint, found = run.manifest.stage(f"mask/{mask}").get("fingerprint", ""), []
    for part, rows in places.items():
        name = mask_part(mask, part)
        if run.storage.rows_of(name, fingerprint) is None:
            raise RunFailed(f"{name} is missing, damaged or of other rows: make it anew with run.overwrite=mask")
        try:
            with open_part(run.storage, mask, part) as file:
                labels = file.read(columns=["labels"]).column("labels").take(rows)
        except (pa.ArrowException, OSError) as error:
            raise _other_rows(mask) from error
        found += [np.asarray(row.values, np.int32) for row in labels]
    for own, whole in zip(found, sample.labels, strict=True):
        theirs = np.asarray(whole, np.int32)
        if len(own) != len(theirs) or not np.isin(own[own != theirs], (IGNORED,)).all():
            raise _other_rows(mask)
    if all((row == IGNORED).all() for row in found):
        raise RunFailed(
            f"mask {mask} keeps no token of the {len(found)} rows that were drawn: set a larger trial.examples, or leave it out "
            "of trial.masks"
        )
    return found


def _other_rows(mask: str) -> RunFailed:
    return RunFailed(f"mask {mask} is not a mask of prepared/: make it anew with run.overwrite=mask")


def held_out_rows(run: Run) -> HeldOut:
    """Rows to measure on: those that were kept for a trial, else the validation rows, which made the directions.

    Raises RunFailed where there are too few.
    """
    kept = bool(run.manifest.stage("prepare")["counts"].get("trial_rows"))
    table = run.storage.read_table(f"prepared/{'trial' if kept else 'validation'}.parquet", PREPARED)
    rows = _labelled(sequences_of(table))
    if len(rows) < LEAST_HELD_OUT:
        raise RunFailed(
            f"trial needs at least {LEAST_HELD_OUT} held-out rows, and there is {len(rows)}: prepare a run with a larger "
            "data.validation, or with data.validation_trial"
        )
    return HeldOut(rows, seen=not kept and run.manifest.done("anchor"))


def _labelled(rows: Sequences) -> Sequences:
    """Those with a response token."""
    chosen = [i for i, labels in enumerate(rows.labels) if any(label != IGNORED for label in labels)]
    return rows.take(chosen)


def prompts_of(run: Run, held_out: Sequences, most: int) -> Sequences:
    """Rows whose prompts the reference answers: those of the Fisher, of which none was trained on; else the held-out ones."""
    table = run.storage.read_table("prepared/fisher.parquet", PREPARED)
    rows = _labelled(sequences_of(table)) if table.num_rows else held_out
    chosen: Sequence[int] = range(min(most, len(rows)))
    return rows.take(chosen)
