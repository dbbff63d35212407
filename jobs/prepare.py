"""alphatoken prepare: read, template, tokenize, validate, shard."""

import sys

from alphatoken.jobs.session import Session


def execute(session: Session) -> None:
    """Run the stage."""
    from alphatoken.pipeline.prepare.stage import make_prepared

    make_prepared(session.run_with_data())


if __name__ == "__main__":
    from alphatoken.jobs.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
