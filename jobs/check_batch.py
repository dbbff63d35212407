"""alphatoken check-batch: does a batch that a trainer made train on what the mask keeps? 0 yes, 1 no, with the places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alphatoken.jobs.tool_arguments import ToolArguments

MASK = "default"


def parser() -> ToolArguments:
    """What the command takes."""
    parser = ToolArguments("check-batch")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("batch", metavar="FILE", nargs="+")
    parser.add_argument("--mask", default=MASK)
    parser.add_argument("--shifted", action="store_true")
    return parser


def execute(arguments: Sequence[str]) -> int:
    """Compare and print; 1 where anything differs."""
    from alphatoken.pipeline.trainers.batch_check import check
    from alphatoken.pipeline.trainers.batch_file import read_batch
    from alphatoken.pipeline.trainers.batch_report import report
    from alphatoken.pipeline.trainers.source import open_mask

    given = parser().parse_args(list(arguments))
    source, status = open_mask(given.run, given.mask), 0
    if source.weighted:
        print(
            f"weights: mask {source.name} is soft weights (mask.rule=weight): labels are compared, loss_weight is not"
        )
    for file in given.batch:
        verdict = check(read_batch(Path(file)), source, shifted=given.shifted)
        if len(given.batch) > 1:
            print(f"{file}:")
        print("\n".join(report(verdict, source.name)))
        status = status or (0 if verdict.agrees else 1)
    return status
