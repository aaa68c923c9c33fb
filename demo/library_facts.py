"""Facts about the Python standard library, a sentence each, from its own docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fact:
    """What one function, class or method of a module does.

    Attributes:
        id: its dotted name.
        module: that it is of.
        sentence: the first of its docstring, in one line, without the stop.
    """

    id: str
    module: str
    sentence: str

    @property
    def text(self) -> str:
        """The fact as a line that says what it is about."""
        return f"{self.id}: {self.sentence}."


def facts(modules: Sequence[str], methods: bool = False, words: int = 16) -> list[Fact]:
    """The facts of some modules, in the order of their names; no sentence comes twice.

    Args:
        methods: those of classes, too.
        words: longest sentence; a shorter one has at least five.
    """
    found: dict[str, Fact] = {}
    for name in modules:
        module = importlib.import_module(name)
        for dotted, thing in _members(module, name, methods):
            sentence = _first_sentence(thing)
            if 5 <= len(sentence.split()) <= words and sentence.isascii():
                found.setdefault(sentence, Fact(dotted, name, sentence))
    return list(found.values())


def _members(module: Any, name: str, methods: bool) -> Iterator[tuple[str, Any]]:
    for key, thing in sorted(vars(module).items()):
        own = getattr(thing, "__module__", None) in (name, f"_{name}", None)
        if key.startswith("_") or not own or not (inspect.isclass(thing) or callable(thing)):
            continue
        yield f"{name}.{key}", thing
        if methods and inspect.isclass(thing):
            for method, function in sorted(vars(thing).items()):
                if not method.startswith("_") and callable(function):
                    yield f"{name}.{key}.{method}", function


def _first_sentence(thing: Any) -> str:
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
    line = " ".join(paragraph.split())
    return re.split(r"[.:](?:\s|$)", line)[0].strip()
