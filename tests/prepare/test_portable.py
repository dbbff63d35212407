"""A worker that is sent its tokenizer does what one does that loads it, and does without torch."""

import pickle
import subprocess
import sys

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alphatoken.pipeline.maths.model_source import ModelSource, portable
from tests.conftest import CHATML, save_tokenizer

WITHOUT_TORCH = """
import pickle, sys
tokenizer = pickle.loads(sys.stdin.buffer.read())
from alphatoken.pipeline.prepare.decoding import decode
from alphatoken.pipeline.prepare.worker import PrepareTask, PrepareWorker
from alphatoken.pipeline.run.storage import Storage
from alphatoken.pipeline.settings import Settings
import pyarrow as pa
place = sys.argv[1]
rows = [{"messages": [{"role": "user", "content": f"the question {n}"}, {"role": "assistant", "content": "the answer"}]}
        for n in range(3)]
worker = PrepareWorker(Storage(place), tokenizer, len(tokenizer), Settings(), preference=False)
task = PrepareTask([("f", [0, 1, 2], pa.Table.from_pylist(rows))], "prepared/x", "quarantine/x", "f")
counts, _ = worker(task, lambda units: None)
print(counts["rows_used"], sorted({"torch", "datasets"} & set(sys.modules)))
"""


def test_a_sent_tokenizer_writes_what_a_loaded_one_writes_and_imports_neither_torch_nor_datasets(tmp_path):
    save_tokenizer(tmp_path / "model", CHATML)
    source = ModelSource(str(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    assert portable(tokenizer, source) is tokenizer
    written = {}
    for name, given in {"sent": tokenizer, "loaded": source}.items():
        command = [
            sys.executable,
            "-c",
            WITHOUT_TORCH.replace("len(tokenizer)", str(len(tokenizer))),
            str(tmp_path / name),
        ]
        said = subprocess.run(command, input=pickle.dumps(given), capture_output=True, check=True).stdout.decode()
        assert said.split(maxsplit=1) == ["3", "[]\n" if name == "sent" else "['torch']\n"]
        written[name] = (tmp_path / name / "prepared" / "x").read_bytes()
    assert written["sent"] == written["loaded"]


class OfAnother(PreTrainedTokenizerFast):
    """A class that a worker elsewhere may not have."""


def test_a_tokenizer_of_foreign_code_is_loaded_where_it_is_needed(tmp_path):
    own = save_tokenizer(tmp_path, CHATML)
    foreign, source = OfAnother(tokenizer_object=own.backend_tokenizer), ModelSource(str(tmp_path))
    assert portable(foreign, source) is source
