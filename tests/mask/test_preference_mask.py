"""Masks of preference pairs: each branch against a definition in plain Python, and the loss that is made from them."""

import json
import math
import shlex
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken.data_schemas import BRANCHES, COMPONENTS, SCORES, preference_masks_schema, value_columns
from alphatoken.pipeline.mask.stage import make_mask
from alphatoken.pipeline.maths.preference import margin, masked_preference_loss, pair_weight
from alphatoken.pipeline.maths.uniform import uniform
from tests.mask.synthetic_run import name_models, run_of
from tests.trainers.synthetic_pairs import write_pairs_run

COLUMNS = [
    "prompt", "chosen", "rejected",
    "chosen_input_ids", "chosen_attention_mask", "chosen_labels",
    "rejected_input_ids", "rejected_attention_mask", "rejected_labels",
    "ref_chosen_logps", "ref_rejected_logps", "ref_chosen_logps_all", "ref_rejected_logps_all",
]  # fmt: skip


def parts(run: Path, name: str) -> list[list[dict]]:
    return [pq.read_table(file).to_pylist() for file in sorted((run / name).glob("*-of-*.parquet"))]


def rows(run: Path, name: str) -> list[dict]:
    return [row for part in parts(run, name) for row in part]


def score_of(row: dict, branch: str, score: str) -> list[float]:
    """What mask.score puts first, of every token of a branch."""
    column = {name.removeprefix(f"{branch}_"): values for name, values in row.items() if name.startswith(branch)}
    if score == "random":
        return uniform(0, f"{row['id']} ({branch})", len(column["loss"])).astype(float).tolist()
    made = {
        "paper": lambda: [a + b for a, b in zip(*(column[name] for name in COMPONENTS[:2]), strict=True)],
        "information": lambda: column["information"],
        "entropy": lambda: column["entropy"],
        "loss": lambda: [-x for x in column["loss"]],
    }
    return made[score]()


def naive(
    run: Path, branch: str, groups: list[list[int]], rho: float, weight: float, eos: int, score: str = "paper"
) -> list[list[int]]:
    """Labels of one branch: the best ``ceil(rho * n)`` tokens of each group of rows, ties, and EOS."""
    prepared, values = rows(run, "prepared"), rows(run, "values")
    labels = [list(row[f"{branch}_labels"]) for row in prepared]
    for group in groups:
        scored = {}
        for row in group:
            stable = [values[row][f"{branch}_{name}"] for name in COMPONENTS[2:]]
            for t, (first, c, d) in enumerate(zip(score_of(values[row], branch, score), *stable, strict=True)):
                if labels[row][t] != -100:
                    scored[row, t] = np.float32(first + weight * (c + d))
        border = sorted(scored.values(), reverse=True)[math.ceil(rho * len(scored)) - 1]
        for (row, t), value in scored.items():
            if value < border and labels[row][t] != eos:
                labels[row][t] = -100
    return labels


@pytest.mark.parametrize("score", ["information", "entropy", "loss", "random"])
def test_every_score_chooses_within_each_branch(alphatoken, preference_run, policy, score):
    """Columns without a sign speak of the token alone; which branch it is in does not turn them round."""
    name = f"by-{score}"
    more = [f"mask.score={score}", "mask.skip_first=0", "mask.rho=0.3", "mask.min_kept=0", f"mask.name={name}"]
    status, _, err = alphatoken("mask", f"run.dir={preference_run}", *more)
    assert status == 0, err
    everything = [list(range(sum(len(part) for part in parts(preference_run, "prepared"))))]
    eos = AutoTokenizer.from_pretrained(policy).eos_token_id
    masks = rows(preference_run, f"masks/{name}/data")
    for branch in BRANCHES:
        expected = naive(preference_run, branch, everything, 0.3, 0.0, eos, score)
        assert [row[f"{branch}_labels"] for row in masks] == expected


def test_of_pairs_auto_is_the_papers_signed_value(preference_run):
    summary = json.loads((preference_run / "masks/default/summary.json").read_text())
    assert summary["score"] == "paper" and summary["settings"]["score"] == "paper"
    assert summary["settings"]["stability_weight"] == 1.5 and summary["settings"]["skip_first"] == 0
    columns = set(value_columns(tuple(SCORES))) | {"value"}
    assert all(set(branch["columns"]) == columns for branch in summary["branches"].values())


@pytest.mark.parametrize("scope", ["dataset", "example", "batch"])
def test_each_branch_has_its_own_threshold(alphatoken, preference_run, policy, scope):
    name = f"by-{scope}"
    more = [f"mask.scope={scope}", "mask.batch_size=4", "mask.rho=0.25", "mask.min_kept=0", f"mask.name={name}"]
    status, out, err = alphatoken("mask", f"run.dir={preference_run}", *more)
    assert status == 0, err
    sizes = [len(part) for part in parts(preference_run, "prepared")]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    step = {"dataset": None, "example": 1, "batch": 4}[scope]
    groups = [list(range(sum(sizes)))]
    if step:
        groups = [
            list(range(start + i, start + min(i + step, size)))
            for start, size in zip(starts, sizes, strict=True)
            for i in range(0, size, step)
        ]
    eos = AutoTokenizer.from_pretrained(policy).eos_token_id
    masks = rows(preference_run, f"masks/{name}/data")
    summary = json.loads((preference_run / f"masks/{name}/summary.json").read_text())
    kept = 0
    for branch in BRANCHES:
        expected = naive(preference_run, branch, groups, 0.25, 1.5, eos)
        assert [row[f"{branch}_labels"] for row in masks] == expected
        count = sum(label != -100 for labels in expected for label in labels)
        assert summary["branches"][branch]["kept_tokens"] == count
        kept += count
    assert summary["kept_tokens"] == kept and f"{summary['kept_fraction']:.1%}" in out
    assert 0.25 < summary["kept_fraction"] < 0.6


def test_masks_carry_the_columns_of_the_contract_and_load(preference_run, tmp_path):
    data = datasets.load_dataset(str(preference_run / "masks/default"), split="train", cache_dir=str(tmp_path))
    assert data.column_names == COLUMNS
    (first, *_) = sorted((preference_run / "masks/default/data").glob("*.parquet"))
    assert pq.read_schema(first).equals(preference_masks_schema())
    prepared = rows(preference_run, "prepared")
    assert len(prepared) == len(data)
    for mask, pair in zip(data, prepared, strict=True):
        assert [mask[name] for name in ("prompt", *BRANCHES)] == [pair[name] for name in ("prompt", *BRANCHES)]
        assert mask["chosen"].endswith("<|im_end|>") and mask["prompt"].endswith("<|im_start|>assistant\n")
        for branch in BRANCHES:
            ids, labels = mask[f"{branch}_input_ids"], mask[f"{branch}_labels"]
            assert ids == pair[f"{branch}_input_ids"] and mask[f"{branch}_attention_mask"] == [1] * len(ids)
            for kept, whole in zip(labels, pair[f"{branch}_labels"], strict=True):
                assert kept in (-100, whole)


def test_reference_sums_are_over_kept_tokens_and_over_all(preference_run):
    masks, stored = rows(preference_run, "masks/default/data"), rows(preference_run, "reference")
    assert any(mask["ref_chosen_logps"] > mask["ref_chosen_logps_all"] for mask in masks)
    for mask, reference in zip(masks, stored, strict=True):
        for branch in BRANCHES:
            logps = reference[f"{branch}_logps"]
            kept = [p for p, label in zip(logps, mask[f"{branch}_labels"], strict=True) if label != -100]
            assert mask[f"ref_{branch}_logps"] == pytest.approx(sum(kept), rel=1e-5)
            assert mask[f"ref_{branch}_logps_all"] == pytest.approx(sum(logps), rel=1e-5)


def test_extra_columns_and_soft_weights_come_once_per_branch(alphatoken, preference_run):
    more = ["mask.extra_columns=[loss_mask]", "mask.rule=weight", "mask.name=soft"]
    status, _, err = alphatoken("mask", f"run.dir={preference_run}", *more)
    assert status == 0, err
    for mask, pair in zip(rows(preference_run, "masks/soft/data"), rows(preference_run, "prepared"), strict=True):
        assert mask["ref_chosen_logps"] == mask["ref_chosen_logps_all"]
        for branch in BRANCHES:
            response = [label != -100 for label in pair[f"{branch}_labels"]]
            assert mask[f"{branch}_loss_mask"] == [int(r) for r in response]
            assert all(w == 0 for w, r in zip(mask[f"{branch}_loss_weight"], response, strict=True) if not r)
    weights = [w for mask in rows(preference_run, "masks/soft/data") for w in mask["rejected_loss_weight"]]
    assert len({round(w, 3) for w in weights}) > 3 and max(weights) == 1
    card = (preference_run / "masks/soft/README.md").read_text()
    assert "rejected_loss_weight" in card and "DPOTrainer" not in card


def test_the_card_and_the_same_command_again(alphatoken, preference_run):
    card = (preference_run / "masks/default/README.md").read_text()
    assert "MaskedPreferenceCollator" in card and "chosen_loss_mask" not in card and "{{" not in card
    before = {file: file.read_bytes() for file in (preference_run / "masks/default").rglob("*") if file.is_file()}
    status, _, err = alphatoken("mask", f"run.dir={preference_run}")
    assert status == 0 and "done already" in err
    assert {
        file: file.read_bytes() for file in (preference_run / "masks/default").rglob("*") if file.is_file()
    } == before


def test_the_card_names_the_models_and_how_long_each_branch_is(tmp_path):
    storage = write_pairs_run(tmp_path, (30, 20), longest=2000)
    name_models(storage, "./models/policy", "org/a-tokenizer")
    make_mask(run_of(storage, score="information"))
    card = (tmp_path / "masks/default/README.md").read_text()
    lengths = [[len(row[f"{branch}_input_ids"]) for row in rows(tmp_path, "prepared")] for branch in BRANCHES]
    longest, over = [max(own) for own in lengths], [sum(length > 1024 for length in own) for own in lengths]
    assert len(set(longest)) == len(set(over)) == 2
    assert f"| longest row, tokens | {longest[0]:,} | {longest[1]:,} |" in card
    assert f"| rows of more than 1,024 tokens | {over[0]} | {over[1]} |" in card
    assert "| model | `policy` | |" in card and "| tokenizer | `org/a-tokenizer` | |" in card


def test_a_damaged_reference_part_is_named(alphatoken, preference_run):
    file = sorted((preference_run / "reference").glob("*.parquet"))[0]
    content = file.read_bytes()
    file.write_bytes(content[:50])
    status, _, err = alphatoken("mask", f"run.dir={preference_run}", "mask.name=damaged")
    assert status == 1 and f"reference/{file.name} is missing, damaged" in err
    remedy = shlex.split(err.rpartition("`alphatoken ")[2].partition("`")[0])
    status, _, err = alphatoken(*remedy)  # makes this part again and no other
    assert status == 0 and "3 of 3 shards are complete already" in err and file.read_bytes() == content, err


def test_the_masked_loss_of_a_real_model_has_no_gradient_at_masked_tokens(preference_run, policy):
    """Eq. 14 from a mask's Parquet, and its gradient with respect to every logit."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
    masks, values, prepared = (rows(preference_run, name) for name in ("masks/default/data", "values", "prepared"))
    masked_tokens = 0
    for mask, value, pair in list(zip(masks, values, prepared, strict=True))[:4]:
        logps, kept, whole, logits = {}, {}, {}, {}
        for branch in BRANCHES:
            ids, labels = torch.tensor([mask[f"{branch}_input_ids"]]), torch.tensor([mask[f"{branch}_labels"]])
            logits[branch] = model(ids).logits.detach()[:, :-1].requires_grad_(True)
            logps[branch] = logits[branch].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            kept[branch] = labels[:, 1:] != -100
            response = torch.tensor([pair[f"{branch}_labels"]])[:, 1:] != -100
            whole[branch] = (logps[branch] * response).sum(dim=1).detach()
            masked_tokens += int((response & ~kept[branch]).sum())
        theirs = [torch.tensor([mask[f"ref_{branch}_logps_all"]], dtype=torch.float64) for branch in BRANCHES]
        omega = pair_weight(margin(whole["chosen"], whole["rejected"], *theirs, beta=0.3), 0.3)
        assert omega.item() == pytest.approx(value["omega"], rel=1e-4)
        loss = masked_preference_loss(logps["chosen"], kept["chosen"], logps["rejected"], kept["rejected"], omega)
        loss.sum().backward()
        for branch, sign in (("chosen", 1), ("rejected", -1)):
            gradient, count = logits[branch].grad[0], int(kept[branch].sum())
            assert not gradient[~kept[branch][0]].any()
            for t in kept[branch][0].nonzero().flatten().tolist():
                expected = logits[branch][0, t].softmax(-1).detach()
                expected[mask[f"{branch}_input_ids"][t + 1]] -= 1
                torch.testing.assert_close(gradient[t], sign * omega.item() / count * expected)
    assert masked_tokens > 0
