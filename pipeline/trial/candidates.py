"""What is tried: masks, and beside them everything, everything but the first tokens, and a random mask of each size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.maths.masking import rank_of
from alphatoken.pipeline.maths.uniform import uniform
from alphatoken.pipeline.prepare.windows import LATER_WINDOW
from alphatoken.pipeline.run.fingerprint import digest

Labels = list[npt.NDArray[np.int32]]  # of every row of the sample

LEAST_SHARED = 20  # percent: below, one percent more is a mask of another size
UNTOUCHED, FULL, FIRST = "untouched", "full", "full but first tokens"


@dataclass(frozen=True, slots=True)
class Candidate:
    """``kind``: untouched | full | first | random | mask. ``identity``: what decides its labels; of a mask a digest of them,
    which ``known_by_labels`` makes.

    ``percent``: of the response tokens that it keeps, in whole percent; ``random``: that of the random mask beside it.
    ``twin``: an earlier mask that leaves the same of the sample, and so has the same fine-tunes.
    """

    name: str
    kind: str
    percent: int
    identity: str
    random: int = 100
    twin: str | None = None

    @property
    def directory(self) -> str:
        """Of its files below trial/fine-tunes/: the same for masks that leave the same, in whatever order they are named."""
        return f"mask-{self.identity[:16]}" if self.kind == "mask" else f"{self.kind}-{self.percent}"

    def seeds(self, count: int) -> range:
        """The untouched model has no order of rows."""
        return range(1 if self.kind == "untouched" else count)


def candidates(masks: Mapping[str, float]) -> list[Candidate]:
    """``masks``: name -> fraction that it keeps; what tells them apart is for ``known_by_labels``. See ``random_sizes``."""
    found = [
        Candidate(UNTOUCHED, "untouched", 0, UNTOUCHED),
        Candidate(FULL, "full", 100, FULL),
        Candidate(FIRST, "first", 100, FIRST),
    ]
    beside = random_sizes({percent_of(kept) for kept in masks.values()} - {100})
    for name, kept in masks.items():
        percent = percent_of(kept)
        found.append(Candidate(name, "mask", percent, "", beside.get(percent, 100)))
    sizes = sorted(set(beside.values()))
    return found + [Candidate(random_name(size), "random", size, f"random {size}", size) for size in sizes]


def random_sizes(percents: Iterable[int]) -> dict[int, int]:
    """The size of the random mask that stands beside masks of each size: their own, of neighbours the larger one's."""
    found: dict[int, int] = {}
    for percent in sorted(percents, reverse=True):
        shared = percent >= LEAST_SHARED and found.get(percent + 1) == percent + 1
        found[percent] = percent + 1 if shared else percent
    return found


def known_by_labels(tried: Sequence[Candidate], masks: Mapping[str, Labels]) -> list[Candidate]:
    """``tried`` with masks known by what they leave of the sample; where two leave the same, the later one is a twin."""
    first: dict[str, str] = {}
    found = []
    for one in tried:
        if one.kind == "mask":
            identity = digest([row.tolist() for row in masks[one.name]])
            same = first.setdefault(identity, one.name)
            one = replace(one, identity=identity, twin=same if same != one.name else None)
        found.append(one)
    return found


def percent_of(kept: float) -> int:
    """A kept fraction in whole percent, at least 1."""
    return max(1, round(100 * kept))


def random_name(percent: int) -> str:
    """What the random mask of a size is called."""
    return f"random {percent} %"


def labels_of(candidate: Candidate, sample: Sequences, seed: int, masks: Mapping[str, Labels]) -> Labels:
    """The labels on which a candidate is fine-tuned; ``seed``: of a random mask. ``masks``: name -> labels of each row."""
    whole = [np.asarray(row, np.int32) for row in sample.labels]
    if candidate.kind == "mask":
        return masks[candidate.name]
    if candidate.kind == "first":
        return [without_first(row, name) for row, name in zip(whole, sample.ids, strict=True)]
    if candidate.kind == "random":
        return random_labels(whole, sample.ids, candidate.percent / 100, seed)
    return whole


def without_first(labels: npt.NDArray[np.int32], name: str = "") -> npt.NDArray[np.int32]:
    """Without the first token of each response of one row; each turn of a conversation is one (mask.skip_first=1).

    ``name``: of the row; a later window of a long one may go on with a response.
    """
    response = labels != IGNORED
    starts = response & ~np.concatenate([[False], response[:-1]])
    if re.search(LATER_WINDOW, name):
        starts[1:2] = False
    return np.where(starts, np.int32(IGNORED), labels)


def random_labels(whole: Labels, ids: Sequence[str], fraction: float, seed: int) -> Labels:
    """A fraction of all response tokens, drawn by the seed and the rows' names; as many as mask.rho would keep."""
    drawn = [uniform(seed, name, len(row)) for name, row in zip(ids, whole, strict=True)]
    inside = np.concatenate([numbers[row != IGNORED] for numbers, row in zip(drawn, whole, strict=True)])
    if not len(inside):
        return whole
    kept = rank_of(fraction, len(inside))
    border = np.partition(inside, len(inside) - kept)[len(inside) - kept]
    return [np.where(numbers >= border, row, np.int32(IGNORED)) for numbers, row in zip(drawn, whole, strict=True)]


def kept_tokens(labels: Iterable[npt.NDArray[np.int32]]) -> int:
    """How many tokens are learned from."""
    return sum(int((row != IGNORED).sum()) for row in labels)
