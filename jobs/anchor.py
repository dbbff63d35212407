"""alphatoken anchor: warm-up if asked, Fisher, validation gradient, directions."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from alphatoken.jobs.given import refuse_other_settings
    from alphatoken.pipeline.anchor.stage import make_anchors

    refuse_other_settings(session.run, session.overrides, "anchor")
    make_anchors(session.run)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["anchor", *sys.argv[1:]]))
