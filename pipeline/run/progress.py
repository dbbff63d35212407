"""Progress that is visible the whole time: bars on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from alphatoken.pipeline.run.redaction import redacted

if TYPE_CHECKING:
    from alphatoken.pipeline.run.run_log import RunLog

PLAIN_SECONDS = 30.0


class Progress:
    """Shows tasks with a total, a unit and a rate; use as a context manager around a run.

    Where ``log`` is set, every task's numbers go there too: every 30 s and at its end.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.log: RunLog | None = None
        self.bars: RichProgress | None = None
        if self.console.is_terminal:
            self.bars = RichProgress(
                SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("ETA"),
                TimeRemainingColumn(compact=True), console=self.console,
            )  # fmt: skip

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
        """One line that stays."""
        self.console.print(redacted(text), highlight=False, markup=False, soft_wrap=True)

    def task(self, name: str, total: int | None, unit: str) -> Task:
        """Begin to show a task of ``total`` units (None: unknown)."""
        return Task(self, name, total, unit)


class Task:
    """One line of progress. Use as a context manager, so that it ends whatever happens."""

    def __init__(self, progress: Progress, name: str, total: int | None, unit: str) -> None:
        self.progress, self.name, self.total, self.unit = progress, name, total, unit
        self.done, self.noted, self.started, self.said = 0, "", time.monotonic(), time.monotonic()
        if progress.bars:
            self.bar = progress.bars.add_task(name, total=total, unit=unit, rate="", note="")
        else:
            progress.say(f"{name}: started" + (f", {total:,} {unit}" if total else ""))

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress.bars:
            self.progress.bars.remove_task(self.bar)  # bars are for what runs; what is done stays as a line
        if kind is None:
            self.progress.say(f"{self.name}: done, {self.done:,} {self.unit} in {self.seconds:.0f} s" + self._suffix())
        self._log("task", failed=kind is not None)

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """What else to show beside the rate, such as shards and rows."""
        self.noted = text
        if self.progress.bars:
            self.progress.bars.update(self.bar, note=text)

    def advance(self, units: int) -> None:
        """Add finished units."""
        self.at(self.done + units)

    def at(self, done: int) -> None:
        """Set the finished units; call it often, also without a change, so that the display stays alive."""
        self.done = done
        seconds = self.seconds
        rate = f"{done / seconds:,.{0 if done > 10 * seconds else 2}f} {self.unit}/s" if done and seconds > 0 else ""
        if self.progress.bars:
            self.progress.bars.update(self.bar, completed=done, rate=rate)
        if time.monotonic() - self.said < PLAIN_SECONDS:
            return
        self.said = time.monotonic()
        self._log("progress")
        if not self.progress.bars:
            of = f" of {self.total:,}" if self.total else ""
            facts = [rate or "starting", *([self.noted] if self.noted else []), f"{seconds:.0f} s"]
            if self.total and done:
                facts.append(f"about {seconds * (self.total - done) / done:.0f} s left")
            self.progress.say(f"{self.name}: {done:,}{of} {self.unit}, {', '.join(facts)}")

    def _suffix(self) -> str:
        return f" ({self.noted})" if self.noted else ""

    def _log(self, kind: str, **facts: bool) -> None:
        if self.progress.log:
            seconds = self.seconds
            self.progress.log.event(
                kind, self.name, done=self.done, total=self.total, unit=self.unit, seconds=round(seconds, 3),
                per_second=round(self.done / seconds, 3) if seconds > 0 else None, note=self.noted, **facts,
            )  # fmt: skip
