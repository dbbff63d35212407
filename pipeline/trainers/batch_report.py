"""What `check-batch` says, in lines that a terminal of 80 columns wraps little."""

from __future__ import annotations

from alphatoken.pipeline.trainers.batch_check import AS_LABELS, LONGEST_LIST, SHIFTED, TWICE, Difference, Verdict
from alphatoken.pipeline.trainers.columns import IGNORED

PLACES = {
    SHIFTED: "stand one position early (entry i speaks of token i + 1): right for a trainer that does not shift, off by one "
    "for all others; --shifted expects it",
    TWICE: "stand one position late (entry i speaks of token i - 1): off by one",
    AS_LABELS: "stand at their own token, which is off by one for a trainer that does not shift",
}


def report(verdict: Verdict, mask: str) -> list[str]:
    """One line per fact; the last one is the answer."""
    lines = [
        f"batch:  {_count(verdict.sequences, 'sequence')}, {_count(verdict.tokens, 'token')}, {verdict.kept:,} in the loss"
    ]
    found = [(verdict.whole, "whole rows"), (verdict.cut, "cut"), (verdict.joined, "with more around a row")]
    told = ", ".join(f"{count:,} {text}" for count, text in found if count) or "none"
    lines.append(f"found:  {told} of mask {mask}")
    if verdict.cut:
        lines.append(
            f"cut:    {_count(verdict.lost, 'token')} of these rows, {verdict.lost_kept:,} of them kept, are not in the batch: the "
            "trainer's longest length is too short"
        )
    if verdict.rows_joined > verdict.joined:
        lines.append(
            f"joined: {verdict.rows_joined:,} rows stand in {verdict.joined:,} sequences with nothing between them "
            "(position_ids do not start anew): they see each other"
        )
    if verdict.extra:
        lines.append(
            f"extra:  {_count(verdict.extra, 'token')} of no row (padding that no attention_mask shows, or added tokens), "
            f"{verdict.extra_trained:,} in the loss"
        )
    if verdict.unknown:
        first = verdict.unknown[0]
        ids = ", ".join(map(str, first.ids[:8].tolist()))
        lines.append(
            f"lost:   {_count(len(verdict.unknown), 'sequence')} of no row, the first in row {first.row} from column {first.column}: "
            f"{ids} ...: another mask, data set or tokenizer, or rows that were cut and joined"
        )
    for way, count in verdict.aligned.items():
        if count and way != verdict.expected:
            lines.append(f"moved:  labels of {_count(count, 'row')} {PLACES[way]}")
    differing = verdict.trained + verdict.left_out + verdict.other
    if differing:
        lines.append(
            f"differ: {_count(differing, 'token')}: {verdict.trained:,} trained on that the mask leaves out, {verdict.left_out:,} left "
            f"out that it keeps, {verdict.other:,} with another id"
        )
        lines += [f"        {_told(one)}" for one in verdict.first]
        if differing > LONGEST_LIST:
            lines.append(f"        and {differing - LONGEST_LIST:,} more")
    lines.append("agrees: the batch trains on what the mask keeps" if verdict.agrees else "agrees: no")
    return lines


def _told(one: Difference) -> str:
    where = f"sequence {one.sequence}, row {one.row}, token {one.token} (id {one.token_id})"
    return f"{where}: mask {_loss(one.in_mask)}, batch {_loss(one.in_batch)}"


def _loss(label: int) -> str:
    return "out" if label == IGNORED else f"in as {label}"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"
