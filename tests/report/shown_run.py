"""Run directories for looking at: written as prepare and value leave them, with a tokenizer of words on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import (
    BRANCHES,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    PREPARED,
    SCORES,
    SIGNED,
    preference_values_schema,
    value_columns,
    values_schema,
)
from alphatoken.pipeline.report.stage import make_report
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import ValuationSettings
from tests.mask.synthetic_run import mask, run_of

COLUMNS = value_columns(tuple(SCORES))
EOS = 1
PLAIN = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "seven", "wise", "owls", "\n", "café"]
HOSTILE = [
    "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=2>", "{{ 7 * 7 }}", "<!--", "]]>",
    "\x1b[31m", "\u202e", "javascript:alert(1)", "&lt;", "'\"`", "\\u003c/script>",
]  # fmt: skip


def save_words(directory: Path, words: list[str]) -> Path:
    """A tokenizer whose token 2 + i is word i; 0 is unknown, 1 ends a sequence."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)
    return directory


def write_shown(
    directory: Path, lengths=tuple(range(1, 31)), words=PLAIN, pairs=False, ids="row-{}", source="data/file.jsonl",
    zero=(), part_rows=16, prompt=3, columns=COLUMNS,
) -> Storage:  # fmt: skip
    """One row per response length, EOS its last token; ``zero``: columns that are 0 everywhere; masks come later."""
    storage, rng = Storage(str(directory / "run")), np.random.default_rng(3)
    words_at = save_words(directory / "words", list(words))
    manifest, branches = Manifest(storage), BRANCHES if pairs else ("",)
    first = manifest.begin("prepare", {"seed": 0}, {})
    manifest.begin("anchor", {"anchor.drift": "warmup"}, {})
    own = ValuationSettings(scores=[score for score, needed in SCORES.items() if set(needed) <= set(columns)])
    second = manifest.begin("value", {"prepare": first, "columns": list(columns)}, {"valuation": own})
    starts = range(0, len(lengths), part_rows)
    parts = [f"part-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
    for part, start in zip(parts, starts, strict=True):
        prepared, values = [], []
        for row in range(start, min(start + part_rows, len(lengths))):
            shared = {"id": ids.format(row)}
            left, right = {**shared, "source": f"{source}:{row}"}, {**shared, **({"omega": 0.5} if pairs else {})}
            for branch in branches:
                prefix = f"{branch}_" if branch else ""
                tokens = rng.integers(2, 2 + len(words), prompt + lengths[row]).tolist()
                tokens[-1] = EOS
                labels = [-100] * prompt + tokens[prompt:]
                left |= {f"{prefix}input_ids": tokens, f"{prefix}labels": labels}
                for name in columns:
                    drawn = rng.standard_normal(len(tokens)).astype(np.float32) * (name not in zero)
                    drawn[:prompt] = 0
                    right[f"{prefix}{name}"] = (drawn if name in SIGNED else np.abs(drawn)).tolist()
            if pairs:
                left |= {"prompt": "p", "chosen": "c", "rejected": "r"}
            prepared.append(left)
            values.append(right)
        schema, of_values = (PREFERENCE_PREPARED, preference_values_schema) if pairs else (PREPARED, values_schema)
        storage.write_table(f"prepared/{part}", pa.Table.from_pylist(prepared, schema), first)
        storage.write_table(f"values/{part}", pa.Table.from_pylist(values, of_values(columns)), second)
        if pairs:
            logps = [
                {"id": row["id"], **{f"{b}_logps": row[f"{b}_stability_direct"] for b in BRANCHES}} for row in values
            ]
            storage.write_table(f"reference/{part}", pa.Table.from_pylist(logps, PREFERENCE_REFERENCE), "reference")
    counts = {"parts": parts, "eos_token_ids": [EOS], "vocabulary": 2 + len(words), "tokenizer": str(words_at)}
    manifest.finish("prepare", 0.0, format="preference" if pairs else "sft", **counts)
    manifest.finish("anchor", 0.0)
    manifest.finish("value", 0.0, **({"reference_fingerprint": "reference"} if pairs else {}))
    return storage


def with_masks(storage: Storage, **masks: dict) -> Storage:
    """Name -> settings of a mask to make."""
    for name, settings in masks.items():
        mask(storage, name=name, **settings)
    return storage


def report_on(storage: Storage, **settings) -> Path:
    """The page's file."""
    return Path(make_report(run_of(storage, **settings)))
