"""The guard: what the user wrote is what stands in the text, every message once and in order, or the row says why not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alphatoken.pipeline.prepare.chat import Messages, Span
from alphatoken.pipeline.prepare.outcome import Unusable
from alphatoken.pipeline.prepare.skeleton import Piece, Skeleton, written

NOT_IN_TEMPLATE = "not_in_template"
LEFT_OUT = "the chat template leaves out"
_ANYWHERE = ("system", "developer")  # roles whose text templates move to another turn
_SWITCHES = ("/no_think", "/think")  # words of a system text that steer a template and are not meant to stand


def _refusal(what: str) -> Unusable:
    return Unusable(f"{NOT_IN_TEMPLATE}: {what}")


def check_landed(skeleton: Skeleton, pieces: Sequence[Piece]) -> None:
    """Every piece lands once, in order. Raises `Unusable`; reasoning may be left out, a system text may be moved."""
    if skeleton.landed == tuple(range(len(pieces))):
        return
    found = Counter(skeleton.landed)
    for number, piece in enumerate(pieces):
        if not found[number] and not piece.reasoning:
            raise _refusal(f"{LEFT_OUT} `{piece.role}` messages")
        if found[number] > 1:
            raise _refusal(f"the chat template writes `{piece.role}` messages {found[number]} times")
    order = [n for n in skeleton.landed if pieces[n].role not in _ANYWHERE]
    for one, other in zip(order, order[1:], strict=False):
        if pieces[one].message > pieces[other].message:
            raise _refusal(f"the chat template puts `{pieces[one].role}` messages in another order")


def check_others(
    text: str, messages: Messages, spans: Mapping[int, Span], pieces: Sequence[Piece], drops: bool
) -> None:
    """Every message of other roles than the assistant's stands between the assistant's texts around it, in order.

    For templates that look at what these messages say, so that they cannot be marked. ``spans``: of the assistant's
    ``pieces``. ``drops``: the template takes switches out of the system text. Raises `Unusable`.
    """
    position = 0
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role == "assistant":
            position = max([position, *(end for n, (_, end) in spans.items() if pieces[n].message == i)])
            continue
        if not isinstance(content, str) or not content.strip():
            continue
        moved = role in _ANYWHERE
        limit = min((start for n, (start, _) in spans.items() if pieces[n].message > i), default=len(text))
        where = (0, len(text)) if moved else (position, limit)
        place = written(text, Piece(i, role, content.strip()), *where)
        if place is None and moved and drops:
            for switch in _SWITCHES:
                content = content.replace(switch, "")
            place = written(text, Piece(i, role, content.strip()), *where)
        if place is None:
            raise _refusal(f"{LEFT_OUT} `{role}` messages")
        position = position if moved else place[1]


def check_tools(text: str, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Every tool and every function that is called is named in the text. Raises `Unusable`."""
    called = [call for message in messages for call in message.get("tool_calls") or ()]
    for what, given in (("tool calls", called), ("tools", tools or ())):
        for one in given:
            function = one.get("function")
            inner = function if isinstance(function, Mapping) else one
            name = inner.get("name")
            if isinstance(name, str) and name not in text:
                raise _refusal(f"{LEFT_OUT} {what}")


def lost_reasoning(skeleton: Skeleton, pieces: Sequence[Piece], respond: Sequence[int]) -> int:
    """In how many responses the template leaves out reasoning that the row has."""
    lost = {p.message for n, p in enumerate(pieces) if p.reasoning and n not in skeleton.landed}
    return len(lost.intersection(respond))
