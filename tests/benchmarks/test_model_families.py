"""The survey of benchmarks/models on the families that people fine-tune and on those that are built unlike the others.

`python -m benchmarks.models` asks every model type of the installed transformers; here are those whose outcome is promised.
"""

from __future__ import annotations

import pytest

from benchmarks.models.compare import PARTLY, REFUSED, RIGHT, survey
from benchmarks.models.small import model_types

KINDS = {kind.title: kind for kind in model_types()}
EXPECTED = {
    RIGHT: """llama qwen2 qwen3 mistral phi3 gemma2 gemma3_text olmo2 mixtral qwen3_moe gpt_oss deepseek_v3 deepseek_v2
        afmoe granite_swa deepseek_v32 glm_moe_dsa minimax_m3_vl_text deepseek_v4 modernbert-decoder longcat_flash
        qwen3_next qwen3_5 qwen3_5_moe falcon_h1 olmo_hybrid nemotron_h bart
        gemma3n_text gemma4_text bamba granitemoehybrid kimi_linear gpt2 gpt_neox llama4 llama4_text mllama
        minimax_m3_vl qwen2_5_vl qwen3_vl gemma3 gemma4 mistral3 llava internvl smolvlm""",
    PARTLY: "jetmoe diffllama gpt_neo mpt falcon mamba2 zamba2",
    REFUSED: "bert paligemma hrm_text blt t5gemma2 florence2",
}
FAMILIES = [(title, outcome) for outcome, titles in EXPECTED.items() for title in titles.split()]


@pytest.mark.parametrize(("title", "outcome"), FAMILIES, ids=[title for title, _ in FAMILIES])
def test_a_familys_values_are_what_plain_autograd_says(title: str, outcome: str) -> None:
    row = survey(KINDS[title])
    assert row.outcome == outcome, f"{title}: {row.outcome}: {row.reason} {row.notes}\n{row.trace}"
    if outcome == RIGHT:
        assert row.causal in ("1 of 2", "2 of 2") and "causal path not compared" not in row.notes


def test_every_family_is_a_type_of_the_installed_transformers_and_stands_once() -> None:
    titles = [title for title, _ in FAMILIES]
    assert len(set(titles)) == len(titles) and set(titles) <= set(KINDS)
