"""The Fisher shows how far it is while its completions are sampled, which takes nearly all of its time."""

from dataclasses import replace

import torch
from safetensors.torch import load_file

from alphatoken.pipeline.anchor.worker import AnchorTask, AnchorWorker
from alphatoken.pipeline.maths.batch import Sequences
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.maths.sampling import sample_completions
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings

PROMPTS, TOKENS = 20, 12  # two batches, of 16 and of 4


def test_prompts_are_counted_while_their_completions_are_sampled(policy, tmp_path):
    settings = Settings()
    fisher = replace(settings.anchor.fisher, max_new_tokens=TOKENS)
    settings = replace(
        settings,
        anchor=replace(settings.anchor, fisher=fisher),
        valuation=replace(settings.valuation, layers=2, window=4),
    )
    worker = AnchorWorker(Storage(str(tmp_path)), ModelSource(str(policy)), settings, [2])
    ids = [[5 + i, 6, 7, 8] for i in range(PROMPTS)]
    rows = Sequences([str(i) for i in range(PROMPTS)], ids, [[-100, -100, 7, 8] for _ in ids])
    shown: list[int] = []
    counts = worker(AnchorTask("fisher", "fisher.safetensors", rows, seed=3), shown.append)
    assert counts["prompts"] == sum(shown) == PROMPTS and min(shown) >= 0
    assert sum(units > 0 for units in shown) > 8 and max(shown) < PROMPTS // 2
    assert all(bool(tensor.any()) for tensor in load_file(tmp_path / "fisher.safetensors").values())


def test_a_step_is_told_for_every_token_and_changes_none(policy):
    model = load_model(ModelSource(str(policy)), torch.device("cpu"))
    found, steps = [], []
    for told in (lambda: None, lambda: steps.append(1)):
        torch.manual_seed(5)
        found.append(sample_completions(model, [[9], [3, 4]], 6, 1.0, [], told))
    assert len(steps) == 6 and torch.equal(found[0].input_ids, found[1].input_ids)
