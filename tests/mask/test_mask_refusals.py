"""What the mask stage refuses, and what it says."""

import math
import shlex
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphatoken.data_schemas import COMPONENTS, EXACT, PREPARED, SCORES, values_schema
from alphatoken.pipeline.run.failure import RunFailed, SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import MaskSettings
from alphatoken.pipeline.settings.mask import MASK_SCORES
from tests.conftest import save_tokenizer
from tests.mask.synthetic_run import COLUMNS, mask, write_run


def test_tokens_that_do_not_exist_are_all_refused_before_anything_is_written(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    storage, *_ = write_run(tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(SettingsWrong) as error:
        mask(storage, always_keep=["eos", "no such token", 60, -1])
    assert len(error.value.problems) == 3
    assert all(p.startswith("mask.always_keep=") for p in error.value.problems)
    assert not storage.exists("masks") and not Manifest(storage).stage("mask/default")


def test_a_tokenizer_that_is_gone_is_named(tmp_path):
    storage, *_ = write_run(tmp_path / "run", tokenizer=str(tmp_path / "gone"))
    with pytest.raises(SettingsWrong, match="mask.always_keep=fox.*gone"):
        mask(storage, always_keep=["fox"])


def rewrite(storage: Storage, kind: str, part: str, change) -> None:
    schema, stage = (PREPARED, "prepare") if kind == "prepared" else (values_schema(COLUMNS), "value")
    rows = pq.read_table(storage.path(f"{kind}/{part}")).to_pylist()
    change(rows)
    fingerprint = Manifest(storage).stage(stage)["fingerprint"]
    storage.write_table(f"{kind}/{part}", pa.Table.from_pylist(rows, schema), fingerprint)


def set_first(row: dict, column: str, value: float | None) -> None:
    row[column][0] = value


@pytest.mark.parametrize("score", ["paper", "information"])
@pytest.mark.parametrize("scope", ["dataset", "example"])
def test_parts_that_do_not_belong_together_are_refused_with_file_and_row(tmp_path, scope, score):
    """Also in columns that the score does not look at: a mask states facts about all of them."""
    part = "part-00002-of-00003.parquet"
    found, whole = f"values/{part}", f"prepared/{part}"
    changes = {
        "id": ("values", lambda rows: rows[17].update(id="other"), f"{found}, row 17: the id"),
        "length": ("values", lambda rows: rows[5]["stability_causal"].append(0.0), f"{found}, row 5: stability_causal"),
        "nan": ("values", lambda rows: set_first(rows[4], "adaptation_direct", math.nan), f"{found}, row 4: NaN"),
        "infinite": ("values", lambda rows: set_first(rows[6], "stability_direct", math.inf), "row 6: NaN or inf"),
        "null": (
            "values",
            lambda rows: set_first(rows[6], "stability_direct", None),
            f"{found} has empty list elements",
        ),
        "labels": ("prepared", lambda rows: rows[8]["input_ids"].append(1), f"{whole}, row 8: labels"),
        "rows": ("values", lambda rows: rows.pop(), f"{found} has 32 rows, {whole} has 33"),
    }
    for name, (kind, change, message) in changes.items():
        storage, *_ = write_run(tmp_path / name)
        rewrite(storage, kind, part, change)
        with pytest.raises(RunFailed, match=message) as error:
            mask(storage, scope=scope, score=score)
        assert "run.overwrite=" in str(error.value)
        assert not storage.exists("masks/default/summary.json")


def test_missing_damaged_and_foreign_parts_are_named(tmp_path):
    storage, *_ = write_run(tmp_path / "a")
    (tmp_path / "a/values/part-00000-of-00003.parquet").unlink()
    with pytest.raises(RunFailed, match="values/part-00000-of-00003.parquet is missing"):
        mask(storage)
    storage, *_ = write_run(tmp_path / "b")
    write_run(tmp_path / "c", seed=1)
    name = "prepared/part-00000-of-00003.parquet"
    shutil.copy(tmp_path / "c" / name, tmp_path / "b" / name)
    with pytest.raises(RunFailed, match="of another run"):
        mask(storage)
    storage, *_ = write_run(tmp_path / "d", (2000,))
    place = tmp_path / "d/values/part-00000-of-00001.parquet"
    content = bytearray(place.read_bytes())
    content[2000:6000] = bytes(4000)
    place.write_bytes(content)
    with pytest.raises(RunFailed, match=r"values/part-00000-of-00001.parquet cannot be read.*run.overwrite=value"):
        mask(storage)


NOTHING = [
    {}, {"scope": "example"}, {"scope": "batch"}, {"scope": "token_id"}, {"normalize": "rms"}, {"rule": "positive"},
    {"rule": "weight"}, {"rule": "weight", "scope": "batch"},
]  # fmt: skip


@pytest.mark.parametrize("settings", NOTHING, ids=str)
def test_nothing_to_mask_fails(tmp_path, settings):
    storage, *_ = write_run(tmp_path, (20,))
    part = "part-00000-of-00001.parquet"
    rewrite(storage, "prepared", part, lambda rows: [r.update(labels=[-100] * len(r["labels"])) for r in rows])
    with pytest.raises(RunFailed, match="no prepared example has a response token"):
        mask(storage, **settings)


def test_values_beyond_float32_are_refused(tmp_path):
    storage, *_ = write_run(tmp_path)
    with pytest.raises(RunFailed, match="^mask.stability_weight=1e\\+39: values do not fit"):
        mask(storage, score="paper", stability_weight=1e39)
    with pytest.raises(RunFailed, match="^mask.loss_weight=1e\\+39: values do not fit"):
        mask(storage, loss_weight=1e39, name="m")


def test_stages_before_have_to_be_done(tmp_path):
    with pytest.raises(RunFailed, match="alphatoken prepare"):
        mask(Storage(str(tmp_path / "nothing")))
    storage, *_ = write_run(tmp_path / "prepared", columns=())
    for settings in ({}, {"score": "paper"}, {"score": "entropy"}, {"score": "full", "least_stable": 0.1}):
        with pytest.raises(RunFailed, match="alphatoken value"):
            mask(storage, **settings)
    assert mask(storage, score="full")["kept_fraction"] == 1.0


# --- columns that are not there --------------------------------------------------------------------------------------

ALL = ",".join(SCORES)
NEEDED = {  # settings -> (columns that are needed, what to set)
    "score=paper": (COMPONENTS[:2], f"valuation.scores=[{ALL}]"),
    "score=information": (("information",), f"valuation.scores=[{ALL}]"),
    "score=entropy": (("entropy",), f"valuation.scores=[{ALL}]"),
    "score=loss": (("loss",), f"valuation.scores=[{ALL}]"),
    "score=excess_loss": (("reference_loss",), "valuation.reference_loss=true"),
    "score=exact": (EXACT[:1], "valuation.exact=true"),
    "score=information loss_weight=0.5": (("loss",), f"valuation.scores=[{ALL}]"),
    "score=entropy stability_weight=0.5": (COMPONENTS[2:], f"valuation.scores=[{ALL}]"),
    "score=loss least_stable=0.2": (COMPONENTS[2:], f"valuation.scores=[{ALL}]"),
    "score=exact stability_weight=2.0": (EXACT[1:], "valuation.exact=true"),
    "score=loss divide_by_gradient_norm=True": (("gradient_norm",), f"valuation.scores=[{ALL}]"),
    "score=full least_stable=0.2": (COMPONENTS[2:], f"valuation.scores=[{ALL}]"),
}


def settings_of(text: str) -> dict:
    pairs = dict(pair.split("=") for pair in text.split())
    return {key: value if key == "score" else True if value == "True" else float(value) for key, value in pairs.items()}


@pytest.mark.parametrize("text", NEEDED)
def test_a_column_that_is_not_there_is_refused_with_the_one_key_to_set(tmp_path, text):
    needed, remedy = NEEDED[text]
    scores = [own for own in SCORES.values() if set(own) & set(needed)]
    absent = {*needed, *(name for own in scores for name in own)}
    storage, *_ = write_run(tmp_path, columns=tuple(name for name in COLUMNS if name not in absent))
    with pytest.raises(SettingsWrong) as error:
        mask(storage, **settings_of(text))
    (said,) = error.value.problems
    assert said.startswith(f"mask.{text.split()[-1].replace('True', 'true')} needs the column ")
    assert f": set {remedy} and value anew, `alphatoken run --from " in said
    typed = shlex.quote(remedy)  # a shell reads brackets
    assert said.endswith(f" {typed} run.overwrite=value`")
    assert any(f"needs the column {name}, which values/ does not have" in said for name in needed)
    assert not storage.exists("masks") and not Manifest(storage).stage("mask/default")
    mask(write_run(tmp_path / "whole")[0], **settings_of(text))


def test_what_holds_out_other_rows_or_simulates_a_run_is_made_from_there_on(tmp_path):
    storage, *_ = write_run(tmp_path, columns=("loss", "entropy"))
    with pytest.raises(SettingsWrong) as error:
        mask(storage, score="unrolled")
    (said,) = error.value.problems
    assert "set anchor.direction=unrolled valuation.schedule=own_step and value anew" in said
    assert said.endswith(" anchor.direction=unrolled valuation.schedule=own_step run.overwrite=anchor`")
    del (manifest := Manifest(storage)).content["stages"]["anchor"]  # a run without directions
    manifest._write()
    for score in ("paper", "exact", "unrolled"):
        with pytest.raises(SettingsWrong, match=r"run.overwrite=prepare`"):
            mask(storage, score=score)


def test_columns_are_asked_for_beside_those_that_are_there_in_their_order(tmp_path):
    storage, *_ = write_run(tmp_path, columns=("loss", "entropy"))
    with pytest.raises(SettingsWrong, match=r"set valuation.scores=.information,loss,entropy. and value anew"):
        mask(storage)
    with pytest.raises(SettingsWrong) as error:
        mask(storage, score="exact", loss_weight=0.5, divide_by_gradient_norm=True)
    assert [one.split(" needs")[0] for one in error.value.problems] == [
        "mask.score=exact", "mask.divide_by_gradient_norm=true",
    ]  # fmt: skip
    assert mask(storage, score="entropy")["score"] == "entropy"


@pytest.mark.parametrize("score", ["random", "full"])
@pytest.mark.parametrize(
    ("key", "value"), [("loss_weight", 0.5), ("stability_weight", 1.0), ("divide_by_gradient_norm", True)]
)
def test_weights_on_top_of_a_score_that_looks_at_no_values_are_refused(score, key, value):
    (said,) = MaskSettings(score=score, **{key: value}).problems()
    assert said == f"mask.{key}={value}: mask.score={score} looks at no values: leave it out"


def test_an_unknown_score_is_refused_with_the_choices():
    (said,) = MaskSettings(score="surprise").problems()
    for score in ("auto", *MASK_SCORES):
        assert score in said
