"""The survey of model types finds what it is made to find: planted faults, dead processes, kinds of layers."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from alphatoken.pipeline.maths import attention, contraction
from alphatoken.pipeline.maths.valuer import TokenValuer
from benchmarks.models import apart
from benchmarks.models.compare import PARTLY, RAW, REFUSED, RIGHT, WRONG, Row, survey
from benchmarks.models.oracle import is_causal
from benchmarks.models.sizes import tail
from benchmarks.models.small import ModelType, build, model_types
from benchmarks.models.table import page

LLAMA = ModelType("llama", "LlamaForCausalLM", False)


def test_every_type_of_transformers_is_a_row_of_its_own() -> None:
    kinds = model_types()
    assert len({kind.title for kind in kinds}) == len(kinds) > 200
    assert LLAMA in kinds and any(kind.image for kind in kinds)


def test_a_right_engine_is_right_to_rounding() -> None:
    row = survey(LLAMA)
    assert (row.outcome, row.causal, row.coverage) == (RIGHT, "2 of 2", 1.0)
    assert row.error is not None and row.error < 1e-12
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "column",
    ["loss", "entropy", "information", "gradient_norm", "stability_exact", "adaptation_direct", "adaptation_causal"],
)
def test_a_column_that_is_off_by_a_hundred_thousandth_is_wrong(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = TokenValuer.value

    def off(self: TokenValuer, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        found = value(self, *args, **kwargs)  # type: ignore[arg-type]
        return {**found, column: found[column] * (1 + 1e-5)}

    monkeypatch.setattr(TokenValuer, "value", off)
    row = survey(LLAMA)
    assert row.outcome == WRONG and row.reason.startswith((column, f"{column} ")), row


def test_attention_that_forgets_its_soft_cap_is_refused_by_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    make = attention._attended

    def forgetful(*args: Any) -> Any:
        return replace(make(*args), softcap=None)

    monkeypatch.setattr(attention, "_attended", forgetful)
    row = survey(ModelType("gemma2", "Gemma2ForCausalLM", False))
    assert row.outcome == REFUSED and "not the model's own" in row.reason, row


def test_a_causal_path_along_the_wrong_rows_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = contraction.apply_band
    monkeypatch.setattr(contraction, "apply_band", lambda band, error: apply(band, error.roll(1, dims=-1)))
    row = survey(LLAMA)
    assert row.outcome == WRONG and "causal" in row.reason and "direct" not in row.reason


def test_a_model_that_looks_ahead_is_seen_to() -> None:
    ids = torch.arange(5, 25)
    assert is_causal(build(LLAMA), ids)
    assert not is_causal(build(ModelType("bert", "BertLMHeadModel", False)), ids)


def test_a_process_that_dies_or_does_not_end_is_a_row_and_the_survey_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(kind: ModelType) -> Row:
        if kind.name == "dies":
            os._exit(3)
        if kind.name == "hangs":
            time.sleep(60)
        return Row(kind.title, kind.owner, RIGHT)

    monkeypatch.setattr(apart, "survey", stand_in)
    kinds = [ModelType(name, "Owner", False) for name in ("dies", "hangs", "works")]
    found = {row.title: row for row in apart.surveyed(kinds, seconds=3.0)}
    assert [found[name].outcome for name in ("dies", "hangs", "works")] == [RAW, RAW, RIGHT]
    assert "status 3" in found["dies"].reason and "not done after 3 s" in found["hangs"].reason


def test_a_short_list_of_layers_keeps_one_of_each_kind() -> None:
    assert tail(["a", "a", "a", "b"] * 5) == ["a", "a", "a", "b"]
    assert set(tail(["a"] * 5 + ["b"] + ["a"] * 5)[-2:]) == {"a", "b"}
    assert set(tail(["a", "b", "c"] + ["a"] * 9)) == {"a", "b", "c"}


def test_the_page_counts_its_rows_and_escapes_what_would_break_them() -> None:
    rows = [Row("b", "B", PARTLY, "x | y", 0.5, "0 of 2", 1e-9), Row("a", "A", RIGHT)]
    lines = page(rows).splitlines()
    assert "2 types: 1 right, 1 right without the causal path." in lines
    assert lines[-1] == "| `b` | `B` | right without the causal path: x \\| y | 50.0% | 0 of 2 | 1e-09 |"
    assert lines[-2].startswith("| `a` |")
