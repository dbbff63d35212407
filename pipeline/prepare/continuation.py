"""A completion that goes on with the prompt's last message, as when an answer's beginning is given: one turn, not two."""

from typing import Any

from alphatoken.pipeline.prepare.flags import without_flags

Messages = list[dict[str, Any]]


def continued(asked: Messages, said: Messages) -> tuple[Messages, Messages, int]:
    """Prompt and completion, the unfinished assistant message that ends the prompt put into the completion.

    The number says how many characters of the completion's first message are the prompt's: 0 where nothing is continued.
    A message with tool calls is finished.
    """
    if not (asked and said and asked[-1]["role"] == said[0]["role"] == "assistant") or asked[-1].get("tool_calls"):
        return asked, said, 0
    before = asked[-1].get("content") or ""
    whole = {**without_flags(asked[-1]), **said[0], "content": before + (said[0].get("content") or "")}
    return asked[:-1], [whole, *said[1:]], len(before)
