"""alphatoken value: score every response token."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from alphatoken.pipeline.value.stage import run_value

    models = session.models
    run_value(
        session.storage,
        session.manifest,
        session.settings,
        models.checkpoints,
        session.cluster,
        session.progress,
        models.reference,
    )


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["value", *sys.argv[1:]]))
