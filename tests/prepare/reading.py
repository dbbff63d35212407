"""Files on disk through the real readers and one worker of prepare: what is used, what is refused, what is said."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from alphatoken.data_schemas import PREFERENCE_PREPARED, PREPARED, QUARANTINE
from alphatoken.pipeline.maths.model_source import ModelSource
from alphatoken.pipeline.prepare.inputs import open_data
from alphatoken.pipeline.prepare.repeated import all_repeat_prompt
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
from alphatoken.pipeline.settings.data import ColumnSettings, DataSettings
from tests.conftest import CHATML, save_tokenizer

WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "message['content'] +",
    "(message['content'] or '') + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)


@dataclass
class Read:
    """What became of the rows of a file. ``refused``: row number -> reason."""

    tokenizer: Any
    used: list[dict[str, Any]]
    refused: dict[int, str]
    counts: dict[str, int]
    remarks: tuple[str, ...]
    notes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.notes = {k.removeprefix("note/"): n for k, n in self.counts.items() if k.startswith("note/")}

    def text(self, row: int = 0, prefix: str = "") -> str:
        """All that a used row says."""
        return self.tokenizer.decode(self.used[row][f"{prefix}input_ids"])

    def responses(self, row: int = 0, prefix: str = "") -> list[str]:
        """What the runs of response tokens of a used row say."""
        both = zip(self.used[row][f"{prefix}input_ids"], self.used[row][f"{prefix}labels"], strict=True)
        runs = [(inside, list(run)) for inside, run in groupby(both, key=lambda pair: pair[1] != -100)]
        return [self.tokenizer.decode([token for token, _ in run]) for inside, run in runs if inside]


class Reader:
    """Prepares files with a small tokenizer in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.runs = directory, 0

    def __call__(self, path: Any, template: str | None = CHATML, **data: Any) -> Read:
        """Read ``path`` (data.train) with these settings of the group ``data``."""
        self.runs += 1
        place = self.directory / f"run-{self.runs}"
        tokenizer = save_tokenizer(place / "model", template)
        data["columns"] = ColumnSettings(**data.get("columns", {}))
        settings = Settings(data=DataSettings(train=path if isinstance(path, list) else str(path), **data))
        raw, storage = open_data(settings), Storage(str(place / "run"))
        worker = PrepareWorker(storage, ModelSource(str(place / "model")), len(tokenizer), settings, raw.preference)
        total = raw.train.starts[-1]
        repeated = settings.data.strips_prompts and all_repeat_prompt(raw.train, settings.data.columns.given())
        task = PrepareTask(raw.train.pieces(range(total)), "prepared/x", "quarantine/x", "f", repeated=repeated)
        counts, _ = worker(task, lambda units: None)
        used = storage.read_table("prepared/x", PREFERENCE_PREPARED if raw.preference else PREPARED).to_pylist()
        kept = storage.read_table("quarantine/x", QUARANTINE).to_pylist() if storage.exists("quarantine/x") else []
        assert len(used) + len(kept) == total
        return Read(tokenizer, used, {row["row"]: row["reason"] for row in kept}, counts, raw.remarks)

    def rows(self, rows: list[Any], template: str | None = CHATML, **data: Any) -> Read:
        """As above, of rows that are written to a file of JSON lines first."""
        file = self.directory / f"rows-{self.runs}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self(file, template, **data)
