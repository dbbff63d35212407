"""alphatoken run: every stage in order; skips what is already done, and anchor where no score looks at a direction."""

import sys

from alphatoken.jobs import anchor, mask, prepare, report, trial, value
from alphatoken.jobs.session import Session
from alphatoken.pipeline.run.failure import SettingsWrong


def execute(session: Session) -> None:
    """Run all stages. What can be known to be wrong is said before the first that holds a model."""
    from alphatoken.pipeline.mask.always_keep import always_keep_ids

    check(session)
    valuation = session.settings.valuation
    for stage in (prepare, anchor, value):
        if stage is anchor and not valuation.needs_directions:
            scores = ",".join(valuation.scores)
            session.progress.say(f"anchor: skipped, since valuation.scores=[{scores}] looks at no direction")
        else:
            stage.execute(session)
        if stage is prepare:
            always_keep_ids(session.settings.mask.always_keep, session.manifest)
    if not session.settings.trial.auto:
        session.end_workers()  # what is left is the driver's
    summary = mask.make(session)
    if session.settings.trial.auto:
        trial.execute_auto(session)
        session.end_workers()
    report.make(session)
    mask.tell(session, summary)


def check(session: Session) -> None:
    """Raise SettingsWrong for what no stage has to run to know."""
    from alphatoken.pipeline.anchor.coverage import refuse_unscored
    from alphatoken.pipeline.anchor.inputs import drift_of
    from alphatoken.pipeline.value.inputs import check_reference

    if wrong := mask_problems(session):
        raise SettingsWrong(wrong)
    check_reference(session.settings, session.run.models)
    if session.settings.valuation.needs_directions:
        drift_of(session.settings, session.run.models)
        if not session.manifest.done("anchor"):
            refuse_unscored(session.run)
    if session.settings.trial.auto:
        trial.check_names(session)


def mask_problems(session: Session) -> list[str]:
    """Why the mask cannot be made from the values that this run makes; looks at the data where that depends on its kind."""
    from alphatoken.pipeline.prepare.inputs import open_data

    found = {pairs: session.settings.mask_problems(pairs) for pairs in (False, True)}
    if found[False] == found[True]:
        return found[False]
    return found[open_data(session.run_with_data().settings).preference]


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
