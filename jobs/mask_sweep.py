"""The points of a sweep over mask.* that are left to make, run by run: the rows are read once for all masks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alphatoken.jobs.given import refuse_other_settings
from alphatoken.jobs.session import Session
from alphatoken.pipeline.mask.stage import BegunMask, begin_mask, make_masks
from alphatoken.pipeline.run.failure import first_line


@dataclass(frozen=True, slots=True)
class BegunPoint:
    """A point of the sweep whose mask has been begun. ``name``: of the point, for messages."""

    number: int
    name: str
    session: Session
    mask: BegunMask


def begin(number: int, name: str, session: Session) -> BegunPoint:
    """Check the point's settings. Raises SettingsWrong and RunFailed."""
    refuse_other_settings(session.run, session.overrides)
    return BegunPoint(number, name, session, begin_mask(session.run))


def make_all(begun: Sequence[BegunPoint], failed: Callable[[BegunPoint, Exception], None]) -> None:
    """Make the masks, those together that can be; ``failed`` is told of the points that could not be made.

    Where masks fail together, which of them is at fault is found by making each by itself.
    """
    groups: dict[tuple[str, int], list[BegunPoint]] = {}
    for point in begun:
        groups.setdefault((point.session.storage.root, point.mask.rows_at_once), []).append(point)
    for points in groups.values():
        try:
            make_masks([point.mask for point in points])
        except Exception as error:
            if points[0].session.settings.debug:
                raise
            if len(points) == 1:
                failed(points[0], error)
                continue
            points[0].session.progress.say(f"{len(points)} masks together failed ({first_line(error)}): one by one")
            for point in points:
                try:
                    make_masks([point.mask])
                except Exception as own:
                    failed(point, own)
        points[0].session.tell()
