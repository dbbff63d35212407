"""Lower layers offloaded or in fewer bits, on the embedded model; and large models device by device, without weights:

python -m benchmarks.devices          weights in memory, seconds, and how far values move
python -m benchmarks.devices sizes    gigabytes of weights on each device
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken import Directions, TokenValuer
from alphatoken.pipeline.maths.batch import Batch
from alphatoken.pipeline.maths.decoder import scored_layers
from alphatoken.pipeline.maths.learners import ScoredWeights
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.placement import OFFLOADED, Placement, equal_rooms, sizes_of, split
from alphatoken.pipeline.maths.unroll import loss_gradient
from alphatoken.pipeline.prepare.example import example_model
from benchmarks.example_batches import batches_of, load_example

LAYERS, ROWS, HELD_OUT, BUDGET = 3, 24, 8, 1024
COLUMNS = ("loss", "information", "adaptation_direct", "adaptation_causal")
VARIANTS: dict[str, dict[str, Any]] = {
    "float32, whole": {},
    "bfloat16 lower layers": {"lower_dtype": "bfloat16"},
    "int8 lower layers": {"lower_dtype": "int8"},
    "int4 lower layers": {"lower_dtype": "int4"},
    "all lower layers on disk": {"offload": "disk", "device_bytes": 0},
}
# Sizes of Llama 3.1: hidden, intermediate, layers, heads.
LARGE = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}


def measured(name: str) -> dict[str, Any]:
    """One variant in this process: seconds per pass, bytes of weights in memory, columns of every response token."""
    whole, examples = load_example()
    torch.set_num_threads(1)
    own = dict(VARIANTS[name])
    if "device_bytes" in own:
        sizes, rest = sizes_of(list(whole.model.layers[:-LAYERS]), whole, "auto", torch.float32)
        own["device_bytes"] = rest + max(sizes)
    scored = scored_layers(whole, LAYERS)
    learner = ScoredWeights(scored, rounded=False)
    gradient, _, _ = loss_gradient(learner, learner.start(), batches_of(examples[-HELD_OUT:], BUDGET), "sdpa")
    directions = Directions(
        {"adaptation": gradient, "stability": {n: torch.zeros_like(t) for n, t in gradient.items()}}
    )
    del whole, scored
    started = time.perf_counter()
    model = load_model(ModelSource(str(example_model(print))), Placement((torch.device("cpu"),), LAYERS, **own))
    loading = time.perf_counter() - started
    valuer = TokenValuer(model, directions, LAYERS)
    batches: list[Batch] = batches_of(examples[:ROWS], BUDGET)
    valuer.value(batches[-1])
    started, found = time.perf_counter(), []
    for batch in batches:
        columns, response = valuer.value(batch), batch.predicting() + 1
        found.append(torch.stack([columns[column].flatten()[response] for column in COLUMNS]))
    seconds = time.perf_counter() - started
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    return {"seconds": seconds, "loading": loading, "bytes": held, "columns": torch.cat(found, dim=1).tolist()}


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def table() -> None:
    """Every variant in a process of its own; rank correlations are with the first."""
    print(f"| lower layers | weights in memory | seconds | {' | '.join(f'rank correlation of {c}' for c in COLUMNS)} |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    first: torch.Tensor | None = None
    for name in VARIANTS:
        if name.startswith("int") and find_spec("bitsandbytes") is None:
            print(f"| {name} | pip install bitsandbytes |")
            continue
        command = [sys.executable, "-m", "benchmarks.devices", "one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        columns = torch.tensor(result["columns"])
        first = columns if first is None else first
        same = " (the same bits)" if torch.equal(columns, first) and columns is not first else ""
        correlations = " | ".join(f"{rank_correlation(a, b):.4f}" for a, b in zip(columns, first, strict=True))
        print(
            f"| {name}{same} | {result['bytes'] / 1e6:.0f} MB | {result['seconds']:.1f} | {correlations} |", flush=True
        )


def sizes() -> None:
    """Where the weights of large models go."""
    print("| model | lower layers | one direction | devices | GB of weights on each, the last at the end | offloaded |")
    print("|---|---|---|---|---|---|")
    for name, (hidden, inner, layers, heads) in LARGE.items():
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=128256,
        )  # fmt: skip
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        direction = scored_layers(model, LAYERS).coverage.scored * 2
        for lower_dtype, count, offload in (
            ("bfloat16", 1, True), ("bfloat16", 2, False), ("bfloat16", 4, False), ("bfloat16", 8, False),
            ("int8", 1, False), ("int8", 2, False), ("int4", 1, False), ("int4", 2, False), ("int4", 4, False),
        ):  # fmt: skip
            lower, rest = sizes_of(list(model.model.layers[:-LAYERS]), model, lower_dtype, torch.bfloat16)
            places = split(lower, rest, [48e9] if offload else equal_rooms(count, sum(lower) + rest), offload)
            held = [sum(s for s, p in zip(lower, places, strict=True) if p == device) for device in range(count)]
            held[-1] += rest
            away = sum(s for s, p in zip(lower, places, strict=True) if p == OFFLOADED)
            shown = " ".join(f"{one / 1e9:.1f}" for one in held)
            print(f"| {name} | {lower_dtype} | {direction / 1e9:.1f} | {count} | {shown} | {away / 1e9:.1f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(sys.argv[2])))
    elif sys.argv[1:] == ["sizes"]:
        sizes()
    else:
        table()
