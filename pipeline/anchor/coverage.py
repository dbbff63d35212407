"""How much of the scored layers is scored, checked where a model has been loaded and said where a run reports."""

from __future__ import annotations

from typing import Any

import torch

from alphatoken.pipeline.maths.costs import meta_model
from alphatoken.pipeline.maths.decoder import Coverage, ScoredLayers, UnsupportedModel, decoder_layers, scored_layers
from alphatoken.pipeline.maths.model_source import ModelSource, load_config
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.remote import here
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import Settings


def refuse_unscored(run: Run) -> None:
    """Raise SettingsWrong for a policy whose configuration tells that it cannot be scored, too few layers among the reasons.

    No weights are loaded. A model that cannot be told by that, as one with code of its own, is left to the worker that loads it.
    """
    own, asked = run.settings.model, (run.settings.valuation.layers, run.settings.anchor_layers)
    if own.trust_remote_code:
        return
    source = ModelSource(run.models.policy, own.revision)
    try:
        model = meta_model(load_config(here(source, weights=False)), torch.float32)
        for layers in dict.fromkeys(asked):
            scored_layers(model, layers_of(model, layers))
    except UnsupportedModel as error:
        raise SettingsWrong([f"model.policy: {error}"]) from error
    except Exception:  # what a model class does on the meta device is its own, and no reason to refuse it
        return


def checked_layers(model: Any, settings: Settings, layers: int | str | None = None) -> ScoredLayers:
    """The scored layers; raises RunFailed for a model that cannot be scored or is covered too little.

    ``layers``: how many, or all; None: valuation.layers.
    """
    try:
        scored = scored_layers(model, layers_of(model, settings.valuation.layers if layers is None else layers))
    except UnsupportedModel as error:
        raise RunFailed(f"model.policy: {error}") from error
    coverage, least = scored.coverage, settings.valuation.min_coverage
    if coverage.fraction < least or not coverage.scored:
        raise RunFailed(
            f"only {coverage.fraction:.1%} of the matrix parameters of the scored layers can be scored, less than "
            f"valuation.min_coverage={least}; left out: {', '.join(coverage.left_out[:5])}"
        )
    return scored


def layers_of(model: Any, asked: int | str) -> int:
    """``asked`` decoder layers, with ``all`` resolved. Raises UnsupportedModel."""
    return len(decoder_layers(model)[1]) if isinstance(asked, str) else asked


def as_json(coverage: Coverage) -> dict[str, Any]:
    """The coverage as the manifest records it."""
    return {
        "fraction": coverage.fraction,
        "scored": coverage.scored,
        "total": coverage.total,
        "left_out": list(coverage.left_out),
    }


def warning(coverage: Coverage) -> str | None:
    """What to say when something was left out; None at full coverage."""
    if not coverage.left_out:
        return None
    return (
        f"warning: {coverage.fraction:.2%} of the scored layers' matrix parameters are scored; left out: "
        f"{', '.join(coverage.left_out)}"
    )
