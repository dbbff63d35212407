"""One local Ray for the session, a tiny model with a real tokenizer on disk, and small data files."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wise",
    "owls",
    "watch",
    "from",
    "an",
    "old",
    "oak",
    "tree",
]


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store():
    from tests.faults.object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _well_behaved_store(request):
    """Leave the store as it was found."""
    yield
    if "object_store" in request.fixturenames:
        request.getfixturevalue("object_store").fault = lambda method, path, query: None


def sentence(index: int, words: int = 9) -> str:
    """A sentence that depends on its index alone."""
    return " ".join(WORDS[(index * 7 + k * (1 + index % 3)) % len(WORDS)] for k in range(words))


def save_tokenizer(directory: Path, chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer, trained on the sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator([sentence(i) for i in range(60)], vocab_size=320, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_model(directory: Path, seed: int, chat_template: str | None = CHATML, layers: int = 3) -> Path:
    """A tiny Llama with grouped-query attention and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(directory, chat_template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("policy"), seed=1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("reference"), seed=2)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat_row(index: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": sentence(index, 3 + index % 5)},
            {"role": "assistant", "content": sentence(index + 100, 4 + index % 9)},
        ]
    }


def pair_row(index: int) -> dict:
    return {
        "prompt": [{"role": "user", "content": sentence(index, 3 + index % 5)}],
        "chosen": [{"role": "assistant", "content": sentence(index + 100, 4 + index % 9)}],
        "rejected": [{"role": "assistant", "content": sentence(index + 200, 3 + index % 7)}],
    }


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", [pair_row(i) for i in range(30)])


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", [chat_row(i) for i in range(40)])


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "validation.jsonl", [chat_row(i) for i in range(500, 506)])


SMALL = [
    "anchor.fisher.prompts=3", "anchor.fisher.max_new_tokens=6", "anchor.warmup.steps=2", "anchor.warmup.examples=4",
    "anchor.warmup.batch_size=2", "valuation.layers=2", "valuation.window=4", "data.shard_examples=10",
    "valuation.tokens_per_batch=128", "cluster.cpus_per_worker=1",
    "cluster.inline_below=0",  # on Ray, as large data are; one is there for the session
]  # fmt: skip

PREFERENCE = ["data.validation=5", "valuation.beta=0.3"]


@pytest.fixture(scope="session")
def preference_run(tmp_path_factory, ray_cluster, policy, reference, pairs_file) -> Path:
    """A whole run over preference pairs; policy and reference are two models, the validation set is held out."""
    from alphatoken.jobs.cli import main

    run = tmp_path_factory.mktemp("preference")
    arguments = [f"run.dir={run}", f"model.policy={policy}", f"model.reference={reference}", f"data.train={pairs_file}"]
    assert main(["run", *arguments, *SMALL, *PREFERENCE]) == 0
    return run


@pytest.fixture
def alphatoken(ray_cluster, capfd):
    """Run the command line in this process; returns (exit status, stdout, stderr)."""
    from alphatoken.jobs.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(a) for a in arguments])
        out = capfd.readouterr()
        return status, out.out, out.err

    return run
