"""Which models: the policy that is going to be trained and the reference whose knowledge should stay."""

from dataclasses import dataclass
from typing import Any

from pipeline.settings.option import one_of, option


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Configuration group ``model``."""

    policy: Any = option(
        "embedded", "local directory, hub id, PEFT adapter directory, or `embedded` (SmolLM2-135M-Instruct)"
    )
    reference: Any = option(
        None, "the pre-trained model to stay close to; default: model.policy (or its base, for an adapter)"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub, for both models")
    dtype: str = option("auto", "auto (float32 on a CPU, else the checkpoint's) | float32 | bfloat16")
    attention: str = option("sdpa", "sdpa | flash_attention_2 | eager")
    trust_remote_code: bool = option(False, "allow a checkpoint to run code of its own")

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        found = one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        found += one_of("model.attention", self.attention, ("sdpa", "flash_attention_2", "eager"))
        for key, value in (("model.policy", self.policy), ("model.reference", self.reference)):
            if isinstance(value, list | tuple):
                found.append(f"{key}: a list of checkpoints is not available in this version; give one")
            elif value is not None and (not isinstance(value, str) or not value):
                found.append(f"{key}={value}: must be a directory, a hub id or `embedded`")
        if self.policy is None:
            found.append("model.policy is missing: give a local directory, a hub id or `embedded`")
        return found
