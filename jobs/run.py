"""alphatoken run: every stage in order; skips what is already done, and anchor where no score looks at a direction."""

import sys

from alphatoken.jobs import anchor, mask, prepare, report, value
from alphatoken.jobs.session import Session
from alphatoken.pipeline.run.failure import SettingsWrong


def execute(session: Session) -> None:
    """Run all stages."""
    from alphatoken.pipeline.value.inputs import check_reference

    if wrong := session.settings.mask_problems(pairs=session.settings.data.format == "preference"):
        raise SettingsWrong(wrong)
    check_reference(session.settings, session.run.models)
    valuation = session.settings.valuation
    for stage in (prepare, anchor, value):
        if stage is anchor and not valuation.needs_directions:
            scores = ",".join(valuation.scores)
            session.progress.say(f"anchor: skipped, since valuation.scores=[{scores}] looks at no direction")
        else:
            stage.execute(session)
    session.end_workers()  # what is left is the driver's
    summary = mask.make(session)
    report.execute(session)
    mask.tell(session, summary)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
