"""Which columns are recognised under which names, and which shape of data they promise.

Columns that are present but null count as absent: this is how Arrow represents rows of different shapes.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from alphatoken.pipeline.prepare.outcome import Unusable

# In the order in which a row that fits several shapes is read. Token ids come first because whoever added
# them meant them to be used; a preference pair often carries a `messages` copy of its chosen side.
SHAPES = (
    ("pretokenized", ("input_ids", "labels")),
    ("preference_tokens", ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")),
    ("preference", ("chosen", "rejected")),
    ("messages", ("messages",)),
    ("prompt_completion", ("prompt", "completion")),
    ("instruction", ("instruction", "output")),
    ("sharegpt", ("conversations",)),
)
PREFERENCE = ("preference", "preference_tokens")
TOKEN_MASKS = ("completion_mask", "assistant_masks", "loss_mask")  # 1: a response token; several count together
_INSTEAD = {"completion": ("response",), "labels": TOKEN_MASKS}  # what may stand in the place of a column


def row_kind(column_names: Iterable[str], columns: Mapping[str, str]) -> str:
    """The shape that the column names promise.

    One of messages, prompt_completion, instruction, sharegpt, pretokenized, preference, preference_tokens, unknown.
    ``columns`` maps a canonical name to the user's; where several shapes fit, one whose columns the user named wins.
    """
    return _kind_of(tuple(column_names), tuple(columns.items()))


@lru_cache(maxsize=256)  # the rows of a file have few sets of columns, and each row is asked several times
def _kind_of(column_names: tuple[str, ...], given: tuple[tuple[str, str], ...]) -> str:
    present, columns = set(column_names), dict(given)
    fitting = [
        (kind, names)
        for kind, names in SHAPES
        if all(any(column in present for column in columns_of(name, columns)) for name in names)
    ]
    for kind, names in fitting:
        if any(columns.get(other) for name in names for other in (name, *_INSTEAD.get(name, ()))):
            return kind
    return fitting[0][0] if fitting else "unknown"


def filled(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that have a value; one without does not decide which shape the row has.

    A text column has an empty string where it has no value. Where nothing is known without those columns, they count.
    """
    return [name for name, value in row.items() if value is not None and value != ""]


def columns_of(name: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns in which a value of that canonical name may stand, in the order in which they are looked at."""
    given = columns.get(name)
    return (given,) if given else (name, *(columns.get(other) or other for other in _INSTEAD.get(name, ())))


def value_of(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    """The value of that canonical name; None where the row has none."""
    return next((row[column] for column in columns_of(name, columns) if row.get(column) is not None), None)


def shown(value: Any) -> str:
    """A value as it stands in a reason."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def wrong_type(where: str, value: Any, wanted: str) -> Unusable:
    """The refusal of a value of another type than ``wanted``."""
    kind = "null" if value is None else type(value).__name__
    return Unusable(f"wrong_type: {where} is {kind}, not {wanted}")


def integers(value: Any, where: str) -> list[int]:
    """A list of integers. Raises `Unusable`."""
    if not isinstance(value, list):
        raise wrong_type(where, value, "a list of integers")
    for index, item in enumerate(value):
        if not isinstance(item, int) or isinstance(item, bool):
            raise wrong_type(f"{where}[{index}]", item, "an integer")
    return value
