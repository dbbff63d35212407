"""What is shown while something runs: at every width, with the time that is left, and each remark once."""

import io
import re

import pytest
from rich.console import Console

from alphatoken.pipeline.run.progress import Progress, counted
from alphatoken.pipeline.run.progress_line import Facts, clock, line

HALF = Facts("anchor: validation gradient", 12_402, 21_852, "tokens", 91.0, "0/1 shards")


@pytest.mark.parametrize("width", range(24, 140))
def test_the_counter_stays_at_every_width(width):
    shown = line(HALF, width)
    assert len(shown) <= width
    if width >= 50:
        assert "12,402/21,852 tokens" in shown and shown.startswith("anchor: ")
    if width >= 70:
        assert "1:09 left" in shown and shown.startswith("anchor: validation gradient")
    if width >= 120:
        assert "136 tokens/s" in shown and "0/1 shards" in shown and "1:31" in shown and "█" in shown


def test_the_time_left_is_known_after_the_first_unit_however_slow():
    """Where units come minutes apart a rate over the last seconds would never be known."""
    assert Facts("x", 1, 4, "shards", 300.0).left == pytest.approx(900.0)
    assert Facts("x", 0, 4, "shards", 300.0).left is None and Facts("x", 5, None, "rows", 3.0).left is None
    assert Facts("x", 9, 4, "shards", 300.0).left == 0.0


def test_what_comes_before_the_first_units_is_not_reckoned_for_the_others():
    assert Facts("x", 1, 840, "steps", 49.0, first=(1, 49.0)).left is None
    assert Facts("x", 21, 841, "steps", 89.0, first=(1, 49.0)).left == pytest.approx(820 * 2)
    assert Facts("x", 1, 4, "shards", 300.0, first=(1, 300.0)).left == pytest.approx(900.0)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (69, "1:09"), (3599, "59:59"), (3600, "1:00:00"), (400_000, "111:06:40")],
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_a_narrow_terminal_shows_counter_and_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=70, height=20, color_system=None)
    with Progress(console) as progress, progress.task("value", 21_852, "tokens") as task:
        task.started -= 91.0  # as if it had run as long
        task.note("0/1 shards")
        task.at(12_402)
        progress.bars.refresh()
        shown = console.file.getvalue()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "value  12,402/21,852 tokens  1:09 left" in frames or ("12,402/21,852 tokens  1:09 left" in frames)
    assert all(len(row.rstrip()) <= 70 for row in re.split(r"[\r\n]", frames))


def test_a_remark_is_made_once_and_warnings_at_every_level():
    for level, said in (("info", ["a", "b", "c"]), ("warning", ["b", "c"])):
        console = Console(file=io.StringIO(), width=80)
        with Progress(console, level) as progress:
            progress.say("a")
            for _ in range(3):
                progress.once("b")
            progress.warn("c")
        assert console.file.getvalue().split() == said


def test_one_is_said_as_one():
    console = Console(file=io.StringIO(), width=80)
    with Progress(console) as progress, progress.task("weights", 1, "models") as task:
        task.advance(1)
    assert console.file.getvalue() == "weights: started, 1 model\nweights: done, 1 model in 0 s\n"
    assert [counted(n, "rows") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
