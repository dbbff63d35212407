"""Rows of a trial: a sample of the training rows with the labels that each mask leaves them, and the held-out rows.

Of preference pairs a row is two sequences: in all that follows the chosen branches of all rows come first, then the
rejected ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import BRANCHES, PREFERENCE_PREPARED, PREPARED
from alphatoken.pipeline.mask.layout import mask_part, open_part, require_shards
from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.prepare.held_out import PAIRS, TRIAL
from alphatoken.pipeline.prepare.reader import branches_of, prepared_rows, sequences_of
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.remedies import mask_again, mask_anew
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.trial.candidates import Labels

LEAST_HELD_OUT = 2  # rows: one says nothing about any other


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``rows``: sequences, of pairs both branches; ``count``: examples. ``seen``: whether they have made the directions that
    masks come from."""

    rows: Sequences
    count: int
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
    schema = PREFERENCE_PREPARED if run.manifest.pairs else PREPARED
    tables = [run.storage.read_table(f"prepared/{part}", schema).take(rows) for part, rows in places.items()]
    return _sequences(run, pa.concat_tables(tables) if tables else schema.empty_table())


def _sequences(run: Run, table: pa.Table) -> Sequences:
    return branches_of(table) if run.manifest.pairs else sequences_of(table)


def mask_labels(run: Run, mask: str, places: dict[str, list[int]], sample: Sequences) -> Labels:
    """The labels of a mask at ``places``; raises RunFailed for a mask of other rows, or one that keeps nothing of these."""
    require_shards(run.storage, mask)
    fingerprint = run.manifest.stage(f"mask/{mask}").get("fingerprint", "")
    names = [f"{branch}_labels" for branch in BRANCHES] if run.manifest.pairs else ["labels"]
    tables = []
    for part, rows in places.items():
        name = mask_part(mask, part)
        if run.storage.rows_of(name, fingerprint) is None:
            raise RunFailed(f"{name} is missing, damaged or of other rows: {mask_again(run.storage.place, mask)}")
        try:
            with open_part(run.storage, mask, part) as file:
                tables.append(file.read(columns=names).select(names).take(rows))
        except (pa.ArrowException, OSError, KeyError, IndexError) as error:
            raise _other_rows(run, mask) from error
    whole_mask = pa.concat_tables(tables)
    found = [np.asarray(row.values, np.int32) for column in names for row in whole_mask.column(column)]
    if len(found) != len(sample):
        raise _other_rows(run, mask)
    for own, whole in zip(found, sample.labels, strict=True):
        theirs = np.asarray(whole, np.int32)
        if len(own) != len(theirs) or not np.isin(own[own != theirs], (IGNORED,)).all():
            raise _other_rows(run, mask)
    if all((row == IGNORED).all() for row in found):
        raise RunFailed(
            f"mask {mask} keeps no token of the {whole_mask.num_rows} rows that were drawn: set a larger trial.examples, or leave it out "
            "of trial.masks"
        )
    return found


def _other_rows(run: Run, mask: str) -> RunFailed:
    return RunFailed(f"mask {mask} is not a mask of prepared/: {mask_anew(run.storage.place, mask)}")


def held_out_rows(run: Run) -> HeldOut:
    """Rows to measure on: those that were kept for a trial, else the validation rows, which made the directions.

    Raises RunFailed where there are too few.
    """
    counts, pairs = run.manifest.stage("prepare")["counts"], run.manifest.pairs
    kept = bool(counts.get(f"{TRIAL}_rows"))
    if pairs and not kept and not counts.get(f"{PAIRS}_rows"):
        raise RunFailed(
            "trial on preference pairs needs held-out pairs, and this run has kept none: prepare a run with "
            "data.validation_trial=half, or with data.validation_trial=FILE of pairs"
        )
    name = TRIAL if kept else PAIRS if pairs else "validation"
    schema = PREFERENCE_PREPARED if pairs else PREPARED
    rows = _sequences(run, run.storage.read_table(f"prepared/{name}.parquet", schema))
    rows = rows if pairs else labelled(rows)
    count = len(rows) // (2 if pairs else 1)
    if count < LEAST_HELD_OUT:
        raise RunFailed(
            f"trial needs at least {LEAST_HELD_OUT} held-out rows, and there is {count}: prepare a run with a larger "
            "data.validation, or with data.validation_trial"
        )
    return HeldOut(rows, count, seen=not kept and run.manifest.done("anchor"))


def labelled(rows: Sequences) -> Sequences:
    """Those with a response token."""
    chosen = [i for i, labels in enumerate(rows.labels) if any(label != IGNORED for label in labels)]
    return rows.take(chosen)


def prompts_of(run: Run, held_out: HeldOut, most: int) -> Sequences:
    """Rows whose prompts the reference answers: those of the Fisher, of which none was trained on; else the held-out ones."""
    table = run.storage.read_table("prepared/fisher.parquet", PREPARED)
    # Of held-out pairs the chosen branches, which come first: the prompt is the same.
    rows = labelled(sequences_of(table)) if table.num_rows else held_out.rows.take(range(held_out.count))
    return rows.take(range(min(most, len(rows))))
