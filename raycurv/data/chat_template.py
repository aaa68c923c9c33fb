"""The chat template of a tokenizer: conversations as the text that a model saw of them.

A template is a Jinja program of the tokenizer's directory. transformers runs it in a sandbox, where
it reaches messages, tools and the names of special tokens, and neither files nor Python. What it
writes must not depend on the day: ``strftime_now``, which some ask for today's date, gives `DATE`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from raycurv.data.conversations import TOOLS, Message
from raycurv.errors import UserError

# The one that Llama 3's templates write themselves where nobody says what day it is.
DATE = date(2024, 7, 26)
_CLOCK = "strftime_now"
_FORMAT = re.compile(_CLOCK + r"\s*\(\s*(\"[^\"\n]*\"|'[^'\n]*')\s*\)")
# What a conversation may take of a processor, in seconds; templates in use take milliseconds.
MOST_SECONDS = 60.0
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: of the whole of it.
        marked: where the template marks what the assistant generates, ``(begin, end)`` in
            characters; empty where it marks nothing.
    """

    text: str
    marked: tuple[tuple[int, int], ...] = ()


@dataclass
class ChatTemplate:
    """What writes conversations.

    Args:
        tokenizer: transformers'.
        directory: that it was loaded from.
        used: whether any conversation went through it.
    """

    tokenizer: Any
    directory: Path
    used: bool = False

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False
    ) -> Rendered:
        """Write messages.

        Args:
            prompt: whether the beginning of an assistant's turn follows them.

        Raises:
            UserError: the tokenizer has no template, or one that comes to no end.
            Exception: whatever the template raises of these messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        self.used = True
        template = self._of(bool(tools))
        with self._within(MOST_SECONDS):
            (text,), marks = render_jinja_template(
                conversations=[list(messages)],
                tools=None if tools is None else list(tools),
                chat_template=_dated(template),
                return_assistant_tokens_mask=self.marks(tools),
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        return Rendered(text, tuple(map(tuple, marks[0])) if marks else ())

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Ends a body that takes more of the processor with a UserError: in the main thread of a
        program, to which signals come."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(*_: Any) -> None:
            raise UserError(
                f"the chat template of {self.directory}",
                f"one that writes a conversation in {seconds:g} seconds", "more",
                "Look at its loops: it may come to no end. Or give the rows as `input_ids` with a "
                "`loss_mask`.",
            )  # fmt: skip

        before = signal.signal(signal.SIGVTALRM, end)
        left = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, *left)
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)

    def marks(self, tools: Sequence[Any] | None) -> bool:
        """Whether the template for such tools, or for none, marks what the assistant generates."""
        return _MARKED.search(self._of(bool(tools))) is not None

    def shows_tools(self) -> bool:
        """Whether tools are anything to it."""
        return TOOLS in self._of(True)

    @property
    def dated(self) -> bool:
        """Whether it asks for the day."""
        return any(_CLOCK in template for template in self._all.values())

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Finds the tokenizer's special tokens in a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        longest_first = sorted(
            special | {*self.tokenizer.all_special_tokens}, key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, filter(None, longest_first))) or "(?!)")

    def describe(self) -> dict[str, Any]:
        """What tells it from others, and the day that it is given, if it asks."""
        said = json.dumps([self._all, self.tokenizer.special_tokens_map], sort_keys=True)
        found = {"chat_template": hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}
        return found | ({"chat_date": DATE.isoformat()} if self.dated else {})

    @cached_property
    def _all(self) -> dict[str, str]:
        found = self.tokenizer.chat_template
        return found if isinstance(found, dict) else {"": found} if found else {}

    def _of(self, tools: bool) -> str:
        if not self._all:
            raise UserError(
                f"the tokenizer of {self.directory}",
                "a chat template, since the data is conversations", "none",
                "Put the chat_template.jinja of the model's chat version beside it, give "
                "--tokenizer DIR of one that has it, or the rows as `input_ids` with a "
                "`loss_mask`.",
            )  # fmt: skip
        # As transformers chooses among several.
        template: str = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
        return template


def _dated(template: str) -> str:
    """A template whose clock stands still. The end of the line is the block's, as transformers
    reads templates, so what follows begins as it did."""
    if _CLOCK not in template:
        return template
    days = {literal[1:-1]: DATE.strftime(literal[1:-1]) for literal in _FORMAT.findall(template)}
    table = json.dumps(days, sort_keys=True)
    unknown = f"raise_exception('{_CLOCK} of a format that is not written out')"
    said = f"{{{{ ({table})[form] if form in {table} else {unknown} }}}}"
    return f"{{% macro {_CLOCK}(form) %}}{said}{{% endmacro %}}\n{template}"
