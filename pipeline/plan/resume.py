"""What a run would skip, go on with or refuse in a run directory that is there already; writes nothing."""

from __future__ import annotations

from typing import Any

from alphatoken.pipeline.mask.inputs import mask_inputs, needs_values
from alphatoken.pipeline.mask.layout import is_finished
from alphatoken.pipeline.plan.share import UPSTREAM, stage_inputs
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.fingerprint import differences, digest
from alphatoken.pipeline.run.run import Run
from alphatoken.pipeline.settings import STAGES


def resume_state(run: Run) -> dict[str, dict[str, Any]]:
    """Stage -> ``state``: new | done | continues | refused | overwritten, with the facts that belong to it."""
    manifest, settings = run.manifest, run.settings
    if not manifest.content["stages"]:
        skipped = set() if settings.valuation.needs_directions else {"anchor"}
        return {stage: {"state": "skipped" if stage in skipped else "new"} for stage in STAGES}
    inputs = stage_inputs(run)
    first = settings.run.overwrite
    anew = STAGES[STAGES.index(first) :] if first else ()
    found: dict[str, dict[str, Any]] = {}
    for stage in UPSTREAM:
        record = manifest.stage(stage)
        if stage not in inputs:
            found[stage] = {"state": "skipped"}
        elif stage in anew:
            found[stage] = {"state": "overwritten"}
        elif not record:
            found[stage] = {"state": "new"}
        elif record["fingerprint"] != digest(inputs[stage]):
            changed = [key for key, _, _ in differences(record["inputs"], inputs[stage])]
            found[stage] = {
                "state": "refused",
                "changed": changed,
                "remedy": f"another run.dir, or run.overwrite={stage}",
            }
        elif manifest.done(stage):
            found[stage] = {"state": "done"}
        else:
            found[stage] = {"state": "continues", **_progress(run, stage)}
    mask = f"mask/{settings.mask.name}"
    made_of = found.values() if needs_values(run) else [found["prepare"]]
    reached = all(state["state"] in ("done", "skipped") for state in made_of)  # else it is made of what comes
    done = reached and manifest.done(mask) and is_finished(run.storage, settings.mask.name)
    state = "overwritten" if "mask" in anew else "done" if done else "new"
    found["mask"] = {"state": state, "name": settings.mask.name}
    if state == "done" and (changed := _other_mask(run)):
        found["mask"] |= {"state": "refused", "changed": changed, "remedy": "another mask.name, or run.overwrite=mask"}
    return found


def _other_mask(run: Run) -> list[str]:
    """What differs between the finished mask and the one of its name that is asked for."""
    try:
        asked = mask_inputs(run).fingerprinted
    except SettingsWrong:  # which is said of the settings
        return []
    return [key for key, _, _ in differences(run.manifest.stage(f"mask/{run.settings.mask.name}")["inputs"], asked)]


def _progress(run: Run, stage: str) -> dict[str, Any]:
    """Parts that are complete already."""
    parts = run.manifest.stage("prepare")["counts"].get("parts", [])
    if stage == "anchor" or not parts:
        return {}
    directory = "prepared" if stage == "prepare" else "values"
    fingerprint = run.manifest.stage(stage)["fingerprint"]
    return {"complete_shards": len(run.storage.footers(directory, parts, fingerprint)), "shards": len(parts)}
