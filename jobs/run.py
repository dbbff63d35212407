"""alphatoken run: every stage in order; skips what is already done, and anchor where the method needs none."""

import sys

from alphatoken.jobs import anchor, mask, prepare, report, value
from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run all stages."""
    from alphatoken.pipeline.mask.stage import check_norms
    from alphatoken.pipeline.value.selection import check_models

    check_norms(session.settings.mask, session.settings.valuation.gradient_norm)
    valuation = session.settings.valuation
    check_models(session.settings, session.run.models)
    for stage in (prepare, anchor, value):
        if stage is anchor and not valuation.needs_directions:
            session.progress.say(f"anchor: skipped, since valuation.method={valuation.method} needs no directions")
        else:
            stage.execute(session)
    session.end_workers()  # what is left is the driver's
    summary = mask.make(session)
    report.execute(session)
    mask.tell(session, summary)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
