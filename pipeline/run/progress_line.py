"""One line about a task that runs, in as many columns as the terminal has: what matters most goes last."""

from __future__ import annotations

from dataclasses import dataclass

BAR = 20  # columns of the bar
SEPARATOR = "  "
EARLY = 1 / 20  # of the total: so little says nothing by itself


@dataclass(frozen=True, slots=True)
class Facts:
    """How far a task is. ``total``: None where it is not known; ``seconds``: since it began; ``note``: what else to show;
    ``first``: units and seconds when the first units were seen, before which a stage reads and loads.
    """

    name: str
    done: int
    total: int | None
    unit: str
    seconds: float
    note: str = ""
    first: tuple[int, float] = (0, 0.0)

    @property
    def rate(self) -> float | None:
        """Units per second since it began; None before the first."""
        return self.done / self.seconds if self.done and self.seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at the pace since the first units, or while there are no others since the beginning;
        None where that cannot be said."""
        if not self.total or not self.done:
            return None
        units, seconds = self.done - self.first[0], self.seconds - self.first[1]
        if not units and self.done < EARLY * self.total:
            return None  # whatever came before the first unit is not to be reckoned for every other
        units, seconds = (units, seconds) if units else (self.done, self.seconds)
        return max(0, self.total - self.done) * seconds / units

    @property
    def shown_rate(self) -> str:
        """The rate with its unit, '' before the first."""
        return f"{self.rate:,.{0 if self.rate > 10 else 2}f} {self.unit}/s" if self.rate else ""


def line(facts: Facts, width: int) -> str:
    """At most ``width`` characters. The counter stays whatever the width; then time left, note, elapsed time, bar, rate."""
    counter = f"{facts.done:,}/{facts.total:,} {facts.unit}" if facts.total else f"{facts.done:,} {facts.unit}"
    left = "" if facts.left is None else f"{clock(facts.left)} left"
    by_weight = {
        "counter": counter, "left": left, "note": facts.note, "elapsed": clock(facts.seconds), "bar": _bar(facts),
        "rate": facts.shown_rate,
    }  # fmt: skip
    room = width - len(facts.name)
    shown = set()
    for key, text in by_weight.items():
        if text and (key == "counter" or room >= len(text) + len(SEPARATOR)):
            shown.add(key)
            room -= len(text) + len(SEPARATOR)
    name = facts.name if room >= 0 else facts.name[: max(0, len(facts.name) + room - 1)] + "…"
    order = ("bar", "counter", "left", "elapsed", "rate", "note")
    return SEPARATOR.join([name, *(by_weight[key] for key in order if key in shown)])[:width]


def clock(seconds: float) -> str:
    """H:MM:SS, or M:SS below an hour."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600:,}:{minutes}" if whole >= 3600 else minutes


def _bar(facts: Facts) -> str:
    if not facts.total:
        return ""
    full = min(BAR, BAR * facts.done // facts.total)
    return "█" * full + "░" * (BAR - full)
