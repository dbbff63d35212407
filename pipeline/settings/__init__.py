"""Typed, frozen settings: one small dataclass per configuration group, with the help text of every key."""

from alphatoken.pipeline.settings.anchor import AnchorSettings, FisherSettings, WarmupSettings
from alphatoken.pipeline.settings.cluster import ClusterSettings
from alphatoken.pipeline.settings.data import ColumnSettings, DataSettings
from alphatoken.pipeline.settings.mask import MaskSettings
from alphatoken.pipeline.settings.model import ModelSettings
from alphatoken.pipeline.settings.rehearsal import RehearsalSettings
from alphatoken.pipeline.settings.run import STAGES, RunSettings, Settings
from alphatoken.pipeline.settings.trial import TrialSettings
from alphatoken.pipeline.settings.valuation import ValuationSettings

__all__ = [
    "STAGES",
    "AnchorSettings",
    "ClusterSettings",
    "ColumnSettings",
    "DataSettings",
    "FisherSettings",
    "MaskSettings",
    "ModelSettings",
    "RehearsalSettings",
    "RunSettings",
    "Settings",
    "TrialSettings",
    "ValuationSettings",
    "WarmupSettings",
]
