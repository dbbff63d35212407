"""The embedded model and its data as the value stage batches them: what every benchmark here runs on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken.pipeline.maths.batch import Batch, by_token_budget, collate
from alphatoken.pipeline.prepare.example import example_data, example_model
from alphatoken.pipeline.prepare.tokenize import Example, ExampleMaker

# Fewer where cores are shared: two threads on one free core wait for each other, milliseconds for every operation.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
BUDGET = 2048


def load_example() -> tuple[PreTrainedModel, list[Example]]:
    """SmolLM2-135M-Instruct in float32 on the CPU, and its code problems as tokenized examples, in file order."""
    torch.set_num_threads(THREADS)
    place = example_model(print)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    make = ExampleMaker(AutoTokenizer.from_pretrained(place), 2048, "auto", {}, model.config.vocab_size)
    lines = Path(example_data(print)).read_text(encoding="utf-8").splitlines()
    return model, [make(json.loads(line), str(row)) for row, line in enumerate(lines)]


def batches_of(examples: list[Example], budget: int = BUDGET) -> list[Batch]:
    """Token-budget batches over length-sorted rows."""
    groups = by_token_budget([len(e.input_ids) for e in examples], budget)
    return [collate([examples[i].input_ids for i in g], [examples[i].labels for i in g]) for g in groups]
