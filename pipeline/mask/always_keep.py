"""mask.always_keep: from what the user wrote to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alphatoken.pipeline.maths.masking import Ints
from alphatoken.pipeline.run.failure import SettingsWrong
from alphatoken.pipeline.run.manifest import Manifest


def always_keep_ids(entries: Sequence[Any], manifest: Manifest) -> Ints:
    """The token ids that ``entries`` name, sorted.

    ``eos``: what `prepare` found the tokenizer to end with. A number: that id. Another string: a token of the
    tokenizer, or a text that it encodes as one token; only then is the tokenizer loaded. Raises SettingsWrong with
    every entry that names no token.
    """
    counts = manifest.stage("prepare")["counts"]
    found: set[int] = set()
    problems = []
    strings = [entry for entry in entries if isinstance(entry, str) and entry != "eos"]
    tokens = _token_ids(strings, counts["tokenizer"], manifest) if strings else {}
    for entry in entries:
        if entry == "eos":
            found.update(counts["eos_token_ids"])
        elif isinstance(entry, str):
            if tokens[entry] is None:
                problems.append(f"mask.always_keep={entry}: not a token of the tokenizer {counts['tokenizer']}")
            else:
                found.add(tokens[entry])
        elif 0 <= entry < counts.get("vocabulary", 2**31):
            found.add(entry)
        else:
            problems.append(f"mask.always_keep={entry}: not a token id of the model")
    if problems:
        raise SettingsWrong(problems)
    return np.array(sorted(found), np.int64)


def _token_ids(strings: Sequence[str], tokenizer: str, manifest: Manifest) -> Mapping[str, Any]:
    """String -> token id, or None where there is none."""
    # On demand: masks need neither transformers nor torch otherwise.
    from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel, load_tokenizer
    from alphatoken.pipeline.run.remote import here

    model = manifest.content["configuration"].get("model", {})
    source = ModelSource(tokenizer, model.get("revision"), trust_remote_code=model.get("trust_remote_code", False))
    try:
        loaded = load_tokenizer(here(source, weights=False))
    except UnreadableModel as error:
        wanted = ", ".join(strings)
        raise SettingsWrong([f"mask.always_keep={wanted}: {error}; token ids need no tokenizer"]) from error
    vocabulary = loaded.get_vocab()
    found: dict[str, int | None] = {}
    for text in strings:
        encoded = loaded.encode(text, add_special_tokens=False)
        whole = encoded[0] if len(encoded) == 1 and encoded[0] != loaded.unk_token_id else None
        found[text] = vocabulary.get(text, whole)
    return found
