"""alphatoken run: every stage in order; skips what is already done."""

import sys

from jobs import anchor, mask, prepare, report, value
from jobs.session import Session


def execute(session: Session) -> None:
    """Run all stages."""
    for stage in (prepare, anchor, value, mask, report):
        stage.execute(session)


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
