"""Docstrings as Markdown, for mkdocstrings.

References (``:func:`raycurv.fit```) become code; of two colons before an example one remains.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class DocstringRoles(Extension):
    """Changes what is no Markdown in the docstring of each object that is shown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
