"""Names in the plot of a trial cover neither each other nor a dot, as long as there is room."""

import itertools
import random

import pytest

from alphatoken.pipeline.report.dot_plot import DOT, HEIGHT, WIDTH, _box, _overlap, dot_plot


def line(name: str, loss: float, moved: float) -> dict:
    return {"name": name, "kind": "mask", "adaptation": (loss, 0.001), "retention": (moved, 0.001)}


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_a_crowd_stand_apart(seed):
    drawn = random.Random(seed)
    crowd = [line(f"rho-0.{i}", 1 + drawn.random() / 50, 0.01 + drawn.random() / 1000) for i in range(10)]
    found = dot_plot({"lines": [*crowd, line("far-away", 1.5, 0.06)], "winner": "rho-0.1"}).dots
    boxes = []
    for dot in found:
        beside = dot.label.x + (8 if dot.label.end else -8)
        assert beside == pytest.approx(dot.x)
        boxes.append(_box(dot.x, 6.6 * len(dot.name), dot.label.y, dot.label.end))
    assert not any(_overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    dots = [(dot.x - DOT, dot.y - DOT, dot.x + DOT, dot.y + DOT) for dot in found]
    assert not any(_overlap(box, dot) for box, dot in itertools.product(boxes, dots))
    assert all(
        box[0] >= 0 and box[2] <= WIDTH and 0 <= dot.label.y <= HEIGHT for box, dot in zip(boxes, found, strict=True)
    )
    assert [dot.wins for dot in found].count(True) == 1 and found[-1].label.away is False


def test_a_trial_of_one_place_is_drawn():
    found = dot_plot(
        {"lines": [line("a", 1.0, 0.01), {**line("untouched", 9.0, 0.0), "kind": "untouched"}], "winner": "full"}
    )
    assert [dot.name for dot in found.dots] == ["a"]
