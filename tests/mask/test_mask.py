"""The mask stage on synthetic runs, against a definition in plain Python over all rows at once."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from fractions import Fraction

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from alphatoken.data_schemas import COMPONENTS, SCHEMA_KEY, values_schema
from alphatoken.jobs.cli import main
from alphatoken.pipeline.mask.left_out import first_of_responses
from alphatoken.pipeline.mask.paired_rows import PairedRows
from alphatoken.pipeline.mask.stage import ROWS_AT_ONCE, make_mask
from alphatoken.pipeline.mask.valuing import Valuing
from alphatoken.pipeline.mask.worker import _fewest
from alphatoken.pipeline.maths.uniform import uniform
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.progress import Progress
from alphatoken.pipeline.run.storage import ROWS_PER_GROUP, Storage
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.mask import LONG_ANSWER, MASK_SCORES
from tests.conftest import save_tokenizer
from tests.mask.synthetic_run import (
    COLUMNS,
    EOS,
    ROOT,
    WITH_UNROLLED,
    contents,
    mask,
    masks,
    name_models,
    run_of,
    write_run,
)


def first_of(row: dict, score: str, t: int, drawn: list) -> float:
    """What mask.score puts first, of token t."""
    return {
        "paper": lambda: row["adaptation_direct"][t] + row["adaptation_causal"][t],
        "exact": lambda: row["adaptation_exact"][t],
        "unrolled": lambda: row["adaptation_unrolled"][t],
        "information": lambda: row["information"][t],
        "entropy": lambda: row["entropy"][t],
        "loss": lambda: -row["loss"][t],
        "excess_loss": lambda: row["loss"][t] - row["reference_loss"][t],
        "random": lambda: drawn[t],
        "full": lambda: 0.0,
    }[score]()


def terms_of(row: dict, settings: MaskSettings, length: int, seed: int = 0) -> dict[str, list[float]]:
    """score, stability and loss of every token of an example, before scales."""
    drawn = uniform(seed, row["id"], length).astype(float).tolist()
    found: dict[str, list[float]] = {"score": [], "stability": [], "loss": []}
    for t in range(length):
        parts = (settings.score,) if settings.score in ("exact", "unrolled") else ("direct", "causal")
        stable = sum(row[f"stability_{part}"][t] for part in parts)
        first, norm = first_of(row, settings.score, t, drawn), row["gradient_norm"][t]
        if settings.divide_by_gradient_norm:
            first, stable = (x / norm if norm else 0.0 for x in (first, stable))
        for name, x in (("score", first), ("stability", stable), ("loss", row["loss"][t])):
            found[name].append(x)
    return found


def naive(prepared, values, sizes, settings: MaskSettings, seed: int = 0):
    """Kept tokens of every row, the number kept only by always_keep, and only by min_kept."""
    settings = settings.resolved(False)
    inside = [[label != -100 for label in row["labels"]] for row in prepared]
    terms = [terms_of(row, settings, len(r), seed) for row, r in zip(values, inside, strict=True)]
    scale = {}
    for name in ("score", "stability", "loss"):
        some = [x for row, r in zip(terms, inside, strict=True) for x, i in zip(row[name], r, strict=True) if i]
        rms = math.sqrt(sum(x * x for x in some) / len(some))
        scale[name] = rms if settings.normalize == "rms" and rms else 1.0
    scored = [
        [
            np.float32(
                a / scale["score"]
                + settings.stability_weight * b / scale["stability"]
                - settings.loss_weight * c / scale["loss"]
            )
            for a, b, c in zip(row["score"], row["stability"], row["loss"], strict=True)
        ]
        for row in terms
    ]
    if settings.score == "full":
        settings = replace(settings, rho=1.0, rule="top", scope="dataset")
    stable = [[np.float32(x) for x in row["stability"]] for row in terms]
    ordered = sorted(s for row, r in zip(stable, inside, strict=True) for s, i in zip(row, r, strict=True) if i)
    left_out = math.ceil(Fraction(str(settings.least_stable)) * len(ordered))
    for row, of_row in zip(scored, stable, strict=True):
        for t, s in enumerate(of_row):
            if left_out and s < ordered[left_out]:
                row[t] = -np.inf
    for row, r in zip(scored, inside, strict=True):
        for t in range(len(row)):
            turn = t  # where the response that t belongs to begins
            while turn and r[turn - 1]:
                turn -= 1
            stop = turn
            while stop < len(r) and r[stop]:
                stop += 1
            if r[t] and t - turn < settings.skip_first and stop - turn >= (settings.skip_first_from or 1):
                row[t] = -np.inf
    groups, start = [], 0
    for size in sizes:
        step = {"example": 1, "batch": settings.batch_size}.get(settings.scope, size)
        groups += [range(i, min(i + step, start + size)) for i in range(start, start + size, step or 1)]
        start += size
    if settings.scope in ("dataset", "token_id"):
        groups = [range(len(prepared))]
    by_id: dict[int, list] = {}
    for row, value, r in zip(prepared, scored, inside, strict=True):
        for token, v, i in zip(row["input_ids"], value, r, strict=True):
            if i:
                by_id.setdefault(token, []).append(v)
    pooled = [v for vs in by_id.values() if len(vs) < settings.rare_tokens for v in vs]

    def threshold_at(r, t, group_threshold):
        """The threshold of token t of row r."""
        if settings.rule == "positive":
            return np.float32(1e-45)
        if settings.scope != "token_id":
            return group_threshold
        pool = by_id[prepared[r]["input_ids"][t]]
        pool = sorted(pool if len(pool) >= settings.rare_tokens else pooled, reverse=True)
        return pool[math.ceil(Fraction(str(settings.rho)) * len(pool)) - 1]

    kept, always_only, minimum_only = [], 0, 0
    for group in groups:
        pool = sorted((v for r in group for v, i in zip(scored[r], inside[r], strict=True) if i), reverse=True)
        threshold = pool[math.ceil(Fraction(str(settings.rho)) * len(pool)) - 1] if pool else 0
        for r in group:
            tokens = [t for t in range(len(inside[r])) if inside[r][t]]
            chosen = {t for t in tokens if scored[r][t] >= threshold_at(r, t, threshold) and scored[r][t] > -np.inf}
            always = {t for t in tokens if "eos" in settings.always_keep and prepared[r]["input_ids"][t] == EOS}
            always_only += len(always - chosen)
            chosen |= always
            fewest = settings.min_kept
            if 0 < fewest < 1:
                fewest = len(always) + math.ceil(Fraction(str(fewest)) * (len(tokens) - len(always)))
            missing = min(fewest, len(tokens)) - len(chosen)
            others = sorted((t for t in tokens if t not in chosen), key=lambda t: (-scored[r][t], t))
            minimum_only += max(0, missing)
            kept.append(chosen | set(others[: max(0, missing)]))
    return kept, always_only, minimum_only


WITH_VALUES = [score for score, columns in MASK_SCORES.items() if columns]
EVERYTHING = {
    "stability_weight": 2.0, "loss_weight": 0.5, "normalize": "rms", "divide_by_gradient_norm": True, "skip_first": 1,
    "scope": "batch", "batch_size": 11, "rho": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rho": 0.1, "always_keep": [], "min_kept": 0},
        {"score": "paper", "rho": 0.3, "min_kept": 4},
        {"score": "paper", "rho": 0.1, "min_kept": 0.3},
        {"rho": 0.1, "min_kept": 0.75, "scope": "batch", "batch_size": 7},
        {"score": "paper", "rho": 1.0},
        {"score": "paper", "normalize": "rms", "stability_weight": 3.0},
        {"score": "paper", "stability_weight": 0.0},
        {"score": "paper", "scope": "example", "rho": 0.3},
        {"score": "paper", "scope": "example", "min_kept": 3, "normalize": "rms"},
        {"score": "paper", "scope": "batch", "batch_size": 7, "rho": 0.4},
        {"score": "paper", "scope": "batch", "batch_size": 1000, "always_keep": []},
        {"scope": "batch", "batch_size": 1, "rho": 0.2, "min_kept": 0},
        {"score": "paper", "scope": "token_id", "rho": 0.3, "rare_tokens": 30},
        {"score": "paper", "scope": "token_id", "rho": 0.7, "rare_tokens": 0, "min_kept": 3, "normalize": "rms"},
        {"scope": "token_id", "rare_tokens": 10_000, "always_keep": []},
        {"score": "paper", "rule": "positive"},
        {"score": "paper", "rule": "positive", "scope": "token_id", "min_kept": 0, "always_keep": []},
        {"score": "paper", "loss_weight": 0.7},
        {"score": "paper", "loss_weight": 2.0, "normalize": "rms", "scope": "token_id"},
        {"score": "paper", "least_stable": 0.1, "stability_weight": 0.0},
        {"score": "paper", "least_stable": 0.5, "always_keep": []},
        {"least_stable": 0.4, "scope": "example", "rho": 0.6, "min_kept": 0},
        {"least_stable": 0.3, "scope": "batch", "batch_size": 5, "rho": 0.7, "min_kept": 2},
        {"least_stable": 0.2, "scope": "token_id", "rare_tokens": 30, "always_keep": [], "min_kept": 0},
        {"least_stable": 0.2, "rule": "positive", "min_kept": 0},
        {"score": "paper", "skip_first": 1, "least_stable": 0.1},
        {"skip_first": 3, "rho": 0.6, "min_kept": 0, "always_keep": []},
        {"skip_first": 2, "scope": "example", "rho": 0.9, "min_kept": 2},
        {"skip_first": 2, "skip_first_from": 4, "rho": 0.7, "min_kept": 0},
        *({"score": score, "rho": 0.3} for score in MASK_SCORES),
        *({"score": score, "stability_weight": 0.7, "normalize": "rms"} for score in WITH_VALUES),
        *({"score": score, "loss_weight": 0.6, "skip_first": 2, "min_kept": 0} for score in WITH_VALUES),
        *({"score": score, "divide_by_gradient_norm": True, "always_keep": []} for score in WITH_VALUES),
        *({"score": score, "scope": "token_id", "rare_tokens": 30, "skip_first": 1} for score in MASK_SCORES),
        *({"score": score, "least_stable": 0.2, "rho": 0.6, "normalize": "rms"} for score in WITH_VALUES),
        *({"score": score, **EVERYTHING} for score in WITH_VALUES),
        *({"score": score, "scope": "batch", "batch_size": 9, "skip_first": 3} for score in ("random", "full")),
        *(
            {"score": score, "rule": "positive", "min_kept": 0}
            for score in ("paper", "exact", "unrolled", "excess_loss", "full")
        ),
    ],
    ids=str,
)
def test_masks_are_those_of_the_definition(tmp_path, settings):
    sizes, seed = (40, 0, ROWS_AT_ONCE + 45, 3), len(str(settings))
    columns = WITH_UNROLLED if settings.get("score") == "unrolled" else COLUMNS
    storage, prepared, values = write_run(tmp_path, sizes, seed=seed, columns=columns)
    expected, always_only, minimum_only = naive(prepared, values, sizes, MaskSettings(**settings), seed)
    summary = mask(storage, **settings, seed=seed)
    found = masks(storage)
    assert len(found) == len(prepared)
    for row, whole, kept in zip(found, prepared, expected, strict=True):
        assert row == {
            "input_ids": whole["input_ids"],
            "attention_mask": [1] * len(whole["input_ids"]),
            "labels": [t if i in kept else -100 for i, t in enumerate(whole["labels"])],
        }
    response = sum(label != -100 for row in prepared for label in row["labels"])
    assert summary["rows"] == len(prepared)
    assert summary["response_tokens"] == response
    assert summary["kept_tokens"] == sum(map(len, expected))
    assert summary["kept_fraction"] == summary["kept_tokens"] / response
    assert summary["kept_only_by_always_keep"] == always_only
    assert summary["kept_only_by_min_kept"] == minimum_only
    assert summary["rows_with_nothing_kept"] == sum(not kept for kept in expected)
    always = {EOS} if "always_keep" not in settings else set()
    ids = [{row["input_ids"][t] for t in kept} for row, kept in zip(prepared, expected, strict=True)]
    assert summary["rows_with_only_always_kept"] == sum(bool(own) and own <= always for own in ids)
    assert summary == storage.read_json("masks/default/summary.json")


def test_every_turn_of_a_conversation_has_first_tokens_and_a_row_begins_anew():
    turns = ["00111011", "110", "1", "", "000", "0101111"]  # 1: a response token
    response = np.array([turn == "1" for row in turns for turn in row])
    lengths = np.cumsum([0, *map(len, turns)])
    labels = pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), pa.array(np.where(response, 7, -100), pa.int32()))
    ids = pa.chunked_array([pa.array([str(i) for i in range(len(turns))])])
    rows = PairedRows(np.zeros(len(turns) + 1, np.int64), labels, response, {}, None, ids)
    for count in (0, 1, 2, 3):
        expected = []
        for row in turns:
            place = 0
            for mark in row:
                place = place + 1 if mark == "1" else 0
                expected += [place <= count] if place else []
        assert first_of_responses(rows, count).tolist() == expected


@pytest.mark.parametrize("count", [1, 2])
def test_a_later_window_goes_on_with_the_response_of_the_one_before(count):
    turns = {"a#1": "00111000", "a#2": "0110011", "a#11": "01", "b#1": "011", "c": "011"}  # a#2: and a turn of its own
    response = np.array([mark == "1" for row in turns.values() for mark in row])
    lengths = pa.array(np.cumsum([0, *map(len, turns.values())]), pa.int32())
    labels = pa.ListArray.from_arrays(lengths, pa.array(np.where(response, 7, -100), pa.int32()))
    ids = pa.chunked_array([pa.array(list(turns))])
    rows = PairedRows(np.zeros(len(turns) + 1, np.int64), labels, response, {}, None, ids)
    expected = {1: [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0], 2: [1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1]}[count]
    assert first_of_responses(rows, count).tolist() == [bool(one) for one in expected]


def test_a_fraction_that_is_kept_at_least_is_the_one_that_was_written():
    offsets = np.array([0, 100, 150, 150])
    assert _fewest(0.07, offsets, np.zeros(150, bool)).tolist() == [7, 4, 0]
    assert _fewest(0.14, offsets, np.arange(150) == 120).tolist() == [14, 8, 0]


def test_everything_but_the_first_token(tmp_path):
    storage, prepared, _ = write_run(tmp_path)
    summary = mask(storage, score="full", skip_first=1, always_keep=[], min_kept=0)
    assert (
        mask(storage, score="full", skip_first=2, stability_weight=0.0, name="m")["decisions_changed_by_stability"]
        is None
    )
    responses = sum(any(label != -100 for label in row["labels"]) for row in prepared)
    assert summary["left_out"]["first"] == responses == summary["response_tokens"] - summary["kept_tokens"]
    assert f"left out by `mask.skip_first` | {responses}" in storage.read_bytes("masks/default/README.md").decode()


def test_what_is_left_open_follows_the_score(tmp_path):
    """lambda is 1.5 where signed values of a direction are weighed; information leaves out the first token of long answers."""
    left_open = {score: {"stability_weight": 0.0, "skip_first": 0} for score in MASK_SCORES if score != "unrolled"}
    left_open["paper"] = left_open["exact"] = {"stability_weight": 1.5, "skip_first": 0}
    left_open["information"] = {"stability_weight": 0.0, "skip_first": 1, "skip_first_from": LONG_ANSWER}
    storage, *_ = write_run(tmp_path)
    found = {}
    for score, own in left_open.items():
        found[score] = mask(storage, score=score, name=score), masks(storage, score)
        asked = mask(storage, score=score, name="asked", **own) if own != left_open["paper"] else None
        if asked:
            assert {**asked["settings"], "name": score} == found[score][0]["settings"]
            assert masks(storage, "asked") == found[score][1]
            shutil.rmtree(tmp_path / "masks/asked")
            forget(storage, "mask/asked")
    assert masks_differ([rows for _, rows in found.values()])
    usual = mask(storage)
    assert masks(storage) == found["information"][1] and usual["score"] == "information"
    assert found["information"][0]["left_out"]["first"] == found["paper"][0]["left_out"]["first"] == 0  # all are short
    assert mask(storage, score="information", skip_first=1, name="first")["left_out"]["first"] > 0


def test_first_tokens_of_short_answers_are_not_left_out_unless_that_was_asked_for():
    lengths = [LONG_ANSWER - 1, LONG_ANSWER, 3]
    response = np.concatenate([[False, *[True] * length] for length in lengths])
    offsets = pa.array(np.cumsum([0, *(length + 1 for length in lengths)]), pa.int32())
    labels = pa.ListArray.from_arrays(offsets, pa.array(np.where(response, 7, -100), pa.int32()))
    rows = PairedRows(np.zeros(4, np.int64), labels, response, {}, None, pa.chunked_array([pa.array(list("abc"))]))
    firsts = np.cumsum([0, *lengths[:-1]])
    for own, left_out in (({}, [1]), ({"skip_first": 1}, [0, 1, 2]), ({"skip_first": 1, "skip_first_from": 4}, [0, 1])):
        settings = MaskSettings(score="information", **own).resolved(False)
        assert np.flatnonzero(Valuing(settings, {}).first(rows)).tolist() == firsts[left_out].tolist()


def test_left_open_the_score_is_information_where_it_is_there_and_the_papers_where_it_is_not(tmp_path):
    for index, (columns, score) in enumerate(
        [
            (COLUMNS, "information"),
            (WITH_UNROLLED, "unrolled"),
            ((*COMPONENTS, "loss"), "paper"),
            (("information",), "information"),
        ]
    ):
        storage, *_ = write_run(tmp_path / str(index), columns=columns)
        summary = mask(storage)
        assert summary["score"] == score == summary["settings"]["score"]
        mask(storage, score=score, name="asked")
        assert masks(storage, "asked") == masks(storage)
    storage, *_ = write_run(tmp_path / "neither", columns=("loss", "entropy"))
    with pytest.raises(SettingsWrong, match="mask.score=information needs the column information"):
        mask(storage)


def forget(storage, stage):
    manifest = Manifest(storage)
    del manifest.content["stages"][stage]
    storage.write_json("run.json", manifest.content)


def masks_differ(found) -> bool:
    return all(one != other for index, one in enumerate(found) for other in found[index + 1 :])


def test_the_card_says_which_score_decided(tmp_path):
    storage, *_ = write_run(tmp_path, columns=WITH_UNROLLED)
    said = {
        "paper": "AlphaToken values", "information": "by `information`", "exact": "exact derivative",
        "entropy": "how undecided", "loss": "how likely", "excess_loss": "than the policy", "random": "no values",
        "unrolled": "at the end of a simulated training run",
        "full": "no values",
    }  # fmt: skip
    for score in MASK_SCORES:
        mask(storage, score=score, name=score)
        card = " ".join((tmp_path / f"masks/{score}/README.md").read_text().split())
        assert [other for other, text in said.items() if text in card] == [
            other for other in said if said[other] == said[score]
        ], score


def test_the_card_names_the_models_and_the_length_that_a_trainer_needs(tmp_path):
    """The number also stands where it is typed: TRL cuts at 1,024 tokens, axolotl and others at what they are given."""
    storage, prepared, _ = write_run(tmp_path, (30, 0, 20), longest=800)
    name_models(storage, ["/home/somebody/checkpoints/step-100/", "org/a-model"], "org/a-tokenizer")
    mask(storage)
    card, lengths = (tmp_path / "masks/default/README.md").read_text(), [len(row["input_ids"]) for row in prepared]
    over = sum(length > 1024 for length in lengths)
    assert 0 < over < len(lengths) and max(lengths) > 1024
    assert f"| longest row | {max(lengths):,} tokens; {over} rows have more than 1,024 |" in card
    assert f"longest row ({max(lengths)})" in card and f"--max_length {max(lengths)}\n" in card
    assert "| model | `step-100, org/a-model` |" in card and "| tokenizer | `org/a-tokenizer` |" in card
    assert "somebody" not in card  # a card may leave this machine


@pytest.mark.parametrize("score", ["information", "entropy", "loss", "random"])
def test_a_score_without_a_sign_and_the_rule_positive_is_said(tmp_path, score):
    storage, *_ = write_run(tmp_path)
    summary = mask(storage, score=score, rule="positive", skip_first=0, min_kept=0, always_keep=[])
    said = "keeps nothing by" if score == "loss" else "no sign"
    assert any(f"mask.score={score}" in note and said in note for note in summary["notes"])
    assert (summary["kept_fraction"] < 0.1) == (score == "loss")  # drawn values may have another sign than real ones
    for name, own in {"a": {"score": "paper"}, "b": {"score": "excess_loss"}, "c": {"score": "full"}}.items():
        assert not any("no sign" in note for note in mask(storage, rule="positive", name=name, **own)["notes"])


def test_plain_alignment_at_one_model_is_said(tmp_path):
    for index, (anchor, said) in enumerate(
        [
            ({"anchor.precondition": "none", "policy": "m"}, True),
            ({"anchor.precondition": "adam", "policy": "m"}, False),
            ({"anchor.precondition": "none", "policy": ["a", "b"]}, False),
            ({"anchor.precondition": "none", "anchor.snapshots": 3, "policy": "m"}, False),
        ]
    ):
        storage, *_ = write_run(tmp_path / str(index), anchor=anchor)
        notes = mask(storage, score="paper")["notes"]
        assert any("plain alignment" in note for note in notes) == said
        assert not any("plain alignment" in note for note in mask(storage, score="entropy", name="e")["notes"])


def test_without_a_drift_there_is_no_stability_to_weigh(tmp_path):
    storage, *_ = write_run(tmp_path, drift="none")
    for score in ("paper", "exact"):
        assert mask(storage, score=score, name=score)["settings"]["stability_weight"] == 0.0
    with pytest.raises(SettingsWrong, match="mask.stability_weight=0.5: the anchors .* anchor.drift=none"):
        mask(storage, stability_weight=0.5, name="m")


def test_a_reference_that_weighs_nothing_is_said_in_a_replay_as_well(tmp_path):
    storage, *_ = write_run(tmp_path, drift="checkpoint")
    said = [mask(storage, name=f"m{i}", **own)["notes"] for i, own in enumerate(({}, {"stability_weight": 0.0}))]
    assert [any("stability against model.reference" in note for note in notes) for notes in said] == [True, True]


def test_what_first_tokens_take_from_short_answers_and_from_rho_is_said(tmp_path):
    storage, prepared, _ = write_run(tmp_path)
    lengths = [sum(label not in (-100, EOS) for label in row["labels"]) for row in prepared]
    found = mask(storage, score="paper", skip_first=2, rho=0.9)
    assert found["left_out"]["examples_without_choice"] == sum(1 <= n <= 2 for n in lengths) > 0
    said = " ".join(found["notes"])
    assert "mask.skip_first=2 leaves fewer tokens than mask.rho=0.9" in said and "set mask.skip_first=0" in said
    assert found["kept_fraction"] < 0.9
    (note,) = mask(storage, score="paper", rho=0.9, name="all")["notes"]
    assert "keep nothing but" in note  # of responses of one token


def test_first_tokens_are_no_decision_of_stability(tmp_path):
    storage, *_ = write_run(tmp_path)
    for scope in ("dataset", "example"):
        summary = mask(storage, score="paper", skip_first=3, stability_weight=0.0, rho=0.8, scope=scope, name=scope)
        assert summary["left_out"]["first"] and summary["decisions_changed_by_stability"] == 0
    assert (
        mask(storage, score="paper", least_stable=0.3, stability_weight=0.0, name="m")["decisions_changed_by_stability"]
        > 0
    )


def test_what_is_least_stable_is_counted_and_never_more_than_asked_for(tmp_path):
    storage, prepared, values = write_run(tmp_path)
    stable = np.array(
        [
            c + d
            for p, r in zip(prepared, values, strict=True)
            for c, d, label in zip(r["stability_direct"], r["stability_causal"], p["labels"], strict=True)
            if label != -100
        ],
        np.float32,
    )
    found = mask(storage, score="paper", least_stable=0.2)["left_out"]
    below = np.float32(found["stability_below"])
    assert found["least_stable"] == (stable < below).sum() <= math.ceil(0.2 * len(stable))
    assert (stable <= below).sum() > math.ceil(0.2 * len(stable))  # with its ties it were more
    assert f"{found['least_stable']:,}, stability below" in storage.read_bytes("masks/default/README.md").decode()
    assert mask(storage, score="paper", name="without")["left_out"] == {
        "first": 0, "least_stable": 0, "harmful": 0, "stability_below": None, "examples_without_choice": 0,
    }  # fmt: skip


def test_soft_weights_of_the_least_stable_are_0(tmp_path):
    storage, prepared, values = write_run(tmp_path)
    below = mask(storage, score="paper", rule="weight", rho=0.8, least_stable=0.2, always_keep=[])["left_out"][
        "stability_below"
    ]
    unstable = 0
    for row, whole, r in zip(masks(storage), prepared, values, strict=True):
        assert row["labels"] == whole["labels"]
        for t, label in enumerate(whole["labels"]):
            if label != -100 and np.float32(r["stability_direct"][t] + r["stability_causal"][t]) < np.float32(below):
                unstable += 1
                assert row["loss_weight"][t] == 0
    assert unstable


def test_without_any_stability_nothing_is_least_stable(tmp_path):
    storage, *_ = write_run(tmp_path, stability=0.0)
    summary = mask(storage, score="paper", least_stable=0.3, stability_weight=0.0)
    assert summary["left_out"]["least_stable"] == 0
    assert any("the same for all tokens" in note for note in summary["notes"])
    assert summary["kept_tokens"] == mask(storage, score="paper", stability_weight=0.0, name="without")["kept_tokens"]


@pytest.mark.parametrize("scope", ["dataset", "token_id", "batch", "example"])
@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8])
def test_soft_weights_stand_beside_labels_that_keep_everything(tmp_path, scope, rho):
    sizes = (40, 0, 300)
    storage, prepared, values = write_run(tmp_path, sizes)
    summary = mask(
        storage, score="paper", rule="weight", scope=scope, rho=rho, batch_size=50, always_keep=[], rare_tokens=30
    )
    groups: dict = {}
    first_of_part = [0] * 40 + [40] * 300
    for index, (row, whole, value) in enumerate(zip(masks(storage), prepared, values, strict=True)):
        assert list(row) == ["input_ids", "attention_mask", "labels", "loss_weight"]
        assert row["labels"] == whole["labels"] and len(row["loss_weight"]) == len(row["labels"])
        batch = first_of_part[index], (index - first_of_part[index]) // 50
        for t, label in enumerate(whole["labels"]):
            if label == -100:
                assert row["loss_weight"][t] == 0.0
                continue
            key = {"dataset": 0, "token_id": label, "batch": batch, "example": index}[scope]
            a, b, c, d = (value[name][t] for name in COMPONENTS)
            groups.setdefault(key, []).append((np.float32(a + b + 1.5 * (c + d)), row["loss_weight"][t]))
    if scope == "token_id":
        rare = [key for key, tokens in groups.items() if len(tokens) < 30]
        assert 3 < len(rare) < len(groups)
        groups[-1] = [token for key in rare for token in groups.pop(key)]
        assert summary["token_id_groups"]["groups"] == len(groups)
        assert summary["token_id_groups"]["rare_ids"] == len(rare)
    for tokens in groups.values():
        ordered = [weight for _, weight in sorted(tokens)]
        assert ordered == sorted(ordered) and ordered[0] >= 0 and ordered[-1] <= 1
        assert np.mean(ordered) == pytest.approx(rho, abs=1e-6)
        for one, other in zip(sorted(tokens), sorted(tokens)[1:], strict=False):
            assert one[0] != other[0] or one[1] == other[1]
    assert summary["kept_fraction"] == 1.0 and summary["decisions_changed_by_stability"] is None
    assert summary["loss_weight"]["mean"] == pytest.approx(rho, abs=1e-6)
    schema = pq.read_schema(tmp_path / "masks/default/data/train-00000-of-00003.parquet")
    assert schema.metadata[SCHEMA_KEY] == b"masks-sft-weighted/1"
    card = (tmp_path / "masks/default/README.md").read_text()
    assert "keep every response token" in card and "| `loss_weight` | `list<float>` |" in card


def test_always_kept_tokens_weigh_one(tmp_path):
    storage, prepared, _ = write_run(tmp_path)
    summary = mask(storage, score="paper", rule="weight", rho=0.3)
    rows = [*zip(masks(storage), prepared, strict=True)]
    eos = [w for row, _ in rows for w, label in zip(row["loss_weight"], row["labels"], strict=True) if label == EOS]
    assert eos and set(eos) == {1.0} and 0 < summary["loss_weight"]["raised_by_always_keep"] <= len(eos)
    every = [w for row, _ in rows for w, label in zip(row["loss_weight"], row["labels"], strict=True) if label != -100]
    assert summary["loss_weight"]["mean"] == pytest.approx(np.mean(every))
    assert summary["loss_weight"]["fraction_zero"] == pytest.approx(np.mean([w == 0 for w in every]))


def test_thresholds_of_token_ids_are_summed_up_and_ties_counted_per_id(tmp_path):
    storage, *_ = write_run(tmp_path, (400,))
    summary = mask(
        storage, score="paper", scope="token_id", rare_tokens=40, stability_weight=0.0, always_keep=[], min_kept=0
    )
    assert summary["threshold"] is None
    assert summary["thresholds"]["groups"] == summary["token_id_groups"]["groups"] > 3
    assert summary["thresholds"]["min"] < summary["thresholds"]["max"]
    assert any("tie" in note for note in summary["notes"])  # values are rounded to one digit
    assert summary["decisions_changed_by_stability"] == 0
    card = (tmp_path / "masks/default/README.md").read_text()
    assert f"{summary['thresholds']['groups']} groups" in card


@pytest.mark.parametrize("settings", [{"scope": "token_id"}, {"rule": "weight"}], ids=str)
def test_bytes_do_not_depend_on_how_rows_are_read(tmp_path, monkeypatch, settings):
    found = []
    for rows in (7, 256):
        monkeypatch.setattr("alphatoken.pipeline.mask.stage.ROWS_AT_ONCE", rows)
        storage, *_ = write_run(tmp_path / str(rows), (300, 0, 20))
        mask(storage, score="paper", normalize="rms", loss_weight=0.5, rare_tokens=20, **settings)
        found.append([pq.read_table(storage.path(f)) for f in storage.names("masks/default/data")])
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [{}, {"rule": "positive"}, {"rule": "weight"}, {"scope": "token_id"}], ids=str)
def test_full_keeps_everything_whatever_the_rule(tmp_path, settings):
    storage, prepared, _ = write_run(tmp_path)
    summary = mask(storage, score="full", rho=0.2, **settings)
    assert [row["labels"] for row in masks(storage)] == [row["labels"] for row in prepared]
    assert summary["kept_fraction"] == 1.0 and summary["score"] == "full"
    assert any("mask.score=full" in note for note in summary["notes"])
    assert "`mask.score=full`" in (tmp_path / "masks/default/README.md").read_text()
    if "rule" in settings and settings["rule"] == "weight":
        assert summary["loss_weight"]["mean"] == 1.0


@pytest.mark.parametrize("score", ["random", "full"])
@pytest.mark.parametrize("rule", ["top", "weight"])
def test_what_looks_at_no_values_needs_none(tmp_path, score, rule):
    """A run that prepare alone has seen, and the same mask where values are there."""
    found = []
    for name, columns in (("without", ()), ("with", COLUMNS)):
        storage, prepared, _ = write_run(tmp_path / name, columns=columns)
        assert storage.exists("values") == bool(columns)
        summary = mask(storage, score=score, rule=rule, rho=0.4, skip_first=1)
        assert set(summary["columns"]) == {"value"}
        assert summary["response_tokens"] == sum(label != -100 for row in prepared for label in row["labels"])
        found.append((masks(storage), summary["kept_tokens"]))
    assert found[0] == found[1]


def test_random_follows_the_seed_and_no_other_score_does(tmp_path):
    found = {"random": [], "information": []}
    for seed in (0, 1, 0):
        for score, rows in found.items():
            storage, *_ = write_run(tmp_path / f"{len(rows)}-{score}")
            mask(storage, score=score, seed=seed)
            rows.append(contents(storage))
    assert found["random"][0] == found["random"][2] and found["information"][0] == found["information"][1]
    kept = [masks(Storage(str(tmp_path / f"{i}-random"))) for i in range(2)]
    assert kept[0] != kept[1]
    with pytest.raises(SettingsWrong, match="run.seed was 0, now 1"):
        mask(Storage(str(tmp_path / "0-random")), score="random", seed=1)
    assert mask(Storage(str(tmp_path / "0-information")), seed=1, score="information")  # is done already


def test_random_keeps_rho_of_all_tokens_and_of_every_kind(tmp_path):
    storage, prepared, values = write_run(tmp_path, (2000,))
    summary = mask(storage, score="random", rho=0.3, always_keep=[], min_kept=0)
    assert summary["kept_fraction"] == pytest.approx(0.3, abs=1e-3)
    labels = [label for row in prepared for label in row["labels"]]
    kept = [label != -100 for row in masks(storage) for label in row["labels"]]
    information = [x for row in values for x in row["information"]]
    some = [(x, k) for x, k, label in zip(information, kept, labels, strict=True) if label != -100]
    means = [np.mean([x for x, k in some if k == which]) for which in (True, False)]
    assert means[0] == pytest.approx(means[1], rel=0.03)


def test_examples_that_keep_nothing_but_what_is_always_kept_are_counted_and_said(tmp_path):
    """By hand over the written labels; a note where they are more than 2 % of the examples."""
    storage, *_ = write_run(tmp_path, (400, 300))
    said = {}
    for rho in (0.02, 0.1, 0.3, 0.5, 0.9, 1.0):
        summary = mask(storage, score="paper", rho=rho, name=f"rho={rho}", min_kept=0)
        kept = [{label for label in row["labels"] if label != -100} for row in masks(storage, f"rho={rho}")]
        only = sum(labels == {EOS} for labels in kept)
        assert summary["rows_with_only_always_kept"] == only
        said[rho] = any("keep nothing but the tokens of mask.always_keep" in note for note in summary["notes"])
        assert said[rho] == (only > 0.02 * 700)
        card = (tmp_path / f"masks/rho={rho}/README.md").read_text()
        assert f"keep nothing but `mask.always_keep` | {only:,} |" in card
    assert said[0.02]
    without = mask(storage, score="paper", rho=0.02, name="none", always_keep=[])
    assert without["rows_with_only_always_kept"] == 0
    assert not any("keep nothing but" in note for note in without["notes"])


def test_by_default_no_short_answer_is_left_with_its_end_alone(tmp_path):
    """Facts of one to three tokens: among all tokens many an answer has none of the best, and would teach to end alone."""
    storage, prepared, _ = write_run(tmp_path, (200, 100), longest=5)
    answers = [[label for label in row["labels"] if label != -100] for row in prepared]
    empty = sum(answer == [EOS] for answer in answers)
    assert main(["mask", f"run.dir={tmp_path}"]) == 0
    left = [{label for label in row["labels"] if label != -100} for row in masks(storage)]
    assert sum(labels == {EOS} for labels in left) == empty
    assert all(labels - {EOS} for answer, labels in zip(answers, left, strict=True) if len(answer) > 1)
    assert mask(storage, min_kept=1, name="one")["rows_with_only_always_kept"] > empty + 0.1 * len(prepared)


def test_the_summary_has_the_columns_that_values_have(tmp_path):
    for index, columns in enumerate([("loss",), ("information", "loss"), COLUMNS]):
        storage, *_ = write_run(tmp_path / str(index), columns=columns)
        assert list(mask(storage, score="loss")["columns"]) == [*columns, "value"]


def test_kept_fraction_is_rho_up_to_ties_and_exceptions(tmp_path):
    storage, *_ = write_run(tmp_path, (300, 300))
    for rho in (0.1, 0.5, 0.9):
        summary = mask(storage, score="paper", rho=rho, always_keep=[], min_kept=0, name=f"rho-{rho}")
        assert rho <= summary["kept_fraction"] < rho + 0.02


def test_statistics_are_those_of_the_columns(tmp_path):
    storage, prepared, values = write_run(tmp_path)
    summary = mask(storage, score="paper", rho=0.3)
    inside = np.array([label != -100 for row in prepared for label in row["labels"]])
    kept = np.array([label != -100 for row in masks(storage) for label in row["labels"]])[inside]
    columns = {name: np.array([v for row in values for v in row[name]])[inside] for name in COLUMNS}
    assert set(summary["columns"]) == {*COLUMNS, "value"}
    value = sum(columns[n] for n in COMPONENTS[:2]) + 1.5 * sum(columns[n] for n in COMPONENTS[2:])
    for name, column in {**columns, "value": value}.items():
        found = summary["columns"][name]
        for key, expected in {
            "mean": column.mean(), "rms": np.sqrt((column**2).mean()), "min": column.min(), "max": column.max(),
            "negative_fraction": (column < 0).mean(), "mean_kept": column[kept].mean(),
            "mean_masked": column[~kept].mean(),
        }.items():  # fmt: skip
            assert found[key] == pytest.approx(expected, rel=1e-5, abs=1e-6), (name, key)
    rank = math.ceil(0.3 * len(value))
    assert summary["threshold"] == pytest.approx(np.sort(value)[::-1][rank - 1], abs=1e-6)
    adaptation = sum(columns[n] for n in COMPONENTS[:2]).astype(np.float32)
    passed = value.astype(np.float32) >= np.float32(summary["threshold"])
    changed = passed != (adaptation >= np.sort(adaptation)[::-1][rank - 1])
    assert summary["decisions_changed_by_stability"] == pytest.approx(changed.mean(), abs=1e-9)
    assert summary["scales"] == {"score": 1.0, "stability": 1.0}
    assert all("keep nothing but" in note for note in summary["notes"])


def test_group_thresholds_are_summed_up(tmp_path):
    sizes = (40, 33)
    storage, prepared, values = write_run(tmp_path, sizes)
    summary = mask(storage, score="paper", scope="example", stability_weight=0.0)
    per_row = []
    for row, value in zip(prepared, values, strict=True):
        both = zip(value[COMPONENTS[0]], value[COMPONENTS[1]], row["labels"], strict=True)
        pool = sorted((np.float32(a + b) for a, b, label in both if label != -100), reverse=True)
        per_row += [pool[math.ceil(len(pool) / 2) - 1]] if pool else []
    found = summary["thresholds"]
    assert summary["threshold"] is None
    assert found["groups"] == len(per_row) and found["min"] == min(per_row) and found["max"] == max(per_row)
    middle = sorted(per_row, reverse=True)[(len(per_row) + 1) // 2 - 1]
    assert found["median"] == pytest.approx(middle, rel=2**-7)
    assert summary["decisions_changed_by_stability"] == 0


def test_zero_stability_keeps_scale_one_and_says_so(tmp_path):
    storage, *_ = write_run(tmp_path, stability=0.0)
    summary = mask(storage, score="paper", normalize="rms")
    assert summary["scales"]["stability"] == 1.0 and summary["scales"]["score"] != 1.0
    assert any("stability is zero" in note for note in summary["notes"])
    assert "stability is zero" in (tmp_path / "masks/default/README.md").read_text()


def test_many_ties_are_said(tmp_path):
    storage, prepared, values = write_run(tmp_path, (20,))
    flat = [{"id": v["id"], **{n: [0.0] * len(v["loss"]) for n in COLUMNS}} for v in values]
    fingerprint = Manifest(storage).stage("value")["fingerprint"]
    storage.write_table(
        "values/part-00000-of-00001.parquet", pa.Table.from_pylist(flat, values_schema(COLUMNS)), fingerprint
    )
    summary = mask(storage, score="paper")
    assert summary["kept_fraction"] == 1.0 and any("tie" in note for note in summary["notes"])


def test_extra_columns_say_what_labels_say(tmp_path):
    storage, *_ = write_run(tmp_path)
    mask(storage, extra_columns=["loss_mask", "assistant_masks", "loss_mask"])
    for row in masks(storage):
        assert list(row) == ["input_ids", "attention_mask", "labels", "loss_mask", "assistant_masks"]
        assert row["loss_mask"] == row["assistant_masks"] == [int(label != -100) for label in row["labels"]]
    assert "assistant_masks" in (tmp_path / "masks/default/README.md").read_text()


@pytest.mark.parametrize("sizes", [(40, 0, 33), (0, 5), (5,)])
def test_load_dataset_gives_exactly_three_columns(tmp_path, sizes):
    storage, *_ = write_run(tmp_path / "run", sizes)
    mask(storage, name="a=1,b")
    place = str(tmp_path / "run/masks/a=1,b")
    loaded = datasets.load_dataset(place, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"].column_names == ["input_ids", "attention_mask", "labels"]
    assert loaded["train"].to_list() == masks(storage, "a=1,b")


def test_load_dataset_does_not_take_another_mask_from_its_cache(tmp_path):
    for run, rho in (("one", 0.5), ("two", 0.5), ("two", 0.3)):
        shutil.rmtree(tmp_path / run, ignore_errors=True)
        storage, *_ = write_run(tmp_path / run, (7,) if run == "one" else (11,))
        mask(storage, rho=rho)
        for configuration in (None, "default"):
            place = str(tmp_path / run / "masks/default")
            loaded = datasets.load_dataset(place, configuration, cache_dir=str(tmp_path / "cache"))
            assert loaded["train"].to_list() == masks(storage)


def test_card_survives_whatever_users_type(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    storage, *_ = write_run(tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"), vocabulary=1000)
    mask(storage, always_keep=["eos", "|", "`", "#"], name="x,y=1")
    text = (tmp_path / "run/masks/x,y=1/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    (configuration,) = yaml.safe_load(front)["configs"]
    assert configuration["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert configuration["config_name"] == "default"
    assert re.fullmatch("mask [0-9a-f]{12}", configuration["description"])
    block = body.split("```json\n")[1].split("\n```")[0]
    assert json.loads(block)["always_keep"] == ["eos", "|", "`", "#"]


def test_always_keep_by_token_id_and_by_token(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    word = tokenizer.convert_tokens_to_ids("fox") if "fox" in tokenizer.get_vocab() else 7
    storage, prepared, _ = write_run(tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"), vocabulary=1000)
    text = tokenizer.convert_ids_to_tokens(word)
    summary = mask(storage, always_keep=[5, text, "<|im_end|>", "\n"], rho=0.05)
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    kept_ids = {5, word, tokenizer.eos_token_id, *newline}
    assert summary["always_keep_ids"] == sorted(kept_ids)
    assert summary["kept_only_by_always_keep"] > 0
    for row, whole in zip(masks(storage), prepared, strict=True):
        for label, before in zip(row["labels"], whole["labels"], strict=True):
            assert label == before or before not in kept_ids


def test_no_end_of_sequence_token_is_said(tmp_path):
    storage, *_ = write_run(tmp_path, eos_token_ids=[])
    summary = mask(storage)
    assert summary["kept_only_by_always_keep"] == 0 and "end-of-sequence" in summary["notes"][0]


def test_two_runs_write_the_same_bytes(tmp_path):
    found = []
    for name in ("one", "two"):
        storage, *_ = write_run(tmp_path / name, (300, 0, 20))
        mask(storage, normalize="rms")
        found.append(contents(storage))
    assert found[0] == found[1]
    assert len(found[0]) == 5
    groups = pq.ParquetFile(tmp_path / "one/masks/default/data/train-00000-of-00003.parquet").metadata
    assert groups.num_rows == 300 <= ROWS_PER_GROUP and groups.num_row_groups == 1


def test_done_is_not_done_again_and_other_settings_are_refused_by_key(tmp_path, monkeypatch):
    storage, *_ = write_run(tmp_path)
    summary = mask(storage)
    before = contents(storage)
    monkeypatch.setattr("alphatoken.pipeline.mask.together.PairedParts", None)
    assert mask(storage) == summary
    monkeypatch.undo()
    with pytest.raises(SettingsWrong) as error:
        mask(storage, rho=0.3, min_kept=2)
    text = str(error.value)
    assert "mask.rho was 0.5, now 0.3" in text and "mask.min_kept was 0.2, now 2" in text and "mask.name" in text
    mask(storage, rho=0.3, name="other")
    assert contents(storage) == before and storage.exists("masks/other/summary.json")


def test_goes_on_after_a_stop_with_the_same_bytes(tmp_path):
    storage, *_ = write_run(tmp_path, (300, 0, 20, 31))
    summary = mask(storage)
    before = contents(storage)
    manifest = Manifest(storage)
    manifest.content["stages"]["mask/default"]["state"] = "running"
    storage.write_json("run.json", manifest.content)
    place = tmp_path / "masks/default"
    (place / "summary.json").unlink()
    (place / "README.md").unlink()
    (place / "data" / "train-00002-of-00004.parquet").unlink()
    last = place / "data" / "train-00003-of-00004.parquet"
    last.write_bytes(last.read_bytes()[:80])
    untouched = (place / "data" / "train-00000-of-00004.parquet").stat().st_mtime_ns
    assert mask(storage) == summary
    assert contents(storage) == before
    assert (place / "data" / "train-00000-of-00004.parquet").stat().st_mtime_ns == untouched


def test_a_failure_while_writing_leaves_no_part_behind(tmp_path, monkeypatch):
    storage, *_ = write_run(tmp_path, (600,))
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    from alphatoken.pipeline.mask import supervised

    original = supervised.mask_columns
    monkeypatch.setattr(supervised, "mask_columns", broken)
    with pytest.raises(KeyboardInterrupt):
        mask(storage)
    assert os.listdir(tmp_path / "masks/default") == ["data"] and not os.listdir(tmp_path / "masks/default/data")
    monkeypatch.undo()
    mask(storage)
    assert len(masks(storage)) == 600


def test_progress_counts_every_row_once_whatever_the_passes(tmp_path, capsys):
    storage, *_ = write_run(tmp_path)
    with Progress(Console(file=sys.stderr, width=200)) as progress:
        make_mask(run_of(storage, progress, normalize="rms"))
        make_mask(run_of(storage, progress, normalize="rms"))
    said = capsys.readouterr().err
    for line in ("mask: scales: done, 73 rows", "mask: threshold: done, 73 rows", "mask: write: done, 73 rows"):
        assert line in said
    assert "done already" in said


def test_file_uris_are_run_directories_too(tmp_path):
    storage, *_ = write_run(tmp_path / "run")
    mask(storage)
    storage, *_ = write_run(tmp_path / "again")
    uri = Storage((tmp_path / "again").as_uri())
    assert asdict(MaskSettings().resolved(False)) == mask(uri)["settings"]
    assert contents(uri) == contents(Storage(str(tmp_path / "run")))


def test_loads_neither_torch_nor_transformers(tmp_path):
    write_run(tmp_path)
    code = f"""
import sys
from tests.mask.synthetic_run import mask
from alphatoken.pipeline.run.storage import Storage
mask(Storage({str(tmp_path)!r}))
assert not {{"torch", "transformers", "ray", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
