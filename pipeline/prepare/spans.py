"""Which characters of a rendered conversation are its responses.

A response is what the model has to write: from the end of the generation prompt through the end of the turn. Both are
learned on a skeleton (`skeleton`), once per shape of conversation, by rendering it also up to the response and through it:
what stands before the response with the generation prompt is its ``lead``, what follows it when it is the last turn and
when it is not is its ``tail``. Templates change other things once turns follow (they drop reasoning, move the system text
or the tools, write an end of text at the very end alone); what is compared is only the text between two neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from alphatoken.pipeline.prepare.chat import ChatTemplate, Span
from alphatoken.pipeline.prepare.outcome import Unusable
from alphatoken.pipeline.prepare.skeleton import Masked, Piece, Skeleton

_UNSTABLE = "template_not_prefix_stable: the chat template {}; add {{% generation %}} markers to it"


@dataclass(frozen=True, slots=True)
class Turn:
    """What stands around one response.

    ``lead``: the template's text between piece ``before`` (None: the beginning) and the response; None where the response
    begins with piece ``first``. ``last``: the response's own last piece, which ``tail`` follows within the response; None
    where tool calls end it. Then ``follow`` stands between its end and piece ``then`` (None: the end of the text).
    ``opened``: what the generation prompt says after ``lead``, where the message's own text goes on with it.
    """

    message: int
    before: int | None
    lead: str | None
    first: int | None
    last: int | None
    tail: str
    then: int | None
    follow: str
    opened: str = ""


def learn(
    template: ChatTemplate, view: Masked, stem: str, tools: Any, skeleton: Skeleton, respond: Sequence[int]
) -> list[Turn]:
    """The turn of every response, by rendering the skeleton up to it and through it. Raises `Unusable`."""
    return [_Learner(template, view, stem, tools, skeleton).turn(i) for i in respond]


class _Learner:
    def __init__(self, template: ChatTemplate, view: Masked, stem: str, tools: Any, skeleton: Skeleton) -> None:
        self._template, self._view, self._stem, self._tools = template, view, stem, tools
        self._skeleton = skeleton

    def turn(self, i: int) -> Turn:
        own = [n for n in self._skeleton.landed if self._view.pieces[n].message == i]
        first, last = (own[0], own[-1]) if own else (None, None)
        before, lead, opened = self._lead(i, first)
        message = self._view.messages[i]
        if message.get("tool_calls") or last is None:
            then, follow = self._follow(i, last if last is not None else before)
            return Turn(i, before, lead, first, None, "", then, follow, opened)
        return Turn(i, before, lead, first, last, self._tail(i, last, before), None, "", opened)

    def _rendered(self, count: int, prompt: bool = False) -> Skeleton:
        return Skeleton.of(self._template.text(self._view.messages[:count], self._tools, prompt), self._stem)

    def _lead(self, i: int, first: int | None) -> tuple[int | None, str | None, str]:
        """A generation prompt may say more than the template writes before a finished turn (an opened <think>), or less;
        then the response begins where the two part."""
        if i == 0 and first is not None:
            return None, None, ""  # nothing precedes it, so nothing prompts it
        asked = self._rendered(i, prompt=True) if i else Skeleton(("",), ())
        before = self._skeleton.neighbour(first, -1) if first is not None else (asked.landed or (None,))[-1]
        if before is not None and before not in self._skeleton.landed:
            raise self._unstable(f"leaves out what comes before message {i} once it follows")
        stands, prompt = self._skeleton.after(before), asked.literals[-1]
        shared = _parting(stands, prompt, self._template.specials)
        opened = "think" in prompt[max(0, shared - 10) :].lower()
        if shared == len(prompt) or (first is not None and shared == len(stands)) or (shared and opened):
            thought = self._template.thoughts
            own = thought is not None and thought.match((self._view.messages[i].get("content") or "").lstrip())
            return before, stands[:shared], prompt[shared:] if own else ""
        # Messages that follow may have changed how the one before ends; the header is then what the prompt adds.
        unprompted = self._rendered(i).literals[-1] if i else ""
        header = prompt[len(unprompted) :] if prompt.startswith(unprompted) else ""
        if header and first is not None and stands.endswith(header):
            return before, stands, ""
        raise self._unstable(f"renders what comes before message {i} differently once it follows")

    def _tail(self, i: int, last: int, before: int | None) -> str:
        """The end of the turn after its last text."""
        stands, through = self._skeleton.after(last), self._through(i, last)
        specials = self._template.specials
        shared = _parting(stands, through, specials)
        own, other = _leading(stands, specials), _leading(through, specials)
        if not stands[:shared].strip() and own and other and own != other:
            # The end of the last turn is another one (harmony): this one's, if the turn before ended with it as well.
            _, *ends = self._skeleton.after(before).split(own.strip())
            if any(_leading(end, specials) for end in ends):
                return own
        return stands[: trimmed(stands, 0, shared, specials)]

    def _follow(self, i: int, previous: int | None) -> tuple[int | None, str]:
        """What follows a turn that ends in tool calls, up to the next text."""
        if i + 1 == len(self._view.messages):
            return None, ""
        stands, through = self._skeleton.after(previous), self._through(i, previous)
        shared = _parting(stands, through, self._template.specials)
        rest = through[shared:]
        for special in self._template.specials:  # an end of text that the last turn alone has
            rest = rest.replace(special, "")
        if rest.strip():  # the last turn alone has something before its calls (a <think> block)
            more = through[shared:]
            same = next((more[k:] for k in range(len(more)) if stands.startswith(more[k:], shared)), "")
            shared = shared + len(same) if same.strip() and _called(self._view.messages[i]) in same else 0
        if not shared:
            raise self._unstable(f"renders message {i} differently once others follow")
        place = 0 if previous is None else self._skeleton.landed.index(previous) + 1
        then = self._skeleton.landed[place] if place < len(self._skeleton.landed) else None
        return then, stands[shared:]

    def _through(self, i: int, previous: int | None) -> str:
        if i + 1 == len(self._view.messages):
            return self._skeleton.after(previous)
        through = self._rendered(i + 1)
        if previous is None:
            return through.literals[-1]
        place = through.landed.index(previous) + 1 if previous in through.landed else 0
        more = [self._view.pieces[n] for n in through.landed[place:]]
        # The last turn may have reasoning that it loses once others follow.
        if not place or not all(piece.reasoning and piece.message == i for piece in more):
            raise self._unstable(f"renders message {i} differently once others follow")
        return "".join(through.literals[place:])

    @staticmethod
    def _unstable(what: str) -> Unusable:
        return Unusable(_UNSTABLE.format(what))


def placed(
    turn: Turn, skeleton: Skeleton, spans: Mapping[int, Span], text: str, specials: Sequence[str], opening: int | None
) -> Span | None:
    """The characters of a response in ``text``; None where what stands around it is not what was learned.

    ``spans``: of the landed pieces. ``opening``: where the response begins in the middle of its message, else None.
    """
    if opening is not None:
        start = opening
    elif turn.lead is None:
        if turn.first is None or turn.first not in spans:
            return None
        start = spans[turn.first][0]
    else:
        if (turn.before is not None and turn.before not in spans) or not skeleton.after(turn.before).startswith(
            turn.lead
        ):
            return None
        start = (0 if turn.before is None else spans[turn.before][1]) + len(turn.lead)
        start += len(turn.opened) if text.startswith(turn.opened, start) else 0
    if turn.last is not None:
        if turn.last not in spans or not skeleton.after(turn.last).startswith(turn.tail):
            return None
        end = spans[turn.last][1] + len(turn.tail)
    else:
        if (turn.then is not None and turn.then not in spans) or not skeleton.before(turn.then).endswith(turn.follow):
            return None
        limit = (len(text) if turn.then is None else spans[turn.then][0]) - len(turn.follow)
        end = trimmed(text, start, limit, specials)
    return (start, end) if start < end else None


def of_marks(
    marks: Sequence[Span], pieces: Mapping[int, Piece], spans: Mapping[int, Span], roles: Sequence[str]
) -> list[tuple[int, Span]]:
    """(message, characters) of the template's generation markers. Raises `Unusable` where they cover other messages."""
    for number, (start, end) in spans.items():
        role = pieces[number].role
        if role != "assistant" and any(s < end and start < e for s, e in marks):
            raise Unusable(f"not_in_template: the generation markers of the chat template cover `{role}` messages")
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if len(marks) == len(turns):
        return list(zip(turns, marks, strict=True))
    found = []
    for start, end in marks:
        inside = [pieces[n].message for n, (s, e) in spans.items() if start < e and s < end]
        past = max((pieces[n].message for n, (_, e) in spans.items() if e <= start), default=-1)
        following = [i for i in turns if i > past] or turns[-1:]
        found.append((inside[0] if inside else following[0], (start, end)))
    return found


def trimmed(text: str, start: int, end: int, specials: Sequence[str]) -> int:
    """The end of a range up to its last special token (end of turn), where only blanks follow that."""
    kept = text[start:end].rstrip()
    return start + len(kept) if kept.endswith(tuple(specials)) else end


def _called(message: Mapping[str, Any]) -> str:
    """The name of the last function that a message calls, '' without any."""
    call: Mapping[str, Any] = (message.get("tool_calls") or ({},))[-1]
    function = call.get("function")
    inner = function if isinstance(function, Mapping) else call
    return str(inner.get("name") or "")


def _leading(text: str, specials: Sequence[str]) -> str:
    """The special token that a text begins with, and the blanks before it; else ''."""
    bare = text.lstrip()
    found = max((s for s in specials if bare.startswith(s)), key=len, default="")
    return text[: len(text) - len(bare)] + found if found else ""


def _parting(one: str, other: str, specials: Sequence[str]) -> int:
    """How many characters two texts share from their beginnings, no special token cut in two."""
    shared = len(commonprefix([one, other]))
    for special in specials:
        for text in (one, other):
            at = text.find(special, max(0, shared - len(special) + 1))
            if 0 <= at < shared < at + len(special):
                shared = at
    return shared
