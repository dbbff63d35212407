"""Arrow schemas of every table that AlphaToken reads back or hands to a trainer.

Imports pyarrow alone, so that a consumer can check a file without torch or Ray. Every schema carries its name and
version in the metadata key ``alphatoken.schema``; a reader refuses a version that it does not know.
"""

from alphatoken.data_schemas.masks import LOSS_WEIGHT, MASK_EXTRA_COLUMNS, masks_schema
from alphatoken.data_schemas.preference import (
    BRANCHES,
    PREFERENCE_PREPARED,
    PREFERENCE_REFERENCE,
    preference_masks_schema,
    preference_values_schema,
)
from alphatoken.data_schemas.prepared import PREPARED
from alphatoken.data_schemas.quarantine import QUARANTINE
from alphatoken.data_schemas.reference import REFERENCE
from alphatoken.data_schemas.trial import TRIAL_RESULTS
from alphatoken.data_schemas.values import (
    COMPONENTS,
    EXACT,
    KEPT,
    REFERENCE_LOSS,
    SCORES,
    SIGNED,
    UNROLLED,
    is_signed,
    value_columns,
    values_schema,
)
from alphatoken.data_schemas.version import SCHEMA_KEY, SchemaMismatch, check, named

__all__ = [
    "BRANCHES",
    "COMPONENTS",
    "EXACT",
    "KEPT",
    "LOSS_WEIGHT",
    "MASK_EXTRA_COLUMNS",
    "PREFERENCE_PREPARED",
    "PREFERENCE_REFERENCE",
    "PREPARED",
    "QUARANTINE",
    "REFERENCE",
    "REFERENCE_LOSS",
    "SCHEMA_KEY",
    "SCORES",
    "SIGNED",
    "TRIAL_RESULTS",
    "UNROLLED",
    "SchemaMismatch",
    "check",
    "is_signed",
    "masks_schema",
    "named",
    "preference_masks_schema",
    "preference_values_schema",
    "value_columns",
    "values_schema",
]
