"""alphatoken config: the settings that a command line comes to, as YAML. Looks at no data and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from omegaconf import OmegaConf

from alphatoken.jobs.cli import COMMANDS, parse
from alphatoken.jobs.config import load
from alphatoken.pipeline.run.redaction import without_secrets


def execute(arguments: Sequence[str]) -> int:
    """Print the configuration. Raises SettingsWrong for settings that a run would refuse."""
    parsed = parse("config", arguments, COMMANDS["config"].options)
    settings = without_secrets(asdict(load(parsed.overrides, parsed.recorded)))
    print(OmegaConf.to_yaml(OmegaConf.create(settings)), end="")
    return 0
