"""What the anchors depend on, and what the Fisher among them does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alphatoken.pipeline.prepare.inputs import held_out_digest
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest, of_model, of_policy
from alphatoken.pipeline.run.run import Models
from alphatoken.pipeline.settings import Settings


def drift_of(settings: Settings, models: Models) -> str:
    """checkpoint | warmup | rehearsal | none, with ``auto`` resolved. Raises SettingsWrong where there can be no drift.

    rehearsal: from nothing on, it grows while the value stage rehearses; none only where it is not weighed there.
    """
    drift = settings.anchor.drift
    if len(models.checkpoints) > 1:  # the reference may be among them, as the start of the trajectory
        return "none" if drift == "none" else "checkpoint"
    policy, reference = models.policy, models.reference
    if settings.valuation.rehearsed and drift in ("auto", "none"):
        if not settings.valuation.rehearsal.stability_weight:
            return "none"
        return "rehearsal" if of_model(policy) == of_model(reference) else "checkpoint"
    if drift == "auto":
        drift = "warmup" if of_model(policy) == of_model(reference) else "checkpoint"
        if drift == "checkpoint" and settings.anchor.snapshots > 1:
            raise SettingsWrong(
                [
                    f"anchor.snapshots={settings.anchor.snapshots}: snapshots are points of a warm-up, and with model.reference "
                    "beside model.policy the drift is that of the two checkpoints: set anchor.drift=warmup or anchor.snapshots=1"
                ]
            )
        return drift
    if drift == "checkpoint" and of_model(policy) == of_model(reference):
        raise SettingsWrong(
            [
                "anchor.drift=checkpoint, but model.policy and model.reference are the same: give two checkpoints, "
                "or set anchor.drift=warmup"
            ]
        )
    return drift


def anchor_inputs(settings: Settings, models: Models, prepare: Mapping[str, Any], drift: str) -> dict[str, Any]:
    """Everything that anchors/ depends on; ``prepare``: what that stage depends on."""
    anchor = settings.anchor
    inputs: dict[str, Any] = {
        "prepare": digest(prepare),
        "policy": of_policy(models.checkpoints),
        "reference": of_model(models.reference),
        "model.revision": settings.model.revision,
        "model.dtype": settings.model.dtype,
        **settings.lower_inputs,
        "valuation.layers": settings.valuation.layers,
        "anchor.drift": drift,
        "run.seed": settings.run.seed,
    }
    if held_out := held_out_digest(prepare):
        inputs["held_out"] = held_out
    inputs["anchor.precondition"] = anchor.precondition
    if anchor.precondition != "none":
        inputs["anchor.damping"] = anchor.damping
    inputs["anchor.snapshot_scale"] = "rms" if anchor.scaled else "none"
    if anchor.scaled:  # made from values of a sample
        inputs["valuation.window"] = settings.valuation.window
        inputs["anchor.warmup.examples"] = anchor.warmup.examples
    if drift != "none" or anchor.precondition != "none":
        inputs["anchor.fisher.max_new_tokens"] = anchor.fisher.max_new_tokens
        inputs["anchor.fisher.temperature"] = anchor.fisher.temperature
    if anchor.unrolled:
        inputs["anchor.direction"] = anchor.direction
        unroll = anchor.unroll
        for name in ("orders", "steps", "examples", "batch_size", "snapshots"):
            inputs[f"anchor.unroll.{name}"] = getattr(unroll, name)
        inputs["anchor.unroll.learning_rate"] = unroll.rate
        if unroll.asked_layers is not None:
            inputs["anchor.unroll.layers"] = unroll.asked_layers
        if unroll.train == "lora":
            inputs |= {"anchor.unroll.train": unroll.train, "anchor.unroll.rank": unroll.rank}
        if settings.valuation.own_step:
            inputs["valuation.schedule"] = settings.valuation.schedule
        if not settings.valuation.looks_at_anchors:
            inputs["anchor.unroll.snapshots"] = 0
        # Where the reference is the policy the run itself is the drift.
    elif drift == "warmup":
        inputs["anchor.snapshots"] = anchor.snapshots
        for name in ("steps", "learning_rate", "examples", "batch_size"):
            inputs[f"anchor.warmup.{name}"] = getattr(anchor.warmup, name)
    return inputs


# Keys of anchor.unroll that the Fisher does not depend on; it does on the layers.
_OF_THE_RUN = tuple(
    f"anchor.unroll.{name}"
    for name in ("orders", "steps", "examples", "batch_size", "learning_rate", "snapshots", "train", "rank")
)


def fisher_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``anchor_inputs`` that the Fisher depends on: runs that differ in the others can share it."""
    other = (
        "policy", "anchor.drift", "anchor.snapshot", "anchor.warmup.", "anchor.precondition", "anchor.damping",
        "valuation.window", "valuation.schedule", "anchor.direction", *_OF_THE_RUN,
    )  # fmt: skip
    found = {key: value for key, value in inputs.items() if not key.startswith(other)}
    if "held_out" in found:  # its prompts are the same for every part of the data
        found["prepare"] = found.pop("held_out")
    return found
