"""alphatoken mask: threshold and write the trainer-ready data set. Loads no model."""

import shlex
import sys
from dataclasses import asdict
from typing import Any

from alphatoken.jobs.session import Session
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.spelling import overrides, quoted

OTHERS = (0.3, 0.7, 0.5)  # of which one is proposed as the next mask's rho


def execute(session: Session) -> None:
    """Run the stage and say where the masks are."""
    from alphatoken.jobs.given import refuse_other_settings

    refuse_other_settings(session.run, session.overrides)
    tell(session, make(session))


def make(session: Session) -> dict[str, Any]:
    """Run the stage; returns the mask's summary."""
    from alphatoken.pipeline.mask.stage import make_mask

    return make_mask(session.run)


def tell(session: Session, summary: dict[str, Any]) -> None:
    """Three lines on stdout: where the masks are, what was kept, and what to type next."""
    from alphatoken.pipeline.mask.layout import mask_place
    from alphatoken.pipeline.run.progress import counted
    from alphatoken.pipeline.run.redaction import redacted

    settings = session.settings
    place = session.storage.shown(mask_place(settings.mask.name))
    told = f"kept:  {summary['kept_fraction']:.1%}"
    if summary["loss_weight"]:
        told = f"weigh: {summary['loss_weight']['mean']:.3f} on average, all labels kept,"
    own = "".join(f" {shlex.quote(override)}" for override in _overrides(settings.mask))
    place_given = shlex.quote(f"run.dir={quoted(redacted(settings.run.dir))}")
    left = [rho for rho in OTHERS if rho != settings.mask.rho and not session.storage.exists(mask_place(f"rho-{rho}"))]
    following = f"alphatoken inspect {shlex.quote(redacted(settings.run.dir))} --mask {settings.mask.name}"
    if summary.get("schedule") == "rehearsal":  # another rho is another rehearsal
        following = f"alphatoken report {place_given}"
    elif left and settings.mask.score != "full" and settings.mask.rule != "positive":  # which look at no rho
        following = f"alphatoken mask {place_given}{own} mask.rho={left[0]} mask.name=rho-{left[0]}"
    only = sum(one["rows_with_only_always_kept"] for one in summary.get("branches", {"": summary}).values())
    for line in (
        f"masks: {place}",
        f"{told} of {summary['response_tokens']:,} response tokens; {counted(only, 'examples')} with mask.always_keep alone",
        f"next:  {following}",
    ):
        print(line)


def _overrides(settings: MaskSettings) -> list[str]:
    """What makes another mask of the same kind, but for rho and name: all that is not the default."""
    usual, own = asdict(MaskSettings()), asdict(settings)
    changed = {key: value for key, value in own.items() if value != usual[key] and key not in ("rho", "name")}
    return overrides({f"mask.{key}": value for key, value in changed.items()})


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["mask", *sys.argv[1:]]))
