"""Rows that are longer than the positions a model has: learned positions end, rotary ones do not."""

import json

import pyarrow.parquet as pq
import pytest
import transformers as hf

from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare.positions import own_positions
from alphatoken.pipeline.run.failure import SettingsWrong
from tests.conftest import CHATML, chat_row, save_tokenizer, sentence, write_rows

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 512}
POSITIONS = 48
LEARNED = {
    "GPT-2": hf.GPT2Config(n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, vocab_size=512),
    "GPT-Neo": hf.GPTNeoConfig(
        max_position_embeddings=POSITIONS, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
    "OPT": hf.OPTConfig(max_position_embeddings=POSITIONS, ffn_dim=16, word_embed_proj_dim=16, **SMALL),
    "GPT-BigCode": hf.GPTBigCodeConfig(n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, vocab_size=512),
    "GPT-J": hf.GPTJConfig(n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=512),
}
ENDLESS = {
    "Llama": hf.LlamaConfig(max_position_embeddings=POSITIONS, intermediate_size=16, **SMALL),
    "GPT-NeoX": hf.GPTNeoXConfig(max_position_embeddings=POSITIONS, intermediate_size=16, **SMALL),
    "as many words as positions": hf.LlamaConfig(
        max_position_embeddings=POSITIONS, intermediate_size=16, **{**SMALL, "vocab_size": POSITIONS}
    ),
    "Bloom": hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=512),
}


def saved(config, place):
    config.save_pretrained(place)
    return ModelSource(str(place))


@pytest.mark.parametrize("name", LEARNED)
def test_positions_in_a_table_end(tmp_path, name):
    source = saved(LEARNED[name], tmp_path)
    assert own_positions(source, 2048) == POSITIONS
    assert own_positions(source, POSITIONS) is None and own_positions(source, POSITIONS + 1) == POSITIONS


@pytest.mark.parametrize("name", LEARNED)
def test_the_model_itself_takes_as_many_tokens_and_not_one_more(name):
    import torch

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(LEARNED[name]).eval()
    with torch.no_grad():
        assert model(torch.ones(1, POSITIONS, dtype=torch.long)).logits.shape[1] == POSITIONS
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, POSITIONS + 1, dtype=torch.long))


@pytest.mark.parametrize("name", ENDLESS)
def test_positions_that_are_computed_do_not_end(tmp_path, name):
    assert own_positions(saved(ENDLESS[name], tmp_path), 2048) is None


def test_a_model_that_cannot_be_built_is_an_error_with_its_remedy(tmp_path):
    source = saved(hf.ViTConfig(), tmp_path)
    assert own_positions(source, 2048) is None  # it names no positions
    source = saved(hf.CLIPTextConfig(max_position_embeddings=POSITIONS), tmp_path)
    with pytest.raises(SettingsWrong, match=rf"names {POSITIONS} positions.*set data\.max_length={POSITIONS}$"):
        own_positions(source, 2048)
    assert own_positions(source, POSITIONS) is None


def test_rows_beyond_the_positions_are_cut_there_or_refused_with_the_number(alphatoken, tmp_path):
    model = tmp_path / "gpt2"
    tokenizer = save_tokenizer(model, CHATML)
    LEARNED["GPT-2"].save_pretrained(model)
    long_answer, long_question = chat_row(1), chat_row(2)
    long_answer["messages"][-1]["content"] = " ".join(sentence(i) for i in range(30))
    long_question["messages"][0]["content"] = " ".join(sentence(i) for i in range(30))
    short = {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]}
    assert len(tokenizer.apply_chat_template(short["messages"])["input_ids"]) < POSITIONS
    data = write_rows(tmp_path / "x.jsonl", [long_answer, long_question, short])
    held = write_rows(tmp_path / "v.jsonl", [short])
    status, out, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={model}", f"data.train={data}", f"data.validation={held}",
        "anchor.drift=none", "mask.score=information", "cluster.cpus_per_worker=1",
    )  # fmt: skip
    assert status == 0, err
    said = f"has {POSITIONS} positions, fewer than data.max_length=2,048: longer rows are cut to {POSITIONS} tokens"
    assert said in out + err and "1 truncated, 1 in quarantine (no_response: 1)" in out + err
    (part,) = (tmp_path / "r/prepared").glob("part-*")
    rows = {row["source"]: row for row in pq.read_table(part).to_pylist()}
    assert [len(row["input_ids"]) for row in rows.values()][0] == POSITIONS and len(rows) == 2
    (kept,) = (tmp_path / "r/quarantine").glob("part-*")
    (refused,) = pq.read_table(kept).to_pylist()
    assert refused["row"] == 1 and refused["reason"].endswith(f"and the model has {POSITIONS} positions")
    record = json.loads((tmp_path / "r/run.json").read_text())["stages"]["prepare"]
    assert record["inputs"]["positions"] == POSITIONS
