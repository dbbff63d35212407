"""alphatoken prepare: read, template, tokenize, validate, shard."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from alphatoken.pipeline.prepare.stage import run_prepare

    settings, models = session.with_data(), session.models
    run_prepare(session.storage, session.manifest, settings, models.policy, session.cluster, session.progress)


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
