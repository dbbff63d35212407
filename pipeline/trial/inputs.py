"""What a trial is made of: which masks, on which rows, how many steps; checked before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alphatoken.pipeline.mask.layout import finished_masks, summary_of
from alphatoken.pipeline.maths.adapters import adapted, all_layers
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.costs import ModelCosts, budget_shapes, meta_model, model_costs, value_flops
from alphatoken.pipeline.maths.decoder import ScoredLayers, UnsupportedModel
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.prepare.reader import retention_rows
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest, of_model
from alphatoken.pipeline.run.remedies import first
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.trial.budget import CPU_RATE, DEVICE_RATE, Extent, Lengths, extent, lengths_of, trial_flops
from alphatoken.pipeline.trial.candidates import Candidate, Labels, candidates, known_by_labels
from alphatoken.pipeline.trial.rows import (
    HeldOut,
    drawn_rows,
    held_out_rows,
    labelled,
    mask_labels,
    prompts_of,
    sample_of,
)
from alphatoken.pipeline.trial.verdict import SUMMARY

CHOSEN = "chosen"  # the mask that trial.auto writes


@dataclass(frozen=True, slots=True)
class TrialInputs:
    """``masks``: labels of every sequence of ``sample``. ``common``: everything that all fine-tunes depend on.

    ``pairs``: whether an example is two sequences, see rows.py. ``retention``: rows of data.retention, where there are any.

    ``basis``: of all that ``extent`` goes on with once a trial is there. ``prompts``: rows whose prompts the reference completes.
    ``rate``: operations per second, of all workers together; ``measured``: whether the run has shown it. ``notes``: what to know
    beforehand. ``alone``: how many last layers learn where lower ones do not, else 0.
    """

    candidates: list[Candidate]
    masks: dict[str, Labels]
    sample: Sequences
    pairs: bool
    held_out: HeldOut
    retention: Sequences | None
    prompts: Sequences
    extent: Extent
    basis: str
    rate: float
    measured: bool
    common: dict[str, Any]
    completions_fingerprint: str
    notes: tuple[str, ...]
    alone: int

    def fingerprint(self, candidate: Candidate, seed: int) -> str:
        """Of one fine-tune: a mask that comes later leaves the others as they are."""
        return digest({**self.common, "candidate": candidate.identity, "kind": candidate.kind, "seed": seed})


def trial_inputs(run: Run) -> TrialInputs:
    """Raises SettingsWrong for masks that cannot be tried, and RunFailed for a run that is not far enough or too small."""
    manifest, settings, own = run.manifest, run.settings, run.settings.trial
    prepared = manifest.require("prepare", "trial")
    names, notes = chosen_masks(run)
    held_out, retention = held_out_rows(run), retention_of(run)
    tried = candidates({name: summary_of(run.storage, name)["kept_fraction"] for name in names})
    prompts = prompts_of(run, held_out, own.prompts)
    costs, scored, rate, measured = _costs_and_rate(run)
    if own.train == "lora" and (stacked := adapted(all_layers(scored.model))[1]):
        notes.append(f"{len(stacked)} stacks of experts' matrices get no adapters (trial.train=lora)")
    available = sum(drawn.__len__() for drawn in drawn_rows(run, 1 << 62).values())
    look = sample_of(run, drawn_rows(run, min(available, 256)))
    length = settings.anchor.fisher.max_new_tokens
    completed = [
        (tokens - response + length, length) for tokens, response in lengths_of(prompts.input_ids, prompts.labels)
    ]
    lengths = Lengths(
        lengths_of(look.input_ids, look.labels),
        lengths_of(held_out.rows.input_ids, held_out.rows.labels),
        completed,
        lengths_of(retention.input_ids, retention.labels) if retention else (),
        manifest.pairs,
    )
    models = run.models
    model = {
        "reference": of_model(models.reference),
        "model.revision": settings.model.revision,
        "model.dtype": settings.model.dtype,
        **settings.lower_inputs,
        "prepare": prepared["fingerprint"],
        "run.seed": settings.run.seed,
        "anchor.fisher.max_new_tokens": length,
        "anchor.fisher.temperature": settings.anchor.fisher.temperature,
        "prompts": prompts.ids,
    }
    common = {
        **model,
        "policy": of_model(models.policy),
        "valuation.layers": settings.valuation.layers,
        "held_out": digest(held_out.rows.ids),
        **own.fingerprinted(),
        **({"retention": digest(retention.ids)} if retention else {}),
        **({"valuation.beta": settings.valuation.beta} if manifest.pairs else {}),
    }
    basis = digest({**common, "examples": own.examples, "steps": own.steps})
    kept = [one.percent / 100 for one in tried for _ in one.seeds(own.seeds)]
    far = _extent_before(run, basis) or extent(costs, own, lengths, available, kept, rate)
    common |= {"examples": far.examples, "steps": far.steps}
    places = drawn_rows(run, far.examples)
    sample = sample_of(run, places)
    masks = {name: mask_labels(run, name, places, sample) for name in names}
    tried = known_by_labels(tried, masks)
    kept = [one.percent / 100 for one in tried if not one.twin for _ in one.seeds(own.seeds)]  # twins cost nothing
    far = replace(far, flops=trial_flops(costs, own, lengths, far.steps, far.examples, kept))
    notes += [f"mask {one.name} leaves what {one.twin} leaves, and shares its fine-tunes" for one in tried if one.twin]
    return TrialInputs(
        tried, masks, sample, manifest.pairs, held_out, retention, prompts, far, basis, rate, measured, common, digest(model),
        tuple(notes), len(scored.layers) if own.train == "layers" and scored.lower else 0,
    )  # fmt: skip


def _extent_before(run: Run, basis: str) -> Extent | None:
    """That of the trial that is there, without its operations, if it was one of the same: what ``auto`` comes to depends on how many masks
    there are, and those that come later are to be compared with these."""
    if not run.storage.exists(SUMMARY):
        return None
    try:
        found = run.storage.read_json(SUMMARY)
    except ValueError:  # overwritten: not what this program leaves
        return None
    return Extent(found["examples"], found["steps"], 0) if found.get("basis") == basis else None


def chosen_masks(run: Run) -> tuple[list[str], list[str]]:
    """The masks of the run to try, and what is said of those that are left out. Raises RunFailed and SettingsWrong."""
    there, asked = masks_of(run), run.settings.trial.masks
    if not there:
        run.manifest.require("prepare", "trial")
        raise RunFailed(
            f"trial needs a mask, and there is none in {run.storage.root}: {first(run.storage.place, 'mask')}"
        )
    if unknown := [name for name in asked if name not in there]:
        raise SettingsWrong(
            [f"trial.masks={name}: there is no such mask in {run.storage.root}: {', '.join(there)}" for name in unknown]
        )
    rules = {name: summary_of(run.storage, name)["settings"]["rule"] for name in asked or there}
    soft = [name for name, rule in rules.items() if rule == "weight"]
    why = "its soft weights (mask.rule=weight) are not labels, and a trial is made on labels"
    if asked and soft:
        raise SettingsWrong([f"trial.masks={name}: {why}: leave it out" for name in soft])
    found = [name for name in rules if name not in soft]
    if not found:
        raise RunFailed(f"trial needs a mask with labels, and {run.storage.root} has none but {', '.join(soft)}: {why}")
    return found, [f"mask {name} is left out: {why}" for name in soft]


def masks_of(run: Run) -> list[str]:
    """Finished masks of the run, in the order in which they were made; the copy of an earlier trial is none."""
    return [name for name in finished_masks(run.storage, run.manifest) if name != CHOSEN]


def retention_of(run: Run) -> Sequences | None:
    """The rows of data.retention that have a response token; None where there are none."""
    rows = retention_rows(run)
    return labelled(rows) if rows else None


def _costs_and_rate(run: Run) -> tuple[ModelCosts, ScoredLayers, float, bool]:
    """The model's costs, its layers without weights, operations per second of all workers, and whether the value stage has
    shown the latter."""
    own = run.settings.model
    source = ModelSource(run.models.policy, own.revision, trust_remote_code=own.trust_remote_code)
    config = load_config(here(source, weights=False))
    try:
        costs, scored = model_costs(meta_model(config, torch.bfloat16), run.settings.valuation.layers)
    except UnsupportedModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    rate = _measured_rate(run, costs)
    resources = run.cluster.model_resources()
    return (
        costs,
        scored,
        rate or (resources.least or resources.workers) * (DEVICE_RATE if resources.gpus else CPU_RATE),
        rate is not None,
    )


def _measured_rate(run: Run, costs: ModelCosts) -> float | None:
    """What the value stage's seconds say, its workers' start included; None where it was not run, or valued nothing."""
    record = run.manifest.stage("value")
    counts = record.get("counts", {})
    tokens = counts.get(
        "timed_tokens", counts.get("tokens", 0)
    )  # of a stage that was killed, those since then: as seconds are
    if not run.manifest.done("value") or not tokens or not record["seconds"]:
        return None
    valuation = run.settings.valuation
    sample = sample_of(run, drawn_rows(run, 256))
    lengths = lengths_of(sample.input_ids, sample.labels)
    shapes = budget_shapes([n for n, _ in lengths], sum(n for _, n in lengths), 2048)
    flops = value_flops(costs, shapes, valuation.window, 1, _scores(record), valuation.exact)
    return flops * tokens / sum(n for n, _ in lengths) / record["seconds"]


def _scores(record: dict[str, Any]) -> Sequence[str]:
    """Of valuation.scores those that the values have columns of."""
    columns = record["inputs"].get("columns", [])
    return [*["paper"] * ("adaptation_direct" in columns), *[name for name in columns if name == "information"], "loss"]
