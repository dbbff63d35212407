"""alphatoken value: score every response token."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from alphatoken.jobs.given import refuse_other_settings
    from alphatoken.pipeline.value.stage import make_values

    refuse_other_settings(session.run, session.overrides, "value")
    make_values(session.run)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["value", *sys.argv[1:]]))
