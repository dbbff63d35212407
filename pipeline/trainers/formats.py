"""Which shapes a mask can be exported to, and the one function that does it.

A format is a function from a batch of the mask's rows to columns, and a writer that streams them. What is written stands
under its final name only when it is whole and its counts are those of the mask.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from alphatoken.data_schemas import LOSS_WEIGHT
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.remedies import mask_anew
from alphatoken.pipeline.trainers.columns import count_kept, lengths, loss_mask, shifted
from alphatoken.pipeline.trainers.hf_disk import write_hf
from alphatoken.pipeline.trainers.numpy_arrays import write_olmo
from alphatoken.pipeline.trainers.source import MaskSource
from alphatoken.pipeline.trainers.tables import write_jsonl, write_parquet
from alphatoken.pipeline.trainers.written import Shard

Columns = Callable[[pa.RecordBatch, MaskSource], pa.Table]
Writer = Callable[[Iterator[Shard], MaskSource, Path], None]


@dataclass(frozen=True, slots=True)
class Format:
    """``text``: one line for help. ``reading``: what to type in the trainer, ``{out}`` stands for the path."""

    text: str
    columns: Columns
    write: Writer
    reading: str
    pairs: bool = True
    weights: bool = False  # whether soft weights find a place in it


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export holds. ``kept``: tokens in the loss."""

    rows: int
    tokens: int
    kept: int


def _hf(batch: pa.RecordBatch, source: MaskSource) -> pa.Table:
    named = {name: batch.column(name) for name in source.token_columns}
    sizes = [lengths(batch.column(f"{prefix}input_ids")) for prefix in source.prefixes]
    if not source.pairs:
        return pa.table({**named, "lengths": sizes[0]})
    both = [list(pair) for pair in zip(*(size.to_pylist() for size in sizes), strict=True)]
    # Collators of pairs ask for the three of other modalities.
    empty = {name: pa.nulls(len(both), pa.list_(pa.string())) for name in ("images", "videos", "audios")}
    return pa.table({**named, "lengths": pa.array(both, pa.list_(pa.int32())), **empty})


def _jsonl(batch: pa.RecordBatch, source: MaskSource) -> pa.Table:
    made: dict[str, pa.Array] = {}
    for prefix in source.prefixes:
        ids = batch.column(f"{prefix}input_ids")
        made |= {f"{prefix}input_ids": ids, f"{prefix}labels": batch.column(f"{prefix}labels")}
        made[f"{prefix}len"] = lengths(ids)
    return pa.table(made)


def _with(name: str, make: Callable[[pa.ListArray], pa.ListArray]) -> Columns:
    """Tokens and attention as they are, and ``make(labels)`` under ``name`` instead of the labels."""

    def columns(batch: pa.RecordBatch, source: MaskSource) -> pa.Table:
        made: dict[str, pa.Array] = {}
        for prefix in source.prefixes:
            made |= {f"{prefix}{own}": batch.column(f"{prefix}{own}") for own in ("input_ids", "attention_mask")}
            made[f"{prefix}{name}"] = make(batch.column(f"{prefix}labels"))
        return pa.table(made)

    return columns


FORMATS = {
    "hf": Format(
        "a `save_to_disk` directory with a `lengths` column: LLaMA-Factory, ms-swift", _hf, write_hf,
        "LLaMA-Factory: tokenized_path: {out}   ms-swift: --cached_dataset {out} --truncation_strategy split",
        weights=True,
    ),
    "jsonl": Format(
        "one file of `input_ids, labels, len`: instructlab-training", _jsonl, write_jsonl,
        'instructlab-training: TrainingArgs(process_data=False, data_path="", data_output_dir="{out.parent}"), which reads the '
        "file by the name of data.jsonl alone",
    ),
    "shifted": Format(
        "Parquet with `shifted_labels` at the predicting position: nemo-automodel, and loops that do not shift",
        _with("shifted_labels", shifted), write_parquet,
        "nemo-automodel: dataset: {{_target_: alphatoken.pipeline.trainers.rows.shifted_rows, path: {out}}}",
    ),
    "loss_mask": Format(
        "Parquet with `loss_mask` instead of labels: verl, SkyRL", _with("loss_mask", loss_mask), write_parquet,
        "verl: data.train_files={out} data.custom_cls.path=pkg://alphatoken.pipeline.trainers.verl_rows "
        "data.custom_cls.name=MaskedRows",
    ),
    "olmo": Format(
        "raw arrays of tokens and label masks, and where documents end: OLMo-core", _with("loss_mask", loss_mask), write_olmo,
        "OLMo-core: paths={out}/token_ids_part_*.npy label_mask_paths={out}/labels_mask_part_*.npy, "
        "use_array_if_local=False",
        pairs=False,
    ),
}  # fmt: skip


def refuse_export(source: MaskSource, format_name: str, out: Path) -> None:
    """Raise SettingsWrong for what a format cannot hold and for a place that is taken."""
    chosen, problems = FORMATS[format_name], []
    if source.pairs and not chosen.pairs:
        fit = ", ".join(name for name, one in FORMATS.items() if one.pairs)
        problems.append(f"--to {format_name}: it has no place for preference pairs; these have: {fit}")
    if source.weighted and not chosen.weights:
        fit = ", ".join(name for name, one in FORMATS.items() if one.weights)
        problems.append(
            f"--to {format_name}: mask {source.name} is soft weights (mask.rule=weight), and its labels keep everything; "
            f"{LOSS_WEIGHT} finds a place in: {fit}"
        )
    if out.exists():
        problems.append(f"--out {out}: is there already: give another place, or remove it")
    if problems:
        raise SettingsWrong(problems)


def export(source: MaskSource, format_name: str, out: Path) -> Exported:
    """Write all rows of a mask to ``out``, in their order, in memory of some rows.

    Raises SettingsWrong as ``refuse_export`` does, and RunFailed for shards that are damaged or do not hold what
    summary.json counts; ``out`` is then not there.
    """
    refuse_export(source, format_name, out)
    chosen, counted = FORMATS[format_name], {"rows": 0, "tokens": 0, "kept": 0}

    def tables(part: str) -> Iterator[pa.Table]:
        for batch in source.batches(part, source.token_columns):
            counted["rows"] += batch.num_rows
            for prefix in source.prefixes:
                counted["tokens"] += len(batch.column(f"{prefix}input_ids").flatten())
                counted["kept"] += count_kept(batch.column(f"{prefix}labels"))
            yield chosen.columns(batch, source)

    shards = (Shard(source.shard(part), tables(part)) for part in source.parts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsWrong(
            [f"--out {out}: no directory can be made at {out.parent} ({error.strerror}): give another place"]
        ) from error
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        chosen.write(shards, source, unfinished)
        _compare_with_summary(source, counted)
        unfinished.rename(out)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
    return Exported(**counted)


def _compare_with_summary(source: MaskSource, counted: dict[str, int]) -> None:
    told = {"rows": source.summary["rows"]}
    if not source.weighted:  # there labels keep all
        told["kept"] = source.summary["kept_tokens"]
    wrong = [f"{counted[name]:,} {name} and not {count:,}" for name, count in told.items() if counted[name] != count]
    if wrong:
        raise RunFailed(
            f"the shards of mask {source.name} hold {' and '.join(wrong)}, as its summary.json says: "
            f"{mask_anew(source.storage.place, source.name)}"
        )
