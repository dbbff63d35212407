"""What the page counts and which rows it chooses, against the run's own files."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.report import stage
from alphatoken.pipeline.report.reading import Reading
from alphatoken.pipeline.report.shown_masks import shown_masks
from alphatoken.pipeline.run.failure import RunFailed
from tests.mask.synthetic_run import masks, run_of
from tests.report.shown_run import EOS, report_on, with_masks, write_shown

NAMES = ("default", "paper", "third")
SETTINGS = {"default": {"min_kept": 1}, "paper": {"score": "paper"}, "third": {"rho": 0.3}}


def data_of(file) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', file.read_text(), re.S)[1])


def rows_of(storage, directory: str) -> list[dict]:
    return [row for name in storage.names(directory) for row in pq.read_table(storage.path(name)).to_pylist()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    lengths = [1 + (7 * i) % 40 for i in range(300)]
    return with_masks(write_shown(tmp_path_factory.mktemp("shown"), lengths, part_rows=70), **SETTINGS)


@pytest.fixture(scope="module")
def data(storage):
    return data_of(report_on(storage))


@pytest.fixture(scope="module")
def tokens(storage):
    """Every response token: its id, its place in the response, its loss, and what each mask keeps."""
    prepared, values = rows_of(storage, "prepared"), rows_of(storage, "values")
    kept = {name: [np.array(row["labels"]) != -100 for row in masks(storage, name)] for name in NAMES}
    found = {"id": [], "place": [], "loss": [], **{name: [] for name in NAMES}}
    for row, (left, right) in enumerate(zip(prepared, values, strict=True)):
        inside = np.flatnonzero(np.array(left["labels"]) != -100)
        found["id"] += [left["input_ids"][i] for i in inside]
        found["place"] += list(range(1, len(inside) + 1))
        found["loss"] += [right["loss"][i] for i in inside]
        for name in NAMES:
            found[name] += kept[name][row][inside].tolist()
    return {name: np.array(one) for name, one in found.items()}


def test_every_count_is_that_of_the_tokens(data, tokens):
    chart = data["charts"][0]
    for number, name in enumerate(NAMES):
        for one in (*chart["histograms"].values(), chart["positions"], chart["deciles"], chart["sources"]):
            assert sum(one["count"]) == len(tokens["id"]) and sum(one["kept"][number]) == tokens[name].sum()
        places = np.searchsorted([1, 2, 3, 5, 9, 17, 33], tokens["place"], side="right")
        assert chart["positions"]["kept"][number] == np.bincount(places, tokens[name])[1:].tolist()
    assert chart["positions"]["names"] == ["1", "2", "3–4", "5–8", "9–16", "17–32", "33–64"]


def test_tenths_of_the_loss_hold_about_a_tenth_each(data, tokens):
    deciles = data["charts"][0]["deciles"]
    assert len(deciles["names"]) == 10
    assert np.ptp(deciles["count"]) <= 0.01 * len(tokens["id"]) + 2


def test_agreement_is_the_jaccard_index(data, tokens):
    for a, one in enumerate(NAMES):
        for b, other in enumerate(NAMES):
            both, either = (tokens[one] & tokens[other]).sum(), (tokens[one] | tokens[other]).sum()
            assert data["charts"][0]["agreement"][a][b] == pytest.approx(both / either, rel=1e-4)


def test_strings_are_ranked_by_how_many_more_are_kept_than_of_all(data, tokens):
    for number, name in enumerate(NAMES):
        found = data["charts"][0]["strings"][number]
        share = tokens[name].mean()
        ids = np.unique(tokens["id"])
        above = {i: tokens[name][tokens["id"] == i].sum() - share * (tokens["id"] == i).sum() for i in ids}
        assert [above_first for above_first in found["most"][0][1:]] == [
            int((tokens["id"] == max(above, key=above.get)).sum()),
            int(tokens[name][tokens["id"] == max(above, key=above.get)].sum()),
        ]
        assert all(kept >= share * total for _, total, kept in found["most"])
        assert all(kept <= share * total for _, total, kept in found["least"])


def test_rank_correlations_are_spearmans(data, storage):
    values = rows_of(storage, "values")
    inside = [np.array(row["labels"]) != -100 for row in rows_of(storage, "prepared")]
    flat = {
        n: np.concatenate([np.array(r[n])[i] for r, i in zip(values, inside, strict=True)]) for n in ("loss", "entropy")
    }
    ranks = {name: np.argsort(np.argsort(one)) for name, one in flat.items()}  # no ties in what was drawn
    found = {(a, b): r for a, b, r in data["charts"][0]["correlations"]}
    assert found["loss", "entropy"] == pytest.approx(np.corrcoef(ranks["loss"], ranks["entropy"])[0, 1], abs=2e-3)


def test_the_rows_that_are_chosen_are_the_most_affected_of_all(data, storage):
    kept = [np.array(row["labels"]) != -100 for row in masks(storage)]
    inputs = [np.array(row["input_ids"]) for row in masks(storage)]
    only = {i for i, (one, ids) in enumerate(zip(kept, inputs, strict=True)) if not (one & (ids != EOS)).any()}
    lengths = [(np.array(row["labels"]) != -100).sum() for row in rows_of(storage, "prepared")]
    assert only and all(row["only"][0] == (row["n"] in only) for row in data["rows"])
    dropped = {i: 1 - one.sum() / lengths[i] for i, one in enumerate(kept) if i not in only}
    number = next(i for i, one in enumerate(data["choices"]) if one["kind"] == "dropped" and one["mask"] == 0)
    chosen = [row["n"] for row in data["rows"] if number in row["why"]]
    assert sorted(dropped[i] for i in chosen) == pytest.approx(sorted(dropped.values())[-len(chosen) :])
    first = next(one for one in data["choices"] if one["kind"] == "only" and one["mask"] == 0)
    assert first["of"] == len(only) and first["here"] == min(len(only), 20)
    assert data["total"] == 300 and len({row["n"] for row in data["rows"]}) == len(data["rows"]) < 300


def test_the_same_run_gives_the_same_bytes(storage):
    assert report_on(storage).read_bytes() == report_on(storage).read_bytes()


def test_a_page_that_would_be_too_long_leaves_out_rows_and_counts_them(storage, monkeypatch):
    monkeypatch.setattr(stage, "LIMIT", 150_000)
    file = report_on(storage)
    found = data_of(file)
    assert file.stat().st_size <= 150_000 and len(found["rows"]) > 0
    assert all(one["here"] == sum(i in row["why"] for row in found["rows"]) for i, one in enumerate(found["choices"]))
    assert any(one["here"] < one["of"] for one in found["choices"])


@pytest.mark.parametrize("pairs", [False, True])
def test_masks_with_the_same_warning_share_one_sentence(tmp_path, pairs):
    made = write_shown(tmp_path, lengths=range(1, 40), pairs=pairs)
    many = with_masks(made, **{f"m{i}": {"score": "paper", "rho": 0.04 + 0.06 * i, "min_kept": 0} for i in range(5)})
    (warning,) = re.findall(r"<li>(Mask[^<]*keep nothing but[^<]*)</li>", report_on(many, name="m0").read_text())
    named = []
    for name in (f"m{i}" for i in range(5)):
        summary = many.read_json(f"masks/{name}/summary.json")
        for branch, own in summary.get("branches", {"": summary}).items():
            only = own["rows_with_only_always_kept"]
            named += [f"{name} ({branch}) ({only} of 39)" if branch else f"{name} ({only} of 39)"] * (only > 0.02 * 39)
    assert len(named) == (10 if pairs else 5)
    more = ", 2 more" if pairs else ""
    assert warning.startswith(
        f"Masks {', '.join(named[:8])}{more}: examples keep nothing but the tokens of mask.always_keep"
    )
    assert warning.count("mask.min_kept=0.2") == 1


def test_more_masks_than_a_page_shows_are_named(tmp_path):
    made = write_shown(tmp_path, lengths=range(1, 9))
    many = with_masks(made, **{f"m{i}": {"rho": 0.05 + 0.06 * i} for i in range(14)})
    file = report_on(many, name="m13")
    assert [mask["name"] for mask in data_of(file)["masks"]] == ["m13", *(f"m{i}" for i in range(11))]
    assert "2 masks are in this table alone" in file.read_text() and "m11, m12" in file.read_text()


def test_a_mask_without_its_shards_is_said_with_the_remedy(tmp_path):
    made = with_masks(write_shown(tmp_path, lengths=range(1, 9)), default={})
    run = run_of(made)
    part = next(iter(Reading(run, shown_masks(run, ["default"])).rows))
    made.remove(shown_masks(run, ["default"])[0].places[""].file(part))
    with pytest.raises(RunFailed, match="again|anew"):
        report_on(made)


@pytest.mark.parametrize("settings", [{"scope": "example"}, {"scope": "batch", "batch_size": 8}])
def test_a_row_has_the_threshold_of_its_own_group(tmp_path, settings):
    made = write_shown(tmp_path, lengths=[3 + i % 9 for i in range(40)])
    with_masks(made, own={"score": "entropy", "min_kept": 0, "always_keep": [], **settings})
    assert ">by group<" in report_on(made).read_text()
    values = [np.array(row["entropy"]) for row in rows_of(made, "values")]
    for row in data_of(report_on(made))["rows"]:
        (branch,) = row["b"]
        inside = values[row["n"]][3:]  # after the prompt
        assert branch["kept"][0] == (inside >= branch["th"][0] * (1 - 1e-4)).sum()


def test_masks_of_no_values_are_shown_without_scores(tmp_path):
    made = with_masks(
        write_shown(tmp_path, lengths=range(1, 9), columns=()), all={"score": "full"}, some={"score": "random"}
    )
    found = data_of(report_on(made))
    assert found["scores"] == [] and found["charts"][0]["histograms"] == {} and len(found["rows"]) == 8
    assert ">by group<" not in report_on(made).read_text()
