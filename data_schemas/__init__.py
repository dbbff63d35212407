"""Arrow schemas of every table that AlphaToken reads back or hands to a trainer.

Imports pyarrow alone, so that a consumer can check a file without torch or Ray. Every schema carries its name and
version in the metadata key ``alphatoken.schema``; a reader refuses a version that it does not know.
"""

from alphatoken.data_schemas.masks import LOSS_WEIGHT, MASK_EXTRA_COLUMNS, masks_schema
from alphatoken.data_schemas.preference import (
    BRANCHES,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    PREFERENCE_VALUES,
    preference_masks_schema,
    preference_values_schema,
)
from alphatoken.data_schemas.prepared import PREPARED
from alphatoken.data_schemas.quarantine import QUARANTINE
from alphatoken.data_schemas.values import COMPONENTS, GRADIENT_NORM, KEPT, REHEARSED_VALUES, VALUES, values_schema
from alphatoken.data_schemas.version import SCHEMA_KEY, SchemaMismatch, check

__all__ = [
    "BRANCHES",
    "COMPONENTS",
    "GRADIENT_NORM",
    "KEPT",
    "LOSS_WEIGHT",
    "MASK_EXTRA_COLUMNS",
    "PREFERENCE_PREPARED",
    "PREFERENCE_REFERENCE",
    "PREFERENCE_VALUES",
    "PREPARED",
    "QUARANTINE",
    "REHEARSED_VALUES",
    "SCHEMA_KEY",
    "VALUES",
    "SchemaMismatch",
    "check",
    "masks_schema",
    "preference_masks_schema",
    "preference_values_schema",
    "values_schema",
]
