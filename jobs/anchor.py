"""alphatoken anchor: warm-up if asked, Fisher, validation gradient, directions."""

import sys

from jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from pipeline.stages.anchor import run_anchor

    models = session.models
    run_anchor(
        session.storage,
        session.manifest,
        session.settings,
        models.checkpoints,
        models.reference,
        session.cluster,
        session.progress,
    )


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["anchor", *sys.argv[1:]]))
