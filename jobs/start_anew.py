"""run.overwrite: what a command makes is removed to be made again, once it is known that it can be."""

from __future__ import annotations

from alphatoken.jobs.session import Session
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.settings import STAGES

SHOWN = 4  # masks in a line


def start_anew(command: str, session: Session) -> None:
    """Remove run.overwrite and all that follows it. Raises SettingsWrong and RunFailed, with everything as it was, for a
    stage that the command does not make, and for what the stage itself would refuse."""
    first = session.settings.run.overwrite
    assert first is not None
    if command not in ("run", first):
        raise SettingsWrong(
            [f"run.overwrite={first}: `alphatoken {command}` would remove {first} and not make it: use `alphatoken run`"
             f" or `alphatoken {first}`"]
        )  # fmt: skip
    _check(command, session, first)
    masks = [stage.partition("/")[2] for stage in session.manifest.content["stages"] if stage.startswith("mask/")]
    if masks:
        more = f" and {len(masks) - SHOWN} more" if len(masks) > SHOWN else ""
        session.progress.say(f"run.overwrite={first}: masks that are removed: {', '.join(masks[:SHOWN])}{more}")
    session.manifest.discard(first)


def _check(command: str, session: Session, first: str) -> None:
    from alphatoken.jobs.given import TAKEN, refuse_other_settings

    if command in TAKEN:
        refuse_other_settings(session.run, session.overrides, command)
    if command == "mask":
        from alphatoken.pipeline.mask.inputs import mask_inputs

        mask_inputs(session.run)
        return
    run, settings = session.run, session.settings
    if command == "value":
        from alphatoken.pipeline.value.inputs import checked_anchor

        if settings.valuation.needs_directions:
            checked_anchor(run)
    elif command == "anchor":
        from alphatoken.pipeline.anchor.inputs import drift_of

        if wrong := settings.anchor_problems(run.manifest.pairs):
            raise SettingsWrong(wrong)
        drift_of(settings, run.models)
    elif command == "prepare":
        from alphatoken.pipeline.prepare.inputs import open_data, prepare_inputs

        run = session.run_with_data()
        prepare_inputs(run, open_data(run.settings))
    else:
        _check_run(session, first)


def _check_run(session: Session, first: str) -> None:
    """Also of the data and the stages before: to know their state is to open what they are made of."""
    from alphatoken.jobs.run import check
    from alphatoken.pipeline.plan.resume import resume_state

    check(session)
    states = resume_state(session.run_with_data())
    for stage in STAGES[: STAGES.index(first)]:
        if states[stage]["state"] == "refused":
            changed = ", ".join(states[stage]["changed"])
            raise SettingsWrong(
                [f"run.overwrite={first}: {stage} of {session.storage.root} was made with another {changed}: give its own, or "
                 f"run.overwrite={stage}"]
            )  # fmt: skip
