"""plan: what a run would do and cost, from the data and the model's configuration alone.

No weights are loaded and no worker starts: scored modules and their sizes are read off a model on the meta device,
lengths off a tokenized sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from alphatoken.pipeline.anchor.coverage import as_json, layers_of, warning
from alphatoken.pipeline.anchor.orders import check_examples, check_validation
from alphatoken.pipeline.anchor.own_step import check_covered
from alphatoken.pipeline.anchor.places import TOKENS_PER_PASS
from alphatoken.pipeline.anchor.summing import parts_of
from alphatoken.pipeline.anchor.worker import PROMPTS_PER_BATCH
from alphatoken.pipeline.cluster.choice import is_inline
from alphatoken.pipeline.cluster.token_batches import CPU_TOKENS
from alphatoken.pipeline.maths.batch import Sequences, by_token_budget, response_start
from alphatoken.pipeline.maths.costs import (
    DIRECTIONS,
    ModelCosts,
    Shapes,
    budget_shapes,
    forward_flops,
    ghost_flops,
    guard_flops,
    loss_flops,
    meta_model,
    model_costs,
    outer_flops,
    pair_flops,
    rehearsal_flops,
    sampling_flops,
    shapes_of,
    value_floor,
    value_flops,
    value_memory,
)
from alphatoken.pipeline.maths.decoder import UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.plan.calibration import kept
from alphatoken.pipeline.plan.cpu import CPU_HERE, cpu_rate
from alphatoken.pipeline.plan.device_memory import device_memory, is_laid_out
from alphatoken.pipeline.plan.devices import Here, device_here, device_hours
from alphatoken.pipeline.plan.sample import Sample, sample_data
from alphatoken.pipeline.plan.seconds import stage_seconds
from alphatoken.pipeline.plan.simulated import scale_flops, unrolled_flops, warmup_flops
from alphatoken.pipeline.plan.sizes import directions_bytes, file_sizes
from alphatoken.pipeline.prepare.outcome import IGNORED
from alphatoken.pipeline.prepare.pairs import Pair
from alphatoken.pipeline.prepare.tokenize import Example
from alphatoken.pipeline.prepare.windows import with_what_follows
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.objectives import RETENTION
from alphatoken.pipeline.trial.budget import Lengths, lengths_of, planned_extent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_plan(run: Run) -> dict[str, Any]:
    """The plan as nested JSON values.

    Raises SettingsWrong and RunFailed for data or a model that the run would refuse as well.
    """
    settings, models = run.settings, run.models
    own, policy, several = settings.model, models.policy, len(models.checkpoints)
    source = ModelSource(policy, own.revision, trust_remote_code=own.trust_remote_code)
    config = load_config(here(source, weights=False))
    dtype = _dtype(settings, config)
    try:
        model, asked = meta_model(config, dtype), settings.anchor_layers
        costs, scored = model_costs(model, settings.valuation.layers)
        wide, trained = (costs, scored) if asked == costs.scored_layers else model_costs(model, layers_of(model, asked))
    except UnsupportedModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    sample = sample_data(settings, policy)
    for remark in sample.remarks:
        run.progress.say(f"plan: {remark}")
    # Only now is it known whether the data is of pairs, as in make_anchors.
    if settings.valuation.needs_directions and (wrong := settings.anchor_problems(bool(sample.pairs))):
        raise SettingsWrong(wrong)
    drift = planned_drift(settings, models)
    budget = settings.valuation.tokens_per_batch
    budget = budget if isinstance(budget, int) else CPU_TOKENS
    shapes = train_shapes(sample, budget, int(settings.data.shard_examples))
    snapshots = settings.snapshots(drift)
    tokens, response = _tokens(sample.train), _response(sample.train)
    scale = sample.scale
    lengths = _lengths(sample.train)
    longest, guard = max(lengths), guard_flops(costs, lengths)
    if settings.valuation.needs_directions:
        anchor = anchor_flops(wide, sample, settings, drift, several)
        value = several * (planned_values(costs, sample, shapes, settings, snapshots, drift) + guard)
        floor = value_floor(costs, round(tokens * scale), round(response * scale), settings.valuation.scores)
    else:
        anchor = {"flops": 0}
        floor = planned_values(costs, sample, shapes, settings, 1, "none")
        value = floor + guard if floor else 0
    if settings.valuation.reference_loss:
        value += loss_flops(costs, shapes) + guard
    if sample.pairs:
        value += pair_flops(
            costs,
            shapes,
            drift,
            list(models.checkpoints) != [models.reference] and not settings.valuation.reference_loss,
        )
    stages = {
        "prepare": {"flops": 0},
        "anchor": anchor,
        "value": {
            "flops": value,
            "floor": floor,
            "forward": forward_flops(costs, shapes) + 2 * costs.head * shapes.tokens,
        },
        "mask": {"flops": 0},
        "trial": planned_trial(costs, sample, settings),
    }
    rows: Sequence[Example | Pair] = sample.pairs or sample.train
    total = sum(stage["flops"] for name, stage in stages.items() if name != "trial" or settings.trial.auto)
    rows_file = file_sizes(sample, settings, trained, drift, several)
    coverage = as_json(scored.coverage)
    measured, seconds = kept(run), dict[str, float]()
    if measured:
        inline = is_inline(settings.cluster, lambda: round(tokens * scale))
        seconds = stage_seconds(stages, sample.rows, settings, measured, several, inline)
        machine = Here(device_here(), seconds["total"], measured.rates["value"])
    else:
        rate = cpu_rate()
        machine = Here(CPU_HERE, total / rate, rate)
    memory = value_memory(
        costs, max(budget, longest), longest, dtype.itemsize, snapshots, settings.anchor.moves(drift),
        DIRECTIONS + len(settings.objectives),
    )  # fmt: skip
    several_devices = settings.cluster.devices_per_worker
    devices = device_memory(model, dtype, settings, memory) if is_laid_out(settings) else []
    if devices:
        memory["weights"] = sum(device["weights"] for device in devices)
    return {
        "data": {
            "format": "preference" if sample.pairs else "sft", "rows": sample.rows,
            "sampled": len({row.source for row in sample.train}) + len(sample.fisher) + len(sample.validation),
            "complete_sample": sample.complete, "unusable_fraction": sample.unusable,
            "train_examples": sample.train_rows, **_split(sample), "validation_examples": sample.validation_rows,
            **({"tasks": dict(sample.tasks)} if sample.tasks else {}),
            **({"retention_examples": sample.retention_rows} if sample.retention else {}),
            "fisher_prompts": len(sample.fisher), "tokens": round(tokens * scale),
            "response_tokens": round(response * scale), "padded_tokens": shapes.tokens, "longest": longest,
            "truncated_fraction": sum(row.truncated for row in rows) / len(rows),
            "shards": max(1, -(-sample.train_inputs // int(settings.data.shard_examples))),
        },
        "model": {
            "policy": policy, "dtype": str(dtype).removeprefix("torch."), "parameters": costs.parameters,
            "layers": costs.layers, "scored_layers": costs.scored_layers, "trained_layers": wide.scored_layers,
            "drift": drift, "snapshots": snapshots,
            "checkpoints": several,
            "columns": list(settings.columns),
            "scored_modules": [linear.name for linear in scored.maps], "coverage": coverage,
            "coverage_warning": warning(scored.coverage),
        },
        "flops": {**stages, "total": total},
        "memory_per_worker": memory, **({"devices": devices} if devices else {}),
        "storage": {**rows_file, "direction": directions_bytes(scored), "total": sum(rows_file.values())},
        **device_hours(total, value, round(tokens * scale), machine, settings.plan.price, several_devices),
        **({"seconds_here": seconds, "calibration": asdict(measured)} if measured else {}),
    }  # fmt: skip


def planned_trial(m: ModelCosts, sample: Sample, settings: Settings) -> dict[str, int]:
    """What a trial would cost, with its steps and examples. Of held-out pairs the rejected branch is taken to be as long as
    the chosen one."""
    train, held_out, retention = (
        lengths_of([e.input_ids for e in rows], [e.labels for e in rows])
        for rows in (sample.train, sample.validation, sample.retention)
    )
    new = settings.anchor.fisher.max_new_tokens
    prompts = lengths_of([e.input_ids for e in sample.fisher], [e.labels for e in sample.fisher]) or held_out
    completed = [(tokens - response + new, new) for tokens, response in prompts[: settings.trial.prompts]]
    pairs = bool(sample.pairs)
    kept = retention * max(1, sample.retention_rows // max(1, len(retention)))
    lengths = Lengths(train, held_out * 2 if pairs else held_out, completed, kept, pairs)
    far = planned_extent(m, settings, lengths, sample.train_rows)
    return {"flops": far.flops, "steps": far.steps, "examples": far.examples}


def planned_drift(settings: Settings, models: Models) -> str:
    """anchor.drift with ``auto`` resolved by place; the run itself compares contents."""
    drift = settings.anchor.drift
    start = list(models.checkpoints) == [models.reference]
    if settings.valuation.rehearsed and drift in ("auto", "none"):
        if not settings.valuation.rehearsal.stability_weight:
            return "none"
        return "rehearsal" if start else "checkpoint"
    return drift if drift != "auto" else "warmup" if start else "checkpoint"


def planned_values(
    m: ModelCosts, sample: Sample, shapes: Shapes, settings: Settings, snapshots: int, drift: str
) -> int:
    """Operations of the value stage; of a rehearsal with its padding taken for that of the static schedule."""
    own = settings.valuation
    if not settings.columns:
        return 0
    if not own.looks_at_anchors:
        snapshots, drift = 1, "none"
    directions = DIRECTIONS + len(settings.objectives)
    values = value_flops(m, shapes, own.window, snapshots, own.scores, own.exact, drift != "none", directions)
    if not own.rehearsed:
        return values
    steps = -(-sample.train_rows // own.rehearsal.batch_size)
    refreshes = -(-steps // own.rehearsal.refresh)
    return rehearsal_flops(m, shapes, validation_shapes(sample), refreshes, own.rehearsal.rho, values)


def validation_shapes(sample: Sample) -> Shapes:
    """The batches of one validation gradient."""
    return _held_shapes(sample.validation, sample.validation_rows)


def retention_shapes(sample: Sample) -> Shapes | None:
    """The batches of one gradient of data.retention; None where there are no such rows."""
    return _held_shapes(sample.retention, sample.retention_rows) if sample.retention else None


def _held_shapes(examples: Sequence[Example], rows: int) -> Shapes:
    shapes = budget_shapes([len(e.input_ids) for e in examples], _response(examples), TOKENS_PER_PASS)
    return shapes.times(rows / len(examples))


def train_shapes(sample: Sample, budget: int, shard_examples: int) -> Shapes:
    """The value stage's batches over all training examples, which do not reach from one shard into the next."""
    rows = Sequences(*([getattr(e, name) for e in sample.train] for name in ("id", "input_ids", "labels")))
    labels = (with_what_follows(rows, sample.overlap)[0] if sample.overlap else rows).labels
    predicting = sum(label != IGNORED for row in labels for label in row)
    inputs = {source: number for number, source in enumerate(dict.fromkeys(e.source for e in sample.train))}
    shards: dict[int, list[int]] = {}
    for example, ids in zip(sample.train, rows.input_ids, strict=True):
        shards.setdefault(inputs[example.source] // shard_examples, []).append(len(ids))
    batches = [(len(group), own[group[0]]) for own in shards.values() for group in by_token_budget(own, budget)]
    return shapes_of(batches, predicting).times(sample.scale)


def anchor_flops(m: ModelCosts, sample: Sample, settings: Settings, drift: str, checkpoints: int = 1) -> dict[str, int]:
    """Operations of the anchor by what they are for; ``fisher`` is at most, as completions may end early."""
    anchor, validation = settings.anchor, validation_shapes(sample)
    if anchor.unrolled:
        for objective, rows in rows_of_objectives(sample, settings).items():
            check_validation(rows, objective)
        check_examples(sample.train_rows, anchor.unroll.batch_size)
        if settings.valuation.own_step:
            check_covered(sample.train_rows, anchor.unroll)
        objectives = len(rows_of_objectives(sample, settings)) + (drift != "none")
        made, moved = unrolled_flops(m, sample, settings, objectives, loss_flops(m, validation)), 0
        gradients = anchor.unroll.orders
    else:
        made, moved = 0, warmup_flops(m, sample, settings) if drift == "warmup" else 0
        gradients = anchor.points(drift, checkpoints)
    has_fisher = drift != "none" or settings.anchor.precondition != "none"
    found = {
        "fisher": fisher_flops(m, sample.fisher, settings.anchor.fisher.max_new_tokens) if has_fisher else 0,
        "warmup": moved,
        **({"unrolled": made} if anchor.unrolled else {}),
        "validation_gradient": gradients * (ghost_flops(m, validation) + outer_flops(m, validation.predicting)),
        "guard": sum(guard_flops(m, _lengths(rows)) for rows in (sample.fisher if has_fisher else (), sample.train)),
    }
    if anchor.scaled:
        found["scale"] = scale_flops(m, sample, settings, settings.snapshots(drift, checkpoints))
    if (kept := retention_shapes(sample)) and settings.objectives:
        found["retention_gradient"] = gradients * (ghost_flops(m, kept) + outer_flops(m, kept.predicting))
    return {"flops": sum(found.values()), **found}


def rows_of_objectives(sample: Sample, settings: Settings) -> dict[str, int]:
    """Objective -> about how many validation rows make its direction; those of all tasks together follow from theirs."""
    found = dict(sample.tasks) or {"adaptation": sample.validation_rows}
    return found | ({RETENTION: sample.retention_rows} if RETENTION in settings.objectives else {})


def fisher_flops(m: ModelCosts, prompts: Sequence[Example], new: int) -> int:
    """Sampling ``new`` tokens per prompt and one ghost pass over prompt and completion, batched as the worker does; and once
    what shows whether padding is ignored."""
    total, parts, asked = 0, parts_of(len(prompts)), False
    for part in range(parts):
        own = prompts[part * len(prompts) // parts : (part + 1) * len(prompts) // parts]
        lengths = sorted((response_start(example.labels) for example in own), reverse=True)
        for start in range(0, len(lengths), PROMPTS_PER_BATCH):
            batch = lengths[start : start + PROMPTS_PER_BATCH]
            total += sampling_flops(m, len(batch), batch[0], new)
            if batch[0] > batch[-1] and not asked:
                total, asked = total + sampling_flops(m, 1, batch[-1], 1) + sampling_flops(m, 2, batch[0], 1), True
            shapes = budget_shapes([length + new for length in batch], len(batch) * new, TOKENS_PER_PASS)
            total += ghost_flops(m, shapes) + outer_flops(m, shapes.tokens)
    return total


def _split(sample: Sample) -> dict[str, int]:
    """Where long rows are split: about how many are, and the windows that they make."""
    windows = [example for example in sample.train if example.window]
    if not windows:
        return {}
    rows = len({example.source for example in windows})
    return {"split_rows": round(rows * sample.scale), "windows": round(len(windows) * sample.scale)}


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.input_ids) for example in examples]


def _tokens(examples: Sequence[Example]) -> int:
    return sum(_lengths(examples))


def _response(examples: Sequence[Example]) -> int:
    return sum(label != IGNORED for example in examples for label in example.labels)


def _dtype(settings: Settings, config: Any) -> torch.dtype:
    """The dtype that the workers would load: on a CPU float32, else the checkpoint's."""
    if settings.model.dtype in DTYPES:
        return DTYPES[settings.model.dtype]
    if not settings.cluster.address and not torch.cuda.is_available():
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16
