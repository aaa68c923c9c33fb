"""Which tokens of a conversation the assistant generates: those that the loss is on.

Where a template marks them (``{% generation %}``), they are what it marks. Elsewhere turn k is

    from   len(text of messages[:k] and the beginning of an assistant's turn)
    to     len(text of messages[:k+1])                                     both must begin the text

that is, its content, what the template puts before that by itself (an empty thought, a channel),
and the token that ends the turn; white space behind that token is the template's. A template that
writes a last turn otherwise than an earlier one (which ends in another token, or loses an empty
thought) does not begin the text so: there one character of the turn is changed, which must change
one character of the text, and what follows that up to the end of the turn is looked for in it.

Nothing is guessed: what a message says must be in the text, and the tokens of the text up to either
end of a turn must be the first tokens of the whole. (So they are where the texts between such ends
make its tokens each by itself, which is looked at first: that takes no longer than the whole.)
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from raycurv.data.bounds import TEXT_BYTES
from raycurv.data.chat_template import ChatTemplate, Rendered
from raycurv.data.conversations import ASSISTANT, REASONING, Conversation, Message
from raycurv.errors import UserError, shortened, user_errors

LossOn: TypeAlias = Literal["assistant", "last-assistant", "all"]
Span: TypeAlias = "tuple[int, int]"
_PROBE = "Answer"


@dataclass(frozen=True)
class Written:
    """A conversation as a template writes it.

    Attributes:
        text: of the whole of it.
        spans: of characters that carry the loss, ascending; ``None`` where all do.
    """

    text: str
    spans: tuple[Span, ...] | None


def write(
    conversation: Conversation, template: ChatTemplate, on: LossOn | None, where: str
) -> Written:
    """Write a conversation, and find what of it carries the loss.

    Args:
        on: which turns carry it: the assistant's, the last of them, or all tokens of what a prompt
            does not ask; ``None`` where nobody asks for turns.
        where: the row, for errors.

    Raises:
        UserError: the template fails on the conversation, leaves out what a message says, or its
            turns cannot be told apart.
    """
    work = _Writing(conversation, template, where)
    with user_errors(
        where, "a conversation that the model's chat template takes",
        "Correct the conversation, or give its tokens as `input_ids` with a `loss_mask`.",
        Exception,  # a template raises whatever it meets
    ):  # fmt: skip
        return work.written(on)


def token_mask(
    ids_T: np.ndarray,
    written: Written,
    encode: Callable[[list[str], Callable[[int], str]], list[np.ndarray]],
    where: str,
) -> np.ndarray | None:
    """Which tokens of a text carry the loss, ``[T]`` bool; ``None`` for all.

    Args:
        ids_T: tokens of the text.
        encode: gives tokens of texts, which errors name by a function of their number.
        where: the row, for errors.

    Raises:
        UserError: the tokens up to either end of a turn are others where the text goes on.
    """
    if written.spans is None:
        return None
    text, place = written.text, lambda _: where
    edges = sorted({0, len(text), *(end for span in written.spans for end in span)})
    apart = encode([text[a:b] for a, b in pairwise(edges)], place)
    counts = dict(zip(edges, np.cumsum([0, *map(len, apart)]).tolist(), strict=True))
    # Where what lies between edges makes the same tokens by itself, no token reaches over one.
    if not np.array_equal(ids_T, np.concatenate([ids_T[:0], *apart])):
        counts = {0: 0, len(text): len(ids_T)}
        for edge in edges[1:-1]:
            (head_R,) = encode([text[:edge]], place)
            if not np.array_equal(ids_T[: len(head_R)], head_R):
                before, after = text[max(0, edge - 20) : edge], text[edge : edge + 20]
                raise _told_apart(
                    where, "tokens up to a turn's edge that depend on what is behind it, between "
                    f"{before!r} and {after!r}", "White space at the beginning of what the "
                    "assistant says can be the reason: leave it out there, or give the row as "
                    "`input_ids` with a `loss_mask`.",
                )  # fmt: skip
            counts[edge] = len(head_R)
    mask_T = np.zeros(len(ids_T), bool)
    for begin, end in written.spans:
        mask_T[counts[begin] : counts[end]] = True
    return mask_T


@dataclass
class _Writing:
    """A conversation that is being written."""

    talk: Conversation
    template: ChatTemplate
    where: str

    def written(self, on: LossOn | None) -> Written:
        whole = self._render(len(self.talk.messages))
        self._check_asked(whole.text)
        asked = self.talk.prompt
        if on == "all" and self.talk.without_loss:
            raise UserError(
                f"{self.where}, message {min(self.talk.without_loss)}",
                "messages that all count in the loss, for --loss-on all",
                "one that the data leaves out of it (`weight`, `train`, `training` or `loss` of 0)",
                "Give --loss-on assistant or last-assistant, or leave the key out.",
            )  # fmt: skip
        if on is None or (on == "all" and not asked):
            return Written(whole.text, None)
        if on == "all":
            return Written(whole.text, ((self._begin(asked, whole.text), len(whole.text)),))
        own = [k for k, m in enumerate(self.talk.messages) if m["role"] == ASSISTANT]
        turns = [k for k in own if k >= asked][-1 if on == "last-assistant" else 0 :]
        found = {k: self._turn(k, own, whole) for k in turns if k not in self.talk.without_loss}
        for k, spans in found.items():
            said = "".join(whole.text[begin:end] for begin, end in spans)
            self._check_said(k, self._opening(k, whole.text) + said)
        spans = [span for one in found.values() for span in one]
        if any(begin < end for (_, end), (begin, _) in pairwise(spans)):
            raise self._apart("they overlap")
        return Written(whole.text, tuple(spans))

    def _turn(self, k: int, own: Sequence[int], whole: Rendered) -> Sequence[Span]:
        """Where the text has turn ``k`` of the assistant's ``own``."""
        if not self.template.marks(self.talk.tools):
            begin = self._begin(k, whole.text)
            return [(begin, max(begin, self._end(k, whole.text)))]
        if len(whole.marked) == len(own):
            return [whole.marked[own.index(k)]]
        # Several marks a turn: those that come with it.
        first, stop = (len(self._render(n).marked) if n else 0 for n in (k, k + 1))
        return whole.marked[first:stop]

    def _render(self, count: int, prompt: bool = False, *more: Message) -> Rendered:
        """The first ``count`` messages, and ``more``."""
        messages = [*self.talk.messages[:count], *more]
        found = self.template.render(messages, self.talk.tools, prompt)
        if len(found.text) > TEXT_BYTES:
            raise UserError(
                self.where, f"a conversation that becomes a text of at most {TEXT_BYTES >> 20} MiB",
                f"{len(found.text):,} characters", "Give it as several, or leave it out.",
            )  # fmt: skip
        return found

    def _begin(self, k: int, text: str) -> int:
        """Where turn ``k`` begins in the text."""
        follows = self.talk.messages[k]["role"] if k < len(self.talk.messages) else None
        before = self._render(k, prompt=follows == ASSISTANT).text
        if not text.startswith(before):
            raise self._apart(
                f"the text of the {k} messages before message {k} is another where that follows"
            )
        if follows == ASSISTANT and before == self._render(k).text:
            # Of a template that makes nothing of being asked for the beginning of a turn.
            own = self._render(k, False, {"role": ASSISTANT, "content": _PROBE}).text
            if not own[len(before) :].lstrip().startswith(_PROBE):
                raise self._apart("the template does not write the beginning of a turn by itself")
        return len(before)

    def _opening(self, k: int, text: str) -> str:
        """What the template writes of turn ``k`` before the model goes on with it, the beginning of
        a thought say; nothing where it marks turns."""
        if self.template.marks(self.talk.tools):
            return ""
        before = self._render(k).text if k else ""
        return text[len(before) : self._begin(k, text)] if text.startswith(before) else ""

    def _end(self, k: int, text: str) -> int:
        """Where turn ``k`` ends in the text: behind its last special token, if there is nothing but
        white space behind that."""
        alone = self._render(k + 1).text
        if text.startswith(alone):
            ends = [found.end() for found in self.template.ends.finditer(alone)]
            closed = bool(ends) and not alone[ends[-1] :].strip()
            return ends[-1] if closed else len(alone)
        # What follows a character of the turn, in the text and where the turn is the last one.
        at, own = self._changed(k, text, len(self.talk.messages)), self._changed(k, alone, k + 1)
        if at is not None and own is not None:
            rest, found = alone[own:], self.template.ends.search(alone, own)
            closing = rest if found is None else alone[own : found.start()]
            end = at + len(closing)
            special = self.template.ends.match(text, end)
            if text.startswith(closing, at) and (found is None or special is not None):
                return end if special is None or found is None else special.end()
        raise self._apart(f"message {k} is written otherwise where others follow it")

    def _changed(self, k: int, text: str, count: int) -> int | None:
        """Behind which character of the text that of the first ``count`` messages differs where the
        last character of what message ``k`` says does; ``None`` if it is not one alone."""
        other = _changed(self.talk.messages[k])
        if other is None:
            return None
        messages = [*self.talk.messages[:k], other, *self.talk.messages[k + 1 : count]]
        changed = self.template.render(messages, self.talk.tools).text
        same = bisect_left(range(len(text)), True, key=lambda i: text[: i + 1] != changed[: i + 1])
        behind = same + 1
        alike = len(changed) == len(text) != same and changed[behind:] == text[behind:]
        return behind if alike else None

    def _check_asked(self, text: str) -> None:
        """Refuse a text without what the system, the user or a tool said."""
        bare = _bare(text)
        for k, message in enumerate(self.talk.messages):
            said = message.get("content", "")
            if message["role"] == ASSISTANT or _bare(said) in bare:
                continue
            # What tools say some templates write as JSON.
            written = json.dumps(said, ensure_ascii=False)[1:-1]
            if message["role"] in ("system", "user") or _bare(written) not in bare:
                raise UserError(
                    f"{self.where}, message {k}", "a message that the chat template writes",
                    f"a text without what the {message['role']} says",
                    "Leave the message out, where the model is meant not to see it.",
                )  # fmt: skip

    def _check_said(self, k: int, own: str) -> None:
        """Refuse a turn without what the assistant said, or thought, or called."""
        message = self.talk.messages[k]
        thought = next((message[name] for name in REASONING if name in message), "")
        said = [thought, message.get("content", ""), *map(_called, message.get("tool_calls", []))]
        for one in said:
            if isinstance(one, str) and _bare(one) not in _bare(own):
                raise UserError(
                    f"{self.where}, message {k}",
                    "a turn of the assistant that the chat template writes as it is",
                    f"one without {shortened(repr(one), 60)} (thoughts of earlier turns, say)",
                    "Give --loss-on last-assistant where the last turn is whole, an example for "
                    "each turn that ends with it, or the rows as `input_ids` with a `loss_mask`.",
                )  # fmt: skip

    def _apart(self, why: str) -> UserError:
        return _told_apart(
            self.where, why, "Give --loss-on last-assistant where only earlier turns are written "
            "otherwise, an example for each turn that ends with it, a template with generation "
            "marks by --tokenizer, or the rows as `input_ids` with a `loss_mask`.",
        )  # fmt: skip


def _told_apart(where: str, why: str, remedy: str) -> UserError:
    return UserError(
        where, "a chat template whose text tells the assistant's turns from others", why, remedy
    )


def _called(call: Any) -> Any:
    """The name of the function that a tool call calls."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function.get("name", "") if isinstance(function, dict) else ""


def _changed(message: Message) -> Message | None:
    """A message that says another last character, or calls a function of another name; ``None``
    where it does neither."""
    content, calls = message.get("content", ""), message.get("tool_calls") or []
    said = content.rstrip()
    if said:
        return message | {"content": _other(said) + content[len(said) :]}
    name = _called(calls[-1]) if calls else None
    if not isinstance(name, str) or not name:
        return None
    other: Any = {"name": _other(name)}
    if "function" in calls[-1]:
        other = {"function": calls[-1]["function"] | other}
    return message | {"tool_calls": [*calls[:-1], calls[-1] | other]}


def _other(text: str) -> str:
    """A text with another last character."""
    return text[:-1] + ("x" if text[-1] != "x" else "y")


def _bare(text: str) -> str:
    """A text without white space, which templates put and take away."""
    return "".join(text.split())
