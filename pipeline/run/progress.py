"""Progress that is visible the whole time: bars on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, SpinnerColumn
from rich.progress import Task as RichTask
from rich.text import Text

from alphatoken.pipeline.run.progress_line import Facts, clock, line
from alphatoken.pipeline.run.redaction import redacted

if TYPE_CHECKING:
    from alphatoken.pipeline.run.run_log import RunLog

PLAIN_SECONDS = 30.0
SPINNER = 2  # columns, with the blank after it


def counted(number: int, unit: str) -> str:
    """``number`` of ``unit``, which is a plural in s."""
    return f"{number:,} {unit.removesuffix('s') if number == 1 else unit}"


class _Line(ProgressColumn):
    """The whole of a task in one column, so that a narrow terminal does not cut what matters."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: RichTask) -> Text:
        """As ``line``, as wide as the terminal is now."""
        shown: Task = task.fields["shown"]
        return Text(line(shown.facts, self.console.width - SPINNER), no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows tasks with a total, a unit and a rate; use as a context manager around a run.

    Where ``log`` is set, every task's numbers go there too: every 30 s and at its end.
    """

    def __init__(self, console: Console | None = None, level: str = "info") -> None:
        """``level``: log_level; at ``warning`` nothing but ``warn`` and ``once`` is shown."""
        self.console = console or Console(file=sys.stderr)
        self.quiet = level == "warning"
        self.log: RunLog | None = None
        self.said: set[str] = set()
        self.bars: RichProgress | None = None
        if self.console.is_terminal and not self.quiet:
            self.bars = RichProgress(SpinnerColumn(), _Line(self.console), console=self.console)

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def say(self, text: str) -> None:
        """One line that stays: how far it is, what was found."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """One line that stays at every level: what somebody should know who reads nothing else."""
        self.console.print(redacted(text), highlight=False, markup=False, soft_wrap=True)

    def once(self, text: str) -> None:
        """As ``warn``, and nothing where it has been said before: a sweep has one remark for all of its points."""
        if text not in self.said:
            self.said.add(text)
            self.warn(text)

    def task(self, name: str, total: int | None, unit: str) -> Task:
        """Begin to show a task of ``total`` units (None: unknown)."""
        return Task(self, name, total, unit)


class Task:
    """One line of progress. Use as a context manager, so that it ends whatever happens."""

    def __init__(self, progress: Progress, name: str, total: int | None, unit: str) -> None:
        self.progress, self.name, self.total, self.unit = progress, name, total, unit
        self.done, self.noted, self.started, self.said = 0, "", time.monotonic(), time.monotonic()
        self.first = (0, 0.0)  # units and seconds
        if progress.bars:
            self.bar = progress.bars.add_task(name, total=total, shown=self)
        else:
            progress.say(f"{name}: started" + (f", {counted(total, unit)}" if total else ""))

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress.bars:
            self.progress.bars.remove_task(self.bar)  # bars are for what runs; what is done stays as a line
        if kind is None:
            self.progress.say(
                f"{self.name}: done, {counted(self.done, self.unit)} in {self.seconds:.0f} s" + self._suffix()
            )
        self._log("task", failed=kind is not None)

    @property
    def facts(self) -> Facts:
        """How far it is now."""
        return Facts(self.name, self.done, self.total, self.unit, self.seconds, self.noted, self.first)

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """What else to show beside the rate, such as shards and rows."""
        self.noted = text

    def advance(self, units: int) -> None:
        """Add finished units."""
        self.at(self.done + units)

    def at(self, done: int) -> None:
        """Set the finished units; call it often, also without a change, so that the display stays alive."""
        if done and not self.done:
            self.first = done, self.seconds
        self.done = done
        if self.progress.bars:
            self.progress.bars.update(self.bar, completed=done)
        if time.monotonic() - self.said < PLAIN_SECONDS:
            return
        self.said = time.monotonic()
        self._log("progress")
        if not self.progress.bars:
            of = f" of {self.total:,}" if self.total else ""
            now = self.facts
            told = [now.shown_rate or "starting", *([self.noted] if self.noted else []), f"{now.seconds:.0f} s"]
            if now.left is not None:
                told.append(f"about {clock(now.left)} left")
            self.progress.say(f"{self.name}: {done:,}{of} {self.unit}, {', '.join(told)}")

    def _suffix(self) -> str:
        return f" ({self.noted})" if self.noted else ""

    def _log(self, kind: str, **facts: bool) -> None:
        if self.progress.log:
            seconds = self.seconds
            self.progress.log.event(
                kind, self.name, done=self.done, total=self.total, unit=self.unit, seconds=round(seconds, 3),
                per_second=round(self.done / seconds, 3) if seconds > 0 else None, note=self.noted, **facts,
            )  # fmt: skip
