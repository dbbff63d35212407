"""Exported rows under the names that a trainer's collator asks for, where the names of the files say more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shifted_rows(path: str) -> Any:
    """A `datasets.Dataset` of a directory made with ``--to shifted``, for trainers that never shift (nemo-automodel).

    Columns ``input_ids, attention_mask, labels``; labels stand at the predicting position. Whoever shifts again is off
    by one.
    """
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{path}/*.parquet", split="train")
    return rows.rename_column("shifted_labels", "labels")


def skyrl_example(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of a directory made with ``--to loss_mask`` as SkyRL's `collate_sft_batch` takes it; None: nothing kept.

    There ``loss_mask`` covers the last ``num_actions`` tokens alone, here from the first kept token on.
    """
    kept = list(row["loss_mask"])
    if 1 not in kept:
        return None
    actions = len(kept) - kept.index(1)
    return {
        "input_ids": list(row["input_ids"]),
        "attention_mask": list(row["attention_mask"]),
        "num_actions": actions,
        "loss_mask": kept[-actions:],
    }
