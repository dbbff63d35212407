"""What a raw row may become: a conversation, plain text, token ids that somebody else made, or a reason why not.

A row that is used may carry notes about what happened to it on the way; they are counted, and said at the end.
"""

from dataclasses import dataclass
from typing import Any

IGNORED = -100  # the label of a token that is not learned (as in maths.batch, which needs torch)
ROLES = ("user", "assistant", "system", "tool", "developer")

# What is said of the rows that carry a note, before their number.
NOTES = {
    "turns_not_learned": "assistant turns marked as not to be learned (weight, train, loss) are no responses",
    "flag_not_read": "messages of others than the assistant marked as to be learned are no responses all the same",
    "label_not_read": "a label of 0 or 1 is not read (with data.columns.label=label, 0 is a bad answer)",
    "padding_stripped": "padding (attention_mask 0) was taken off",
    "prompt_stripped": "the prompt was taken off the beginning of the responses, since all rows repeat it",
    "id_repeated": "an id that another row of the same part has: what goes by id (mask.score=random, joins) takes them for one",
    "prompt_repeated": "the response repeats the prompt, which now stands twice; it is taken off only where all rows do",
}


class Unusable(ValueError):
    """A row that cannot be used: ``code: what is wrong``, one line, safe to store as UTF-8.

    Takes one argument so that it survives pickling on its way through Ray.
    """

    def __init__(self, reason: str) -> None:
        line = " ".join(str(reason).encode("utf-8", "backslashreplace").decode().split())
        super().__init__(line if len(line) <= 400 else line[:397] + "...")

    @property
    def code(self) -> str:
        """The stable first word of the reason, e.g. ``no_response``: what counts are grouped by."""
        return str(self).partition(":")[0]


class TemplateRequired(ValueError):
    """The data need a chat template and the configuration gives none: wrong for every row, not for one."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template.

    ``messages``: dicts with ``role`` (one of ROLES) and ``content`` (a string; absent only beside
    ``tool_calls``); other keys are kept for the template. ``tools``: JSON schemas or None. ``respond``: the
    indices of the assistant messages that are responses, ascending; every assistant message after the first
    of them is one too, but for those that are marked as not to be learned. ``begun``: characters of the first response's
    content that are the prompt's, where a completion continues an unfinished message.
    ``notes``: what happened to the row on its way, to be counted (keys of `NOTES`).
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    respond: tuple[int, ...]
    notes: tuple[str, ...] = ()
    begun: int = 0


@dataclass(frozen=True, slots=True)
class Plain:
    """Text taken as it is: ``completion`` (not blank) directly follows ``prompt`` (may be empty)."""

    prompt: str
    completion: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pretokenized:
    """Token ids from elsewhere: two lists of int, not yet checked against each other or a vocabulary."""

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()
