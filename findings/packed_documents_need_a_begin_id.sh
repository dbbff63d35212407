#!/usr/bin/env bash
# ai2-olmo-core 3.0.0, torch 2.13.0: NumpyPackedFSLDatasetConfig on token arrays, with a tokenizer that has a begin id.
#
# A good guess: a document ends at each end id, so that arrays whose rows all have one are read whole; a data set that finds
# no documents refuses; and the padded data set of the same release, given the same array and tokenizer, has the same ones.
# The padded one does go by the end id alone. The packed one, as soon as the tokenizer's configuration NAMES a begin id, cuts
# only where an end id is directly followed by that begin id, or is the array's very last token; what comes after the last
# cut is dropped. That both ids are used is documented, what follows from it is not, and nothing is raised. Tokenizers may
# name a begin id that they never write (as the release's own gpt2 preset does). Then
# - rows that end in the end id are ONE document, of which the first sequence_length tokens stay and the rest goes;
# - rows that end in the end id and a newline, as chat templates write them, are NO document: length 0, and prepare() passes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "ai2-olmo-core==3.0.0"
"$place/venv/bin/python" - "$place" <<'PY'
import sys

import numpy as np
from olmo_core.data import NumpyPackedFSLDatasetConfig, NumpyPaddedFSLDatasetConfig, TokenizerConfig


def tokenizer(begin):
    return TokenizerConfig(vocab_size=1000, eos_token_id=2, pad_token_id=0, bos_token_id=begin)


def rows(head, tail):
    return np.array([head + list(range(10 * n, 10 * n + 8)) + tail for n in range(1, 9)], dtype=np.uint16).flatten()


def read(config, ids, tokenizer, name):
    path = f"{sys.argv[1]}/{name}.npy"
    ids.tofile(path)
    data = config(tokenizer=tokenizer, sequence_length=32, paths=[path], work_dir=f"{sys.argv[1]}/work").build()
    assert data.dtype == ids.dtype
    data.prepare()
    text = [data[n]["input_ids"] for n in range(len(data))]
    return len(data), sum(int(((ids >= 10) & (ids < 100)).sum()) for ids in text)


packed, padded = NumpyPackedFSLDatasetConfig, NumpyPaddedFSLDatasetConfig
cases = (  # 8 rows of 8 tokens of text each; tokens of text expected from the packed data set, then from the padded one
    ("rows as begin, text, end", tokenizer(1), rows([1], [2]), 64, 64),
    ("rows as text, end; no begin id named", tokenizer(None), rows([], [2]), 64, 64),
    ("rows as text, end; begin id named", tokenizer(1), rows([], [2]), 29, 64),
    ("rows as text, end; preset gpt2", TokenizerConfig.gpt2(), rows([], [50256]), 29, 64),
    ("rows as text, end, newline; no begin id named", tokenizer(None), rows([], [2, 198]), 64, 64),
    ("rows as text, end, newline; begin id named", tokenizer(1), rows([], [2, 198]), 0, 64),
    ("rows as begin, text, end; the last without its end", tokenizer(1), rows([1], [2])[:-1], 56, 56),
)
for number, (name, own, ids, *expected) in enumerate(cases):
    found = [read(config, ids, own, f"{config.__name__}{number}") for config in (packed, padded)]
    print(f"{name}: packed {found[0][0]} instances with {found[0][1]} of 64, padded {found[1][0]} with {found[1][1]}")
    assert [text for _, text in found] == expected, "the behaviour has changed"
PY
