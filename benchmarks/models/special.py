"""What a type needs beyond the general rule: field -> value, by model type."""

from __future__ import annotations

from typing import Any

SPECIAL: dict[str, dict[str, Any]] = {}
