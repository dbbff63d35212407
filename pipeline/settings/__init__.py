"""Typed, frozen settings: one small dataclass per configuration group, with the help text of every key."""

from pipeline.settings.anchor import AnchorSettings, FisherSettings, WarmupSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.data import ColumnSettings, DataSettings
from pipeline.settings.mask import MaskSettings
from pipeline.settings.model import ModelSettings
from pipeline.settings.rehearsal import RehearsalSettings
from pipeline.settings.run import STAGES, RunSettings, Settings
from pipeline.settings.valuation import ValuationSettings

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
    "ValuationSettings",
    "WarmupSettings",
]
