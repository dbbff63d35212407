"""The data set that verl's supervised trainer is told to take, `data.custom_cls`: rows as they are, nothing tokenized.

data.train_files=OUT data.pad_mode=no_padding data.max_length=4096
data.custom_cls.path=pkg://alphatoken.pipeline.trainers.verl_rows data.custom_cls.name=MaskedRows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch


class MaskedRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of ``--to loss_mask`` as int64 tensors ``(tokens,)``: input_ids, position_ids, loss_mask.

    ``parquet_files``: files, or folders of them. Entry i of ``loss_mask`` speaks of token i; verl's loss moves it itself.
    Raises ValueError for a padding mode that needs more than that, and for rows longer than data.max_length, which verl
    would cut.
    """

    def __init__(self, parquet_files: str | Sequence[str], tokenizer: Any, config: Any, **others: Any) -> None:
        if config.get("pad_mode", "no_padding") != "no_padding":
            raise ValueError("rows are unpadded: set data.pad_mode=no_padding")
        files = [parquet_files] if isinstance(parquet_files, str) else parquet_files
        self.rows = pa.concat_tables([pq.read_table(file, memory_map=True) for file in files])
        if (most := others.get("max_samples", -1)) > 0:
            self.rows = self.rows.slice(0, most)
        longest = max((len(row) for row in self.rows["input_ids"]), default=0)
        if longest > config.get("max_length", 1024):
            raise ValueError(f"the longest row has {longest} tokens: set data.max_length={longest} or higher")

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, kept = (torch.tensor(self.rows[name][index].as_py()) for name in ("input_ids", "loss_mask"))
        return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": kept}
