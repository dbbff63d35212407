"""`alphatoken check-batch` on batches that trainers' own collators made from the mask directory, and on spoiled ones."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alphatoken.jobs.cli import main
from alphatoken.pipeline.dpo import MaskedPreferenceCollator
from alphatoken.pipeline.trainers.batch_file import batch_of
from tests.mask.synthetic_run import mask, masks, write_run
from tests.trainers.synthetic_pairs import write_pairs_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    storage, *_ = write_run(place, (12, 20))
    mask(storage)
    return place


@pytest.fixture(scope="module")
def data(run, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return datasets.load_dataset(str(run / "masks/default"), split="train", cache_dir=cache)


@pytest.fixture(scope="module")
def longest(data) -> int:
    return max(map(len, data["input_ids"]))


@pytest.fixture
def check(run, tmp_path, capsys):
    """Save a batch and run the command over it; returns (exit status, what was said)."""

    def checked(batch, *more: str, place: Path = run) -> tuple[int, str]:
        torch.save(dict(batch), tmp_path / "batch.pt")
        capsys.readouterr()
        status = main(["check-batch", str(place), str(tmp_path / "batch.pt"), *more])
        out = capsys.readouterr()
        assert not out.err, out.err
        return status, out.out + out.err

    return checked


def trl_batches(policy, data, place, **settings) -> list[dict]:
    """All batches of one epoch, as TRL's own data loader gives them."""
    args = SFTConfig(
        str(place), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=8, save_strategy="no", **settings
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    return [dict(batch) for batch in trainer.get_train_dataloader()]


def seq2seq(policy, rows) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    return dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(rows))


@pytest.mark.parametrize("name", ["plain", "padding_free", "packing"])
def test_trl_trains_on_what_the_mask_keeps(check, policy, data, longest, tmp_path, name):
    settings = {
        "plain": {"max_length": None},
        "padding_free": {"max_length": None, "padding_free": True},
        "packing": {"max_length": longest, "packing": True, "packing_strategy": "bfd"},
    }[name]
    sequences = 0
    for batch in trl_batches(policy, data, tmp_path, **settings):
        status, said = check(batch)
        assert status == 0 and "agrees: the batch trains on what the mask keeps" in said, said
        sequences += int(said.split("batch:")[1].split("sequence")[0].replace(",", ""))
    assert sequences == sum(any(label != -100 for label in labels) for labels in data["labels"])  # it drops the others


def test_trl_cuts_rows_over_its_longest_length(check, policy, data, longest, tmp_path):
    said = [check(batch) for batch in trl_batches(policy, data, tmp_path, max_length=longest - 4)]
    assert 1 in {status for status, _ in said}
    assert any("the trainer's longest length is too short" in text for _, text in said), said


def test_trl_wrapped_packing_joins_and_cuts_rows(check, policy, data, longest, tmp_path):
    batches = trl_batches(policy, data, tmp_path, max_length=longest + 7, packing=True, packing_strategy="wrapped")
    said = [check(batch) for batch in batches]
    assert {status for status, _ in said} == {1}
    assert any("they see each other" in text for _, text in said), said[0][1]


@pytest.mark.parametrize("collator", ["seq2seq", "flattening"])
def test_collators_of_transformers(check, policy, data, collator):
    rows = [data[i] for i in range(10)]
    batch = seq2seq(policy, rows) if collator == "seq2seq" else dict(DataCollatorWithFlattening()(rows))
    status, said = check({name: torch.as_tensor(value) for name, value in batch.items() if name != "max_length_q"})
    assert status == 0 and "10 sequences" in said and "found:  10 whole rows" in said, said


def test_batches_of_pairs(tmp_path, check):
    storage = write_pairs_run(tmp_path / "pairs")
    mask(storage, score="information")
    batch = MaskedPreferenceCollator(7)(masks(storage))
    status, said = check(batch, place=tmp_path / "pairs")
    assert status == 0 and "28 sequences" in said and "found:  28 whole rows" in said, said
    batch["completion_mask"][3] = batch["attention_mask"][3]
    assert check(batch, place=tmp_path / "pairs")[0] == 1


def test_shifted_labels_are_seen_and_expected_on_request(check, policy, data):
    batch = seq2seq(policy, [data[i] for i in range(8)])
    early = {**batch, "labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    status, said = check(early)
    assert status == 1 and "stand one position early" in said and "differ:" not in said, said
    assert check(early, "--shifted")[0] == 0
    status, said = check(batch, "--shifted")
    assert status == 1 and "off by one for a trainer that does not shift" in said
    late = {**batch, "labels": torch.nn.functional.pad(batch["labels"][:, :-1], (1, 0), value=-100)}
    status, said = check(late)
    assert status == 1 and "stand one position late" in said, said


def test_every_token_that_differs_is_counted_and_the_first_are_named(check, policy, data):
    rows = [data[i] for i in range(8)]
    batch = seq2seq(policy, rows)
    row = next(i for i, one in enumerate(rows) if sum(label != -100 for label in one["labels"]) >= 2)
    kept = [i for i, label in enumerate(rows[row]["labels"]) if label != -100]
    masked = [i for i, label in enumerate(rows[row]["labels"]) if label == -100]
    batch["labels"][row, kept[0]] = -100
    batch["labels"][row, masked[0]] = batch["input_ids"][row, masked[0]]
    batch["labels"][row, kept[1]] = 59 if rows[row]["labels"][kept[1]] != 59 else 58
    status, said = check(batch)
    assert status == 1
    assert "3 tokens: 1 trained on that the mask leaves out, 1 left out that it keeps, 1 with another id" in said
    ids = rows[row]["input_ids"]
    assert (
        f"sequence {row}, row {row}, token {kept[0]} (id {ids[kept[0]]}): mask in as {ids[kept[0]]}, batch out" in said
    )
    assert f"token {masked[0]} (id {ids[masked[0]]}): mask out, batch in as {ids[masked[0]]}" in said


def test_soft_weights_are_said_not_to_be_compared(tmp_path, policy, check):
    storage, *_ = write_run(tmp_path / "soft")
    mask(storage, rule="weight")
    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in masks(storage)]
    status, said = check(seq2seq(policy, rows), place=tmp_path / "soft")
    assert status == 0 and "labels are compared, loss_weight is not" in said


def test_training_on_everything_is_seen(check, policy, data):
    batch = seq2seq(policy, [data[i] for i in range(8)])
    whole = {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}
    status, said = check(whole)
    masked = int(((batch["labels"] == -100) & (batch["attention_mask"] == 1)).sum())
    assert (
        status == 1
        and f"{masked:,} trained on that the mask leaves out" in said
        and f"and {masked - 10:,} more" in said
    )


def test_padding_on_the_left_and_padding_that_no_mask_shows(check, policy, data):
    rows = [data[i] for i in range(6)]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.padding_side = "left"
    assert check(dict(DataCollatorForSeq2Seq(tokenizer)(rows)))[0] == 0
    batch = seq2seq(policy, rows)
    del batch["attention_mask"]
    status, said = check(batch)
    assert status == 0 and "of no row (padding that no attention_mask shows" in said and "0 in the loss" in said, said
    batch["labels"][:, -1] = 5
    assert check(batch)[0] == 1


def test_rows_that_are_joined_and_filled_up_to_a_multiple(check, data):
    rows = [{name: data[i][name] for name in ("input_ids", "labels")} for i in range(5)]
    size = sum(len(row["input_ids"]) for row in rows) + 1
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=size + 6)(rows)
    assert batch["position_ids"][0, -7:].tolist() == [0] * 7
    status, said = check({name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})
    assert status == 0 and "5 whole rows" in said and "lost" not in said, said


def test_a_batch_on_a_device_is_brought_to_the_cpu(data):
    class OnDevice:
        """A tensor of an accelerator, as numpy sees it."""

        def __init__(self, values: list[int]) -> None:
            self.values = values

        def cpu(self) -> torch.Tensor:
            return torch.tensor([self.values])

        def __array__(self, *arguments: object, **more: object) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    row = data[0]
    found = batch_of({name: OnDevice(row[name]) for name in ("input_ids", "labels")})
    assert found["labels"].tolist() == [row["labels"]]


def test_rows_joined_without_positions_see_each_other(check, data):
    rows = [data[i] for i in range(4)]
    joined = {name: torch.tensor([sum((row[name] for row in rows), [])]) for name in ("input_ids", "labels")}
    status, said = check(joined)
    assert status == 1 and "4 rows stand in 1 sequences with nothing between them" in said, said
    ends = np.cumsum([0, *[len(row["input_ids"]) for row in rows]])
    assert check({**joined, "cu_seq_lens_q": torch.tensor(ends)})[0] == 0
    counted = torch.tensor([sum(([i + 1] * len(row["input_ids"]) for i, row in enumerate(rows)), [])])
    assert check({**joined, "attention_mask": counted})[0] == 0


def test_rows_of_another_data_set_are_found_nowhere(check, policy, data):
    batch = seq2seq(policy, [{**data[0], "input_ids": [t + 100 for t in data[0]["input_ids"]]}])
    status, said = check(batch)
    assert status == 1 and "1 sequence of no row" in said and "found:  none" in said, said


def test_the_same_batch_in_three_kinds_of_files(run, policy, data, tmp_path, capsys):
    batch = seq2seq(policy, [data[i] for i in range(5)])
    torch.save(batch, tmp_path / "batch.pt")
    np.savez(tmp_path / "batch.npz", **{name: value.numpy() for name, value in batch.items()})
    save_file(batch, str(tmp_path / "batch.safetensors"))
    files = [str(tmp_path / f"batch.{kind}") for kind in ("pt", "npz", "safetensors")]
    assert main(["check-batch", str(run), *files, "--mask", "default"]) == 0
    said = capsys.readouterr().out
    assert said.count("agrees: the batch trains") == 3 and all(file in said for file in files)


def test_files_that_are_no_batch_are_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save([1], tmp_path / "list.pt")
    np.savez(tmp_path / "half.npz", input_ids=np.zeros((1, 3)))
    np.savez(tmp_path / "odd.npz", input_ids=np.zeros((1, 3)), labels=np.zeros((1, 4)))
    wanted = {
        "text.pt": "save one with torch.save(dict(batch), 'batch.pt')", "list.pt": "holds a list and not a dictionary",
        "half.npz": "needs input_ids and labels", "odd.npz": "does not fit together: input_ids (1, 3), but labels (1, 4)",
        "absent.npz": "cannot be read as a batch",
    }  # fmt: skip
    for name, said in wanted.items():
        assert main(["check-batch", str(run), str(tmp_path / name)]) == 1
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1
    assert main(["check-batch", str(run)]) == 2
