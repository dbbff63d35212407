"""alphatoken report: one self-contained HTML page about a run."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Write the page of what is there; keys that ask for something else are refused."""
    from alphatoken.jobs.given import refuse_other_settings

    refuse_other_settings(session.run, session.overrides, "report")
    make(session)


def make(session: Session) -> None:
    """Write the page; where it is, is said with the progress."""
    from alphatoken.pipeline.report.stage import make_report

    make_report(session.run)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["report", *sys.argv[1:]]))
