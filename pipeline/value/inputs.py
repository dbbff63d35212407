"""What values/ and reference/ depend on, and what has to hold before they can be made."""

from __future__ import annotations

from typing import Any

from alphatoken.data_schemas import PREFERENCE_REFERENCE, REFERENCE, named, preference_values_schema, values_schema
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import digest, of_model, of_policy
from alphatoken.pipeline.run.remedies import anew
from alphatoken.pipeline.run.run import Models, Run
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.spelling import spelled
from alphatoken.pipeline.value.worker import Reference

REHEARSAL_KEYS = ("rho", "stability_weight", "batch_size", "learning_rate", "refresh")


def value_inputs(settings: Settings, models: Models, prepare: str, anchor: str | None, pairs: bool) -> dict[str, Any]:
    """Everything that values/ depends on; ``prepare``, ``anchor``: fingerprints of these stages, None without anchors."""
    own, valuation = settings.model, settings.valuation
    schema = (
        preference_values_schema(settings.columns) if pairs else values_schema(settings.columns, valuation.rehearsed)
    )
    inputs: dict[str, Any] = {
        "columns": list(settings.columns),
        **({"valuation.window": valuation.window} if "paper" in valuation.scores else {}),
        "schema": named(schema),
    }
    if anchor is not None:  # covers data, models and layers
        inputs["anchor"] = anchor
    else:
        inputs |= {"prepare": prepare, "policy": of_policy(models.checkpoints)}
        inputs |= {"model.revision": own.revision, "model.dtype": own.dtype, **settings.lower_inputs}
        if "gradient_norm" in valuation.scores:
            inputs["valuation.layers"] = valuation.layers
    if pairs or valuation.reference_loss:
        inputs["reference"] = of_model(models.reference)
    if pairs:
        inputs["valuation.beta"] = valuation.beta
    if valuation.rehearsed:
        inputs |= {"valuation.schedule": valuation.schedule, "run.seed": settings.run.seed}
        inputs |= {f"valuation.rehearsal.{key}": getattr(valuation.rehearsal, key) for key in REHEARSAL_KEYS}
    return inputs


def reference_inputs(run: Run) -> Reference:
    """The place of the reference's log-probabilities.

    Of several checkpoints one may be the reference; its pass is run all the same.
    """
    found, own = of_model(run.models.reference), run.settings.model
    inputs = {
        "prepare": run.manifest.stage("prepare")["fingerprint"], "reference": found, "model.revision": own.revision,
        "model.dtype": own.dtype, **run.settings.lower_inputs, "schema": named(PREFERENCE_REFERENCE if run.manifest.pairs else REFERENCE),
    }  # fmt: skip
    return Reference(digest(inputs), found == of_policy(run.models.checkpoints))


def checked_anchor(run: Run) -> dict[str, Any]:
    """The anchor's record; raises SettingsWrong where it was made for other models, layers or another schedule."""
    anchor, models, valuation = run.manifest.require("anchor", "value"), run.models, run.settings.valuation
    inputs, problems = anchor["inputs"], []
    if inputs["policy"] != of_policy(models.checkpoints):
        problems.append(
            f"model.policy={', '.join(models.checkpoints)} is not the policy that the anchors of {run.storage.root} were "
            "made with"
        )
    if inputs["valuation.layers"] != valuation.layers:
        problems.append(
            f"valuation.layers={valuation.layers}, but the anchors were made for {inputs['valuation.layers']}"
        )
    own = run.settings.model
    for key, now, first in (("model.dtype", own.dtype, "anchor"), ("model.revision", own.revision, "prepare")):
        if inputs[key] != now:
            problems.append(
                f"{key}={spelled(now)}, but the anchors were made with {spelled(inputs[key])}: make others, "
                f"{anew(run.storage.place, first, {key: now})}"
            )
    there, asked = (one.get("model.lower_dtype", "as model.dtype") for one in (inputs, run.settings.lower_inputs))
    if there != asked:
        problems.append(
            f"model.lower_dtype: {asked}, but the anchors were made with {there}: make others, "
            f"{anew(run.storage.place, 'anchor', {'model.lower_dtype': run.settings.lower_dtype})}"
        )
    looks_at_it = valuation.rehearsed or valuation.reference_loss or run.manifest.pairs
    if looks_at_it and inputs["reference"] != of_model(models.reference):
        problems.append(f"model.reference={models.reference} is not the reference that the anchors were made with")
    unrolled = run.settings.anchor.unroll
    if valuation.own_step and inputs.get("valuation.schedule") != valuation.schedule:
        problems.append(
            f"valuation.schedule={valuation.schedule}, but the anchors of {run.storage.root} have no values at own steps: make "
            f"others, {anew(run.storage.place, 'anchor', {'valuation.schedule': valuation.schedule})}"
        )
    elif valuation.own_step and inputs["anchor.unroll.orders"] != unrolled.orders:
        problems.append(
            f"anchor.unroll.orders={unrolled.orders}, but the anchors were made of {inputs['anchor.unroll.orders']}"
        )
    if valuation.looks_at_anchors and inputs.get("anchor.unroll.snapshots") == 0:
        scores = {"valuation.scores": list(valuation.scores), "valuation.exact": valuation.exact}
        problems.append(
            f"valuation.scores={spelled(list(valuation.scores))} looks along directions, and the anchors were made without snapshots: "
            f"make others, {anew(run.storage.place, 'anchor', scores)}"
        )
    if inputs["anchor.drift"] == "rehearsal" and not valuation.rehearsed:
        problems.append(
            f"the anchors of {run.storage.root} were made for valuation.schedule=rehearsal: make others, "
            f"{anew(run.storage.place, 'anchor', {'valuation.schedule': valuation.schedule})}"
        )
    if problems:
        raise SettingsWrong(problems)
    return anchor


def check_reference(settings: Settings, models: Models) -> None:
    """Raise SettingsWrong where a column compares two models and there is one."""
    if settings.valuation.reference_loss and of_policy(models.checkpoints) == of_model(models.reference):
        raise SettingsWrong(
            [
                "valuation.reference_loss=true compares two models, but model.policy and model.reference are the same: "
                "set model.reference to a model that was trained on good data of the target"
            ]
        )
