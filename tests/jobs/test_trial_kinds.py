"""`alphatoken trial` on preference pairs, with rows that should not be forgotten, and with more of the model learning."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alphatoken.jobs.config import load
from alphatoken.pipeline.trial.hidden import PREFIX
from tests.conftest import SMALL, chat_row, pair_row, save_tokenizer, write_rows
from tests.jobs.trial_files import results, summary

QUICK = ["trial.seeds=2", "trial.steps=3", "trial.batch_size=2", "trial.examples=8", "trial.learning_rate=0.01"]


def row_of(run: Path, candidate: str, seed: int = 0) -> dict:
    return next(row for row in results(run) if (row["candidate"], row["seed"]) == (candidate, seed))


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory, ray_cluster, policy, pairs_file) -> Path:
    """A run of pairs whose policy is its reference, with pairs kept for a trial and supervised rows to be remembered."""
    from alphatoken.jobs.cli import main

    place = tmp_path_factory.mktemp("pairs")
    keep = write_rows(place / "keep.jsonl", [*[chat_row(i) for i in range(800, 803)], pair_row(80)])
    arguments = [f"run.dir={place}/run", f"model.policy={policy}", f"data.train={pairs_file}", f"data.retention={keep}"]
    more = ["data.validation=10", "data.validation_trial=half", "valuation.beta=0.3"]
    assert main(["run", *arguments, *SMALL, *more]) == 0
    return place / "run"


def test_pairs_are_tried_by_their_margins_over_the_reference(alphatoken, pairs_run, tmp_path):
    run = Path(shutil.copytree(pairs_run, tmp_path / "run"))
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.masks=default,random", "cluster.workers=2")
    assert status == 0, err
    assert "measured on 5 held-out pairs" in err
    untouched = row_of(run, "untouched")
    assert untouched["adaptation"] == pytest.approx(math.log(2)) and untouched["margin"] == 0.0
    assert untouched["reward_accuracy"] == 0.5 and untouched["row_tokens"] == [1] * 5
    for row in results(run):
        assert row["failed"] is None and row["retention_loss"] > 0
        assert sum(row["row_losses"]) / 5 == pytest.approx(row["adaptation"])
        assert row["reward_accuracy"] * 10 == round(row["reward_accuracy"] * 10)
        if row["candidate"] != "untouched":
            assert row["margin"] != 0 and row["adaptation"] != pytest.approx(math.log(2), abs=1e-6)
    whole = summary(run)
    assert whole["pairs"] and whole["held_out_rows"] == 5 and whole["retention_rows"] == 4
    assert "nats per pair" in whole["sentence"] or "Training does not help" in whole["sentence"]
    assert "nats per token" not in whole["sentence"]
    for text in ("preferred", "margin", "retention", "5 held-out pairs", "4 rows of data.retention"):
        assert text in out
    kept = json.loads((run / "masks/default/summary.json").read_text())["kept_fraction"]
    assert 0 < row_of(run, "default")["kept_fraction"] < 1 and abs(row_of(run, "default")["kept_fraction"] - kept) < 0.2
    before = results(run)
    shutil.rmtree(run / "trial/fine-tunes")
    again = ["trial.masks=default,random", "cluster.workers=1", "trial.cache_bytes=2000"]
    assert alphatoken("trial", f"run.dir={run}", *QUICK, *again)[0] == 0
    assert results(run) == before
    assert alphatoken("report", f"run.dir={run}")[0] == 0
    html = (run / "report/index.html").read_text()
    assert "nats per pair" in html and "loss on data.retention" in html and "5 held-out pairs" in html


def test_pairs_against_another_reference_begin_with_its_margins(alphatoken, preference_run, tmp_path):
    run = Path(shutil.copytree(preference_run, tmp_path / "run"))
    status, out, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.seeds=1")
    assert status == 0, err
    assert row_of(run, "untouched")["margin"] != 0 and "rows that also made the directions" in " ".join(out.split())
    assert row_of(run, "full")["retention_loss"] is None and "data.retention" not in out


def test_auto_takes_pairs_as_well(alphatoken, tmp_path, policy, pairs_file):
    place = tmp_path / "r"
    same = [f"run.dir={place}", f"model.policy={policy}", f"data.train={pairs_file}", *SMALL, *QUICK]
    status, out, err = alphatoken("run", *same, "data.validation=10", "trial.auto=true", "trial.seeds=1")
    assert status == 0, err
    assert summary(place)["sentence"] in " ".join((place / "masks/chosen/README.md").read_text().split())
    assert pq.read_table(next((place / "masks/chosen").rglob("*.parquet"))).num_rows > 0


def test_a_run_without_held_out_pairs_says_how_to_keep_some(alphatoken, tmp_path, policy, pairs_file, validation_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={pairs_file}", *SMALL]
    assert alphatoken("run", *same, f"data.validation={validation_file}")[0] == 0
    status, _, err = alphatoken("trial", f"run.dir={tmp_path}/r", *QUICK)
    assert status == 1 and "data.validation_trial=FILE of pairs" in err.splitlines()[-1]


@pytest.fixture(scope="module")
def supervised(tmp_path_factory, ray_cluster, policy, train_file) -> Path:
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("supervised") / "run"
    arguments = [f"run.dir={run}", f"model.policy={policy}", f"data.train={train_file}", *SMALL]
    assert main(["run", *arguments, "data.validation=10", "data.validation_trial=half"]) == 0
    return run


@pytest.mark.parametrize(("train", "said"), [("lora", "adapters of rank 16 on all layers"), ("all", "all weights")])
def test_adapters_and_all_weights_learn_and_forget_otherwise_than_the_last_layers(
    alphatoken, supervised, tmp_path, train, said
):
    run = Path(shutil.copytree(supervised, tmp_path / "run"))
    operations, losses = [], []
    for kind in ("layers", train):
        status, _, err = alphatoken("trial", f"run.dir={run}", *QUICK, "trial.seeds=1", f"trial.train={kind}")
        assert status == 0, err
        operations.append(float(err.partition(" operations, about")[0].rpartition("; ")[2]))
        losses.append({row["candidate"]: row["adaptation"] for row in results(run)})
        assert row_of(run, "untouched")["retention"] < 1e-4 < row_of(run, "full")["retention"]
    assert operations[1] > operations[0] and losses[0]["full"] != losses[1]["full"]
    assert losses[0]["untouched"] == pytest.approx(losses[1]["untouched"], abs=5e-3)  # hidden states in bfloat16 there
    assert alphatoken("report", f"run.dir={run}")[0] == 0 and said in (run / "report/index.html").read_text()


def test_a_model_whose_layers_hand_on_more_than_the_hidden_state_is_fine_tuned_by_whole_passes(
    alphatoken, tmp_path, train_file
):
    import torch
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    place = tmp_path / "model"
    tokenizer = save_tokenizer(place)
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=len(tokenizer), vocab_size_per_layer_input=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8,
        num_kv_shared_layers=1, laurel_rank=4, activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0], sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(place)
    same = [f"run.dir={tmp_path}/r", f"model.policy={place}", f"data.train={train_file}", *SMALL]
    loss = ["valuation.scores=[loss]", "mask.score=loss"]  # no direction, so that there are no Fisher prompts either
    assert alphatoken("run", *same, *loss, "data.validation=10", "data.validation_trial=half")[0] == 0
    status, _, err = alphatoken("trial", f"run.dir={tmp_path}/r", *QUICK, "trial.seeds=1")
    assert status == 0, err
    run = tmp_path / "r"
    assert abs(row_of(run, "untouched")["retention"]) < 1e-6 < row_of(run, "full")["retention"]
    assert row_of(run, "full")["adaptation"] != row_of(run, "untouched")["adaptation"]


def test_nothing_of_the_hidden_states_is_left_behind(alphatoken, supervised, tmp_path):
    import tempfile

    run = Path(shutil.copytree(supervised, tmp_path / "run"))
    assert alphatoken("trial", f"run.dir={run}", *QUICK, "trial.seeds=1")[0] == 0
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


def test_a_retention_row_is_measured_as_the_model_says(alphatoken, tmp_path, policy, train_file):
    """The untouched model's loss on data.retention, by the model itself."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    keep = write_rows(tmp_path / "keep.jsonl", [chat_row(i) for i in range(800, 804)])
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", f"data.retention={keep}"]
    assert alphatoken("run", *same, *SMALL, "data.validation=10", "data.validation_trial=half")[0] == 0
    status, out, err = alphatoken("trial", f"run.dir={tmp_path}/r", *QUICK, "trial.seeds=1")
    assert status == 0, err
    model, sums, count = AutoModelForCausalLM.from_pretrained(policy), 0.0, 0
    for row in pq.read_table(tmp_path / "r/prepared/retention.parquet").to_pylist():
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        sums += float(cross_entropy(logits, labels.long(), ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert row_of(tmp_path / "r", "untouched")["retention_loss"] == pytest.approx(sums / count, abs=5e-3)
    assert summary(tmp_path / "r")["retention_rows"] == 4 and "retention: loss on the 4 rows" in " ".join(out.split())


@pytest.mark.parametrize(("train", "rate"), [("layers", 3e-4), ("lora", 1e-3), ("all", 1e-4)])
def test_each_kind_has_a_learning_rate_of_its_own_unless_one_is_given(train, rate):
    usual, given = (
        load([f"trial.train={train}"]).trial,
        load([f"trial.train={train}", "trial.learning_rate=2e-5"]).trial,
    )
    assert usual.rate == rate and given.rate == 2e-5
    assert usual.fingerprinted()["trial.learning_rate"] == rate
    same = load([f"trial.train={train}", f"trial.learning_rate={rate}"]).trial
    assert same.fingerprinted() == usual.fingerprinted() != given.fingerprinted()
