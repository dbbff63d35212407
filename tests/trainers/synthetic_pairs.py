"""A run directory over preference pairs as prepare and value leave it, with values that no model made."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from alphatoken.data_schemas import (
    BRANCHES,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    preference_values_schema,
)
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import ValuationSettings
from tests.mask.synthetic_run import EOS, part_names

COLUMNS = ("information", "loss")


def write_pairs_run(directory: Path, sizes=(9, 5), seed: int = 0, longest: int = 12) -> Storage:
    storage, rng = Storage(str(directory)), np.random.default_rng(seed)
    manifest, parts = Manifest(storage), part_names(len(sizes))
    first = manifest.begin("prepare", {"seed": seed}, {})
    manifest.begin("anchor", {"anchor.drift": "none"}, {})
    second = manifest.begin(
        "value", {"prepare": first, "columns": list(COLUMNS)},
        {"valuation": ValuationSettings(scores=["information", "loss"])},
    )  # fmt: skip
    count = 0
    for part, size in zip(parts, sizes, strict=True):
        tables: dict[str, list] = {"prepared": [], "values": [], "reference": []}
        for row in range(count, count + size):
            prompt, own = rng.integers(3, 60, int(rng.integers(1, 9))).tolist(), f"pair-{row}"
            prepared = {"id": own, "prompt": "p", "chosen": "c", "rejected": "r", "source": f"f:{row}"}
            values, logps = {"id": own, "omega": 0.1}, {"id": own}
            for branch in BRANCHES:
                answer = [*rng.integers(3, 60, int(rng.integers(2, longest))).tolist(), EOS]
                ids, inside = [*prompt, *answer], np.array([0] * len(prompt) + [1] * len(answer))
                prepared |= {f"{branch}_input_ids": ids, f"{branch}_labels": [-100] * len(prompt) + answer}
                for column in COLUMNS:
                    values[f"{branch}_{column}"] = (np.abs(rng.standard_normal(len(ids))) * inside).tolist()
                logps[f"{branch}_logps"] = (-np.abs(rng.standard_normal(len(ids))) * inside).tolist()
            for name, made in (("prepared", prepared), ("values", values), ("reference", logps)):
                tables[name].append(made)
        schemas = {
            "prepared": PREFERENCE_PREPARED,
            "values": preference_values_schema(COLUMNS),
            "reference": PREFERENCE_REFERENCE,
        }
        for name, fingerprint in (("prepared", first), ("values", second), ("reference", "of-the-reference")):
            storage.write_table(f"{name}/{part}", pa.Table.from_pylist(tables[name], schemas[name]), fingerprint)
        count += size
    manifest.finish("prepare", 0.0, parts=parts, eos_token_ids=[EOS], vocabulary=60, format="preference")
    manifest.finish("anchor", 0.0)
    manifest.finish("value", 0.0, reference_fingerprint="of-the-reference")
    return storage
