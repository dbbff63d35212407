"""The worker of a trial in this process: a fine-tune that bursts is named, and the others stand."""

import json
from pathlib import Path

import numpy as np
import pytest

from alphatoken.pipeline.maths.batch import IGNORED, Sequences
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings, TrialSettings, ValuationSettings
from alphatoken.pipeline.trial.candidates import Candidate, Labels
from alphatoken.pipeline.trial.entering import TrialRows
from alphatoken.pipeline.trial.worker import TrialTask, TrialWorker

PROMPT = 4


def rows(lengths: list[int], seed: int, name: str) -> Sequences:
    drawn = np.random.default_rng(seed)
    ids = [drawn.integers(3, 250, length).tolist() for length in lengths]
    return Sequences([f"{name}-{i}" for i in range(len(ids))], ids, [[IGNORED] * PROMPT + row[PROMPT:] for row in ids])


def labels(some: Sequences, kept: bool) -> Labels:
    return [np.array(row if kept else [IGNORED] * len(row), np.int32) for row in some.labels]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("train", ["layers", "lora"])
def test_a_fine_tune_that_bursts_is_named_and_the_others_stand(tmp_path: Path, policy: Path, pairs: bool, train: str):
    own = TrialSettings(learning_rate=1e30, batch_size=2, train=train, rank=2)
    settings = Settings(trial=own, valuation=ValuationSettings(layers=2))
    some = TrialRows(
        rows([12, 9, 15, 11], 1, "train"), rows([10, 8, 13, 9], 2, "held-out"), rows([9, 14], 3, "completion"),
        rows([11], 4, "keep"), pairs,
    )  # fmt: skip
    worker = TrialWorker(
        Storage(str(tmp_path)), ModelSource(str(policy)), None, settings, some, f"test-{tmp_path.name}"
    )
    steps: list[int] = []
    for name, kept in (("bursts", True), ("stands", False)):  # what keeps nothing learns nothing
        one = Candidate(name, "mask", 50, name)
        worker(TrialTask(one, labels(some.train, kept), 0, 3, f"{name}.json", "f"), steps.append)
    bursts, stands = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("bursts", "stands"))
    assert bursts["failed"].startswith("NaN or infinity in the loss at step 2, example train-")
    assert "adaptation" not in bursts and bursts["kept_tokens"] > 0 == stands["kept_tokens"]
    assert stands["failed"] is None and stands["adaptation"] > 0 and stands["retention"] < 1e-3
    assert stands["retention_loss"] > 0 and len(stands["row_losses"]) == (2 if pairs else 4)
    assert (stands.get("margin") == 0.0 and stands["reward_accuracy"] == 0.5) if pairs else "margin" not in stands
