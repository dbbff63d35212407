"""What prepare says about texts that the chat template leaves out: how many rows, and one of them to look at.

A remark travels in the counts of a part, whose values are added up: ``remark/SENTENCE`` counts rows, and
``at/SENTENCE/SOURCE`` names the part's first such row.
"""

from collections.abc import Iterable, Mapping

from alphatoken.pipeline.prepare.guard import LEFT_OUT, NOT_IN_TEMPLATE

_ROWS, _AT = "remark/", "at/"
REASONING = f"{LEFT_OUT} reasoning of responses"
_REMEDY = "these rows are kept without it; data.keep_reasoning=true renders them turn by turn"


def of_rejected(rejected: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """Remarks on quarantined rows (``file``, ``row``, ``reason``) whose text the template does not write as it is."""
    return _remarks(
        (str(row["reason"]).partition(": ")[2], f"{row['file']}:{row['row']}")
        for row in rejected
        if str(row["reason"]).startswith(f"{NOT_IN_TEMPLATE}: ")
    )


def of_lost(sources: Iterable[str]) -> dict[str, int]:
    """Remarks on used rows whose reasoning the template leaves out."""
    return _remarks((REASONING, source) for source in sources)


def _remarks(found: Iterable[tuple[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sentence, source in found:
        key = f"{_ROWS}{sentence}"
        counts[key] = counts.get(key, 0) + 1
        if counts[key] == 1:
            counts[f"{_AT}{sentence}/{source}"] = 1
    return counts


def is_remark(key: str) -> bool:
    """Whether a key of counts is one of these."""
    return key.startswith((_ROWS, _AT))


def as_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Sentence -> rows, sorted: what the manifest keeps."""
    return {key.removeprefix(_ROWS): n for key, n in sorted(counts.items()) if key.startswith(_ROWS)}


def line(counts: Mapping[str, int]) -> str:
    """One line with all remarks, '' where there is none."""
    said = []
    for sentence, rows in as_counts(counts).items():
        start = f"{_AT}{sentence}/"
        first = min((key.removeprefix(start) for key in counts if key.startswith(start)), default="")
        remedy = _REMEDY if sentence == REASONING else "in quarantine"
        said.append(f"{sentence} in {rows:,} row{'s' * (rows != 1)} (such as {first}; {remedy})")
    return "; ".join(said)
