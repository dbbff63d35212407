"""What a mask depends on, and the settings that are left open until it is known what the values are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import KEPT, masks_schema, named, preference_masks_schema
from alphatoken.pipeline.mask.always_keep import always_keep_ids
from alphatoken.pipeline.mask.rehearsed import as_rehearsed, is_rehearsed
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.remedies import anew
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.spelling import overrides

PLAIN_ALIGNMENT = (
    "values were taken at one model by plain alignment: a fine-tune on such a mask ended worse than on a random one, on the "
    "measured example of supervised data (where mask.score=information did better) and on the measured pairs "
    "(docs/evidence.md, docs/results.md); `alphatoken trial` tries it on yours"
)
REFERENCE_UNUSED = (
    "stability against model.reference is in values/ and weighs nothing here: give it weight with mask.stability_weight, "
    "or leave out its cost with anchor.drift=none"
)
NO_SIGN = (
    "mask.rule=positive keeps everything that mask.score={score} is given to, which has no sign: choose mask.rule=top"
)
NEVER_ABOVE_0 = (
    "mask.rule=positive keeps nothing by mask.score=loss, whose value is minus the loss: choose mask.rule=top"
)
SIGNED_SCORES = ("paper", "exact", "unrolled", "excess_loss")


@dataclass(frozen=True, slots=True)
class MaskInputs:
    """``settings``: resolved. ``columns``: of values/, those that are there; none where no values are looked at.

    ``always``: ids that are always kept. ``schema``: of the mask's parts. ``fingerprinted``: everything that the mask
    depends on. ``notes``: what to know about it that is known beforehand. ``made_with``: model and tokenizer by name, where
    they are recorded.
    """

    settings: MaskSettings
    columns: tuple[str, ...]
    rehearsed: bool
    always: np.ndarray
    schema: pa.Schema
    fingerprinted: dict[str, Any]
    notes: tuple[str, ...]
    made_with: dict[str, str]


def needs_values(run: Run) -> bool:
    """Whether the mask that is asked for is made of values/, and not of prepared/ alone."""
    return run.manifest.pairs or bool(_resolved(run).columns()) or is_rehearsed(_value_inputs(run))


def mask_inputs(run: Run) -> MaskInputs:
    """Raises SettingsWrong for what cannot be made of these values, and RunFailed where a stage before is not done."""
    asked, manifest = run.settings.mask, run.manifest
    prepared = manifest.require("prepare", "mask")
    values = manifest.require("value", "mask") if needs_values(run) else None
    rehearsed = is_rehearsed(_value_inputs(run)) and values is not None
    settings = as_rehearsed(asked, _value_inputs(run)) if rehearsed else asked
    drift = manifest.stage("anchor").get("inputs", {}).get("anchor.drift")
    there = tuple(_value_inputs(run).get("columns", ())) if values else ()
    settings = settings.resolved(manifest.pairs or rehearsed, drift, there)
    _check(run, settings, there, drift)
    weighted = settings.rule == "weight"
    make_schema = preference_masks_schema if manifest.pairs else masks_schema
    schema = make_schema(list(dict.fromkeys(settings.extra_columns)), weighted=weighted)
    fingerprinted = {
        **({"values": values["fingerprint"]} if values else {"prepare": prepared["fingerprint"]}),
        "mask": asdict(settings),
        "schema": named(schema),
        **({"run.seed": run.settings.run.seed} if settings.score == "random" else {}),
    }
    always = always_keep_ids(settings.always_keep, manifest)
    notes = _notes(run, settings, always, drift, rehearsed)
    columns = (*there, KEPT) if rehearsed else there
    return MaskInputs(settings, columns, rehearsed, always, schema, fingerprinted, notes, _made_with(run))


def _resolved(run: Run) -> MaskSettings:
    return run.settings.mask.resolved(run.manifest.pairs)


def _value_inputs(run: Run) -> dict[str, Any]:
    return run.manifest.stage("value").get("inputs", {})


def _check(run: Run, settings: MaskSettings, there: tuple[str, ...], drift: str | None) -> None:
    problems = []
    if settings.stability_weight and drift == "none":
        problems.append(
            f"mask.stability_weight={settings.stability_weight}: the anchors of {run.storage.root} were made with "
            "anchor.drift=none, so there is no stability to weigh: set mask.stability_weight=0"
        )
    scores = run.manifest.content["configuration"].get("valuation", {}).get("scores", [])
    problems += settings.unknown(there)
    problems += [
        f"{reason}: set {' '.join(overrides(remedy))} and value anew, {anew(run.storage.place, _first_anew(run, remedy), remedy)}"
        for reason, remedy in settings.missing(there, scores)
    ]
    if problems:
        raise SettingsWrong(problems)


def _first_anew(run: Run, remedy: Mapping[str, Any]) -> str:
    """The first stage that is another with these settings."""
    if not run.manifest.stage("anchor") and {"anchor.direction", "valuation.exact"} & remedy.keys():
        return "prepare"  # which holds out what directions are made of
    if not run.manifest.stage("anchor") and "paper" in remedy.get("valuation.scores", []):
        return "prepare"
    return "anchor" if "anchor.direction" in remedy else "value"


def _notes(run: Run, settings: MaskSettings, always: np.ndarray, drift: str | None, rehearsed: bool) -> tuple[str, ...]:
    found = []
    if settings.divide_by_gradient_norm:
        found.append("score and stability are divided by each token's gradient_norm before tokens are compared")
    if "eos" in settings.always_keep and not len(always):
        found.append("the tokenizer names no end-of-sequence token, so that mask.always_keep=eos keeps none")
    if settings.score == "paper" and not rehearsed and _is_plain_alignment(run):
        found.append(PLAIN_ALIGNMENT)
    # Also where 0 was asked for: a replay asks for what had been resolved, and its mask has the same bytes.
    if drift == "checkpoint" and settings.score == "information" and not settings.stability_weight:
        found.append(REFERENCE_UNUSED)
    weighed = settings.stability_weight or settings.loss_weight
    if settings.rule == "positive" and settings.score not in (*SIGNED_SCORES, "full") and not weighed:
        found.append(NEVER_ABOVE_0 if settings.score == "loss" else NO_SIGN.format(score=settings.score))
    return tuple(found)


def _made_with(run: Run) -> dict[str, str]:
    """Names for the card, which may leave this machine: of a local directory its last part alone."""
    policy = run.manifest.content["configuration"].get("model", {}).get("policy")
    places = {
        "model": policy if isinstance(policy, list) else [policy],
        "tokenizer": [run.manifest.stage("prepare")["counts"].get("tokenizer")],
    }
    named = {kind: [_name(place) for place in several if place] for kind, several in places.items()}
    return {kind: ", ".join(names) for kind, names in named.items() if names}


def _name(place: str) -> str:
    local = place.startswith((".", "/", "~")) or place.count("/") > 1
    return place.rstrip("/").rpartition("/")[2] if local else place


def _is_plain_alignment(run: Run) -> bool:
    inputs = run.manifest.stage("anchor").get("inputs", {})
    several = inputs.get("anchor.snapshots", 1) > 1 or isinstance(inputs.get("policy"), list)  # of checkpoints
    one_step = inputs.get("anchor.direction", "gradient") == "gradient"
    return inputs.get("anchor.precondition") == "none" and one_step and not several
