"""Trainers read the masked pairs: TRL's DPOTrainer through the collator, LLaMA-Factory through save_to_disk."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken.pipeline.dpo import MaskedPreferenceCollator, save_for_llamafactory

BETA = 0.3


@pytest.fixture(scope="module")
def data(preference_run, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return datasets.load_dataset(str(preference_run / "masks/default"), split="train", cache_dir=cache)


def test_the_collator_puts_chosen_branches_first_and_marks_kept_tokens(data):
    rows = [data[i] for i in range(3)]
    batch = MaskedPreferenceCollator(pad_token_id=7)(rows)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "completion_mask"))
    branches = [(r[f"{b}_input_ids"], r[f"{b}_labels"]) for b in ("chosen", "rejected") for r in rows]
    assert batch["input_ids"].shape == (6, max(len(ids) for ids, _ in branches))
    for row, (ids, labels) in enumerate(branches):
        n = len(ids)
        assert batch["input_ids"][row, :n].tolist() == ids and set(batch["input_ids"][row, n:].tolist()) <= {7}
        assert batch["attention_mask"][row].sum() == n and not batch["attention_mask"][row, n:].any()
        assert batch["completion_mask"][row, :n].tolist() == [int(label != -100) for label in labels]
        assert not batch["completion_mask"][row, n:].any()
    assert batch["ref_rejected_logps"].tolist() == pytest.approx([r["ref_rejected_logps"] for r in rows])


def test_the_collator_refuses_rows_of_another_kind():
    with pytest.raises(ValueError, match="chosen_labels"):
        MaskedPreferenceCollator()([{"chosen_input_ids": [1], "rejected_input_ids": [1], "rejected_labels": [1]}])


@torch.no_grad()
def masked_dpo(policy, reference, rows) -> float:
    """The DPO loss over kept tokens, pair by pair and token by token."""
    losses = []
    for row in rows:
        gain = []
        for branch in ("chosen", "rejected"):
            ids, labels = row[f"{branch}_input_ids"], row[f"{branch}_labels"]
            kept = [t for t, label in enumerate(labels) if label != -100]
            sums = []
            for model in (policy, reference):
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                sums.append(sum(logps[t - 1, ids[t]].item() for t in kept))
            gain.append(sums[0] - sums[1])
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(BETA * (gain[0] - gain[1]))).item())
    return sum(losses) / len(losses)


def test_trl_has_the_hand_computed_loss_and_trains(data, policy, reference, tmp_path):
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    args = DPOConfig(
        str(tmp_path), max_length=None, remove_unused_columns=False, beta=BETA, max_steps=20, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=2e-3, lr_scheduler_type="constant", report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    collator = MaskedPreferenceCollator(tokenizer.pad_token_id)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy), ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=args, train_dataset=data, processing_class=tokenizer, data_collator=collator,
    )  # fmt: skip
    rows = [data[i] for i in range(4)]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (policy, reference)]
    expected = masked_dpo(*models, rows)
    everything = [{**row, **{f"{b}_labels": row[f"{b}_input_ids"] for b in ("chosen", "rejected")}} for row in rows]
    assert abs(masked_dpo(*models, everything) - expected) > 1e-2, "the mask makes no difference here"
    trainer.model.eval()
    with torch.no_grad():
        first = trainer.compute_loss(trainer.model, collator(rows)).item()
        trainer.precompute_ref_logps = True  # the stored sums instead of the reference model
        stored = trainer.compute_loss(trainer.model, collator(rows)).item()
        trainer.precompute_ref_logps = False
    assert first == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert stored == pytest.approx(expected, rel=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])


def test_llamafactory_finds_the_layout_that_it_saves_itself(data, preference_run, tmp_path):
    save_for_llamafactory(str(preference_run / "masks/default"), str(tmp_path / "tokenized"))
    saved = datasets.load_from_disk(str(tmp_path / "tokenized"))
    assert isinstance(saved, datasets.DatasetDict)  # its loader takes the split "train"
    assert len(saved["train"]) == len(data)
    for mask, row in zip(data, saved["train"], strict=True):
        for branch in ("chosen", "rejected"):  # as its PairwiseDataCollatorWithPadding reads them
            for name in ("input_ids", "attention_mask", "labels"):
                assert row[f"{branch}_{name}"] == mask[f"{branch}_{name}"]
        assert row["images"] is None and row["videos"] is None and row["audios"] is None
