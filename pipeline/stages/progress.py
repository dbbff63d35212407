"""Progress that is visible the whole time: bars on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

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

from pipeline.stages.redaction import redacted

PLAIN_SECONDS = 30.0


class Progress:
    """Shows tasks with a total, a unit and a rate; use as a context manager around a run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.bars: RichProgress | None = None
        if self.console.is_terminal:
            self.bars = RichProgress(
                SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
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
        self.done, self.started, self.said = 0, time.monotonic(), time.monotonic()
        if progress.bars:
            self.bar = progress.bars.add_task(name, total=total, unit=unit, rate="")
        else:
            progress.say(f"{name}: started" + (f", {total:,} {unit}" if total else ""))

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self.started
        if self.progress.bars:
            self.progress.bars.stop_task(self.bar)
        elif kind is None:
            self.progress.say(f"{self.name}: done, {self.done:,} {self.unit} in {seconds:.0f} s")

    def advance(self, units: int) -> None:
        """Add finished units."""
        self.at(self.done + units)

    def at(self, done: int) -> None:
        """Set the finished units; call it often, also without a change, so that the display stays alive."""
        self.done = done
        seconds = time.monotonic() - self.started
        rate = f"{done / seconds:,.{0 if done > 10 * seconds else 2}f} {self.unit}/s" if done and seconds > 0 else ""
        if self.progress.bars:
            self.progress.bars.update(self.bar, completed=done, rate=rate)
        elif time.monotonic() - self.said >= PLAIN_SECONDS:
            self.said = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            self.progress.say(f"{self.name}: {done:,}{of} {self.unit}, {rate or 'starting'}, {seconds:.0f} s")
