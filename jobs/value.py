"""alphatoken value: score every response token."""

import sys

from jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from pipeline.stages.value import run_value

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
    from jobs.cli import main

    sys.exit(main(["value", *sys.argv[1:]]))
