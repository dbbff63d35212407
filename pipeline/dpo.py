"""Masked preference data for trainers: a collator for TRL's DPOTrainer and the layout that LLaMA-Factory reads.

    from alphatoken.pipeline.dpo import MaskedPreferenceCollator
    trainer = DPOTrainer(model, args=DPOConfig(..., max_length=None, remove_unused_columns=False),
                         train_dataset=load_dataset("RUN/masks/default", split="train"),
                         processing_class=tokenizer, data_collator=MaskedPreferenceCollator(tokenizer.pad_token_id))

The collator needs torch and no trainer; the loss of Eq. 14 is `alphatoken.pipeline.maths.preference.masked_preference_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alphatoken.data_schemas import BRANCHES

IGNORED = -100
SUMS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, slots=True)
class MaskedPreferenceCollator:
    """Rows of a masked preference data set -> the batch that TRL's DPOTrainer computes its loss from.

    ``pad_token_id``: what fills rows up on the right; never attended to, never in the loss.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors ``(2 * pairs, longest)`` int64, the chosen branches first, then the rejected ones in the same order.

        ``input_ids``, ``attention_mask``, and ``completion_mask``: 1 at kept tokens, so that masked ones are read but
        are in no loss and get no gradient. Index i speaks of token i; the trainer shifts. ``ref_chosen_logps`` and
        ``ref_rejected_logps`` ``(pairs,)``: over the kept tokens; the trainer uses them only where it is told to.
        Raises ValueError for rows that are no masked preference data.
        """
        missing = [f"{branch}_{name}" for branch in BRANCHES for name in ("input_ids", "labels")]
        missing = [name for name in (*missing, *SUMS) if name not in rows[0]]
        if missing:
            raise ValueError(
                f"rows have no {', '.join(missing)}: give masks/<name> of a preference run, with remove_unused_columns=False"
            )
        branches = [(row[f"{b}_input_ids"], row[f"{b}_labels"]) for b in BRANCHES for row in rows]
        shape = (len(branches), max(len(ids) for ids, _ in branches))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "completion_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, (ids, labels) in enumerate(branches):
            batch["input_ids"][row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["completion_mask"][row, : len(ids)] = torch.as_tensor(labels, dtype=torch.int64) != IGNORED
        return {**batch, **{name: torch.tensor([float(row[name]) for row in rows]) for name in SUMS}}


def save_for_llamafactory(mask: str, target: str) -> None:
    """Write a masked preference data set as LLaMA-Factory's ``tokenized_path`` wants it (``save_to_disk``).

    ``mask``: a directory masks/<name>; ``target``: a directory that does not exist yet. Then train with
    ``tokenized_path: <target>``, ``stage: dpo``. Columns: ``{chosen,rejected}_{input_ids,attention_mask,labels}``, and
    ``images``, ``videos``, ``audios``, which its collator asks for and which are null.
    """
    from datasets import DatasetDict, List, Value, load_dataset

    tokens = [f"{branch}_{name}" for branch in BRANCHES for name in ("input_ids", "attention_mask", "labels")]
    data = load_dataset(mask, split="train").select_columns(tokens)
    for name in ("images", "videos", "audios"):
        data = data.add_column(name, [None] * len(data), feature=List(Value("string")))
    DatasetDict({"train": data}).save_to_disk(target)
