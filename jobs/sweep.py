"""`-m`: run every point of a sweep, go on past the ones that fail, and compare the masks at the end.

Points that differ in mask.* alone are masks of one run directory. Points that differ in anything else get a run
directory each, below run.dir, and share with the earlier ones what is equal upstream.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from alphatoken.data_schemas import COMPONENTS
from alphatoken.jobs.config import load
from alphatoken.jobs.mask_sweep import BegunPoint, begin, make_all
from alphatoken.jobs.points import Point, Swept, expand, mask_name, point_name
from alphatoken.jobs.session import Session
from alphatoken.jobs.start_anew import start_anew
from alphatoken.pipeline.mask.comparison import ComparedMask, MaskPlace, branches_of, compare
from alphatoken.pipeline.mask.layout import has_shards
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

DEFAULT_MASK = "default"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """A point with its settings: run.dir and mask.name are its own."""

    name: str
    settings: Settings
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PointFailure:
    """A point that did not finish, and why in one line."""

    name: str
    reason: str


def sweep_points(
    overrides: Sequence[str], recorded: Mapping[str, Any] | None = None
) -> tuple[list[SweepPoint], list[PointFailure]]:
    """Compose every point; those with wrong settings are failures already.

    Raises SettingsWrong where no point can be run, and where two points would write to the same place.
    """
    composed: list[tuple[Point, Settings]] = []
    failures: list[PointFailure] = []
    problems: list[str] = []
    every = expand(overrides)
    for point in every:
        try:
            composed.append((point, load(point.overrides, recorded)))
        except SettingsWrong as error:
            failures.append(PointFailure(point.name, str(error)))
            problems += [problem for problem in error.problems if problem not in problems]
    if not composed:
        raise SettingsWrong(problems)
    points = _placed(composed, every if failures else [])
    places = [(p.settings.run.dir, p.settings.mask.name) for p in points]
    double = {place for place in places if places.count(place) > 1}
    if double:
        run, name = sorted(double)[0]
        raise SettingsWrong(
            [f"several points of the sweep would write {run}/masks/{name}: give each its own mask.name, or one to all"]
        )
    return points, failures


def _placed(composed: Sequence[tuple[Point, Settings]], every: Sequence[Point]) -> list[SweepPoint]:
    """Give every point its mask.name and run.dir, unless they are swept over; a mask.name that is given begins the names.

    ``every``: all points, where some did not compose: the places of the others are what they would be among all.
    """
    upstream = {_upstream(settings) for _, settings in composed}
    masks = {repr(replace(settings.mask, name="")) for _, settings in composed}
    several_upstream, several_masks = (
        len(own) > 1 or len({_of_kind(point, of_masks) for point in every}) > 1
        for own, of_masks in ((upstream, False), (masks, True))
    )
    placed = []
    for point, settings in composed:
        above = _of_kind(point, masks=False)
        own = tuple(one for one in point.swept if _is_mask(one) or not several_upstream)
        if several_upstream and "run.dir" not in {one.key for one in point.swept}:
            place = f"{settings.run.dir.rstrip('/')}/{point_name(above)}"
            settings = replace(settings, run=replace(settings.run, dir=place))
        if own and several_masks:
            name = mask_name(point, own, settings.mask.name)
            settings = replace(settings, mask=replace(settings.mask, name=name))
        placed.append(SweepPoint(point.name, settings, point.overrides))
    return placed


def _of_kind(point: Point, masks: bool) -> tuple[Swept, ...]:
    """What is swept of masks, or of what comes before them."""
    return tuple(one for one in point.swept if _is_mask(one) == masks)


def _is_mask(swept: Swept) -> bool:
    return swept.key == "mask" or swept.key.startswith("mask.")


def _upstream(settings: Settings) -> str:
    """What tells two points apart that cannot be masks of one run directory."""
    return repr(replace(settings, mask=Settings().mask))


def run_sweep(command: str, points: Sequence[SweepPoint], progress: Progress) -> list[PointFailure]:
    """Run ``command`` at every point, in order, in this process; one Ray for all. Returns the points that failed."""
    failures: list[PointFailure] = []
    several = len({point.settings.run.dir for point in points}) > 1
    begun: list[BegunPoint] = []  # masks, which are made at the end, together
    finished: list[Storage] = []

    def fail(number: int, name: str, error: Exception) -> None:
        failures.append(PointFailure(name, _reason(error)))
        progress.say(f"{number}/{len(points)} {name} failed: {failures[-1].reason}")

    with ExitStack() as stack:  # the first session that starts Ray ends it, after the last point
        ready: set[str] = set()  # run directories that were started anew, or share what they can
        sessions: dict[str, Session] = {}  # each run directory has one, which holds its lock until the end
        for number, point in enumerate(points, 1):
            progress.say(f"{number}/{len(points)} {point.name}")
            settings = point.settings
            try:
                root = Storage(settings.run.dir).root
                if root not in sessions:
                    session = stack.enter_context(Session(settings, progress))
                    session.claim()
                    sessions[root] = session  # once it is claimed: the next point has to ask again where it was refused
                session = sessions[root]
                session.change(settings, point.overrides)
                if root not in ready:
                    if settings.run.overwrite:
                        start_anew(command, session)
                    if command != "mask":
                        session.share(finished if several else [])
                    ready.add(root)
                if command == "mask":
                    begun.append(begin(number, point.name, session))
                    continue
                with redirect_stdout(io.StringIO()):  # a stage's last words are for a single run; here is a table
                    importlib.import_module(f"{__package__}.{command}").execute(session)
                session.tell()
                finished.append(session.storage)
            except KeyboardInterrupt:
                raise
            except Exception as error:
                if settings.debug:
                    raise
                fail(number, point.name, error)
            finally:
                for session in sessions.values():
                    session.end_workers()
        make_all(begun, lambda one, error: fail(one.number, one.name, error))
    return failures


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, RunFailed | SettingsWrong)
    return text if expected else f"{text} ({type(error).__name__}; debug=true shows where)"


@dataclass(frozen=True, slots=True)
class ComparedMasks:
    """The masks that a sweep made, the baseline first where it is none of them."""

    rows: list[ComparedMask]
    baseline: MaskPlace
    several_runs: bool


def compared_masks(points: Sequence[SweepPoint], failures: Sequence[PointFailure]) -> ComparedMasks | None:
    """The masks that were made, compared with the run's default mask, else with the first; None where none was made."""
    failed = {failure.name for failure in failures}
    made = [point for point in points if point.name not in failed]
    if not made:
        return None
    places = [MaskPlace(Storage(p.settings.run.dir), p.settings.mask.name) for p in made]
    standard = MaskPlace(places[0].storage, DEFAULT_MASK)
    baseline = standard if has_shards(standard.storage, DEFAULT_MASK) else places[0]
    others = [baseline] if all((b.storage.root, b.name) != _key(baseline) for b in places) else []
    several = len({place.storage.root for place in places}) > 1
    branches = [replace(place, branch=b) for place in (*others, *places) for b in branches_of(place.storage)]
    return ComparedMasks(compare(baseline, branches), baseline, several)


def print_comparison(found: ComparedMasks) -> None:
    """The table of the masks that were made, on stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))
    console.print(comparison_table(found.rows, found.baseline, found.several_runs))


def _key(place: MaskPlace) -> tuple[str, str]:
    return place.storage.root, place.name


def comparison_table(rows: Sequence[ComparedMask], baseline: MaskPlace, several_runs: bool) -> Table:
    """Kept fraction, agreement with the baseline, and what decides: one row per mask."""
    components = COMPONENTS if any(row.contributions for row in rows) else ()  # no mask of the paper's value
    caption = (
        f"agreement: Jaccard index with the mask {baseline.name}; loss: mean of kept tokens, nats; only eos: examples that "
        "keep nothing but mask.always_keep"
    )
    if components:
        caption += "; the rest: each component's share in what kept tokens have over masked ones, weights included"
    table = Table(caption=caption, caption_justify="left")
    if several_runs:
        table.add_column("run", overflow="fold")
    table.add_column("mask", overflow="fold")
    for title in ("kept", "agreement", "loss", "only\neos", *[name.replace("_", "\n") for name in components]):
        table.add_column(title, justify="right")
    for row in rows:
        run = [row.place.storage.root.rpartition("/")[2]] if several_runs else []
        shares = [_percent(row.contributions[c]) if row.contributions else "-" for c in components]
        loss = "-" if row.loss_of_kept is None else f"{row.loss_of_kept:.3f}"
        agreement = "-" if row.agreement is None else f"{row.agreement:.3f}"
        table.add_row(
            *run, row.place.label, f"{row.kept_fraction:.1%}", agreement, loss, f"{row.only_always:,}", *shares
        )
    return table


def _percent(share: float) -> str:
    text = f"{share:+.1%}"
    return "0.0%" if text in ("-0.0%", "+0.0%") else text


def print_failures(command: str, count: int, failures: Sequence[PointFailure]) -> None:
    """Name the failed points, last on stderr."""
    for failure in failures:
        print(f"alphatoken {command}: {failure.name}: {failure.reason}", file=sys.stderr)
    if failures:
        names = ", ".join(failure.name for failure in failures)
        print(f"alphatoken {command}: {len(failures)} of {count} points failed: {names}", file=sys.stderr)
