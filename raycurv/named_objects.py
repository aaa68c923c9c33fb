"""Objects of the user's own that a flag names as ``package.module:name``.

An import looks where Python does, and then in a directory, which is the working directory unless
said otherwise. That directory is searched for the named module and for what modules found there
import (their siblings), and for nobody else: a file ``tokenizers.py`` that lies in it is never
taken for a library that some other library asks for. So it is not put on ``sys.path``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_IMPORT_SYSTEM = ("importlib", "importlib._bootstrap", "importlib._bootstrap_external")


def is_named_object(text: str) -> bool:
    """Whether a text has the form ``package.module:name``."""
    return _NAME.fullmatch(text) is not None


def import_named(name: str, folder: str | os.PathLike[str] | None = None) -> Any:
    """Import the object that a flag names.

    Args:
        name: ``package.module:name``.
        folder: directory that is searched behind Python's own path; the working directory when
            ``None``.

    Raises:
        Exception: whatever the import raises; code of the user's runs.
    """
    module_name, _, attribute = name.partition(":")
    finder = _finder_of(os.path.abspath(folder if folder is not None else os.getcwd()))
    # A module may have been written a moment ago.
    importlib.invalidate_caches()
    finder.wanted = module_name.partition(".")[0]
    try:
        found: Any = importlib.import_module(module_name)
    finally:
        finder.wanted = None
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


class _Beside(MetaPathFinder):
    """Finds top-level modules in one directory, for those who may look there.

    Attributes:
        wanted: the module that a flag names, while it is imported.
        found: the modules that were found, whose own code may import others.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.wanted: str | None = None
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # What is inside a package is found along the package's own path.
        if path is not None or not (fullname == self.wanted or _importer() in self.found):
            return None
        spec = PathFinder.find_spec(fullname, [self._folder], target)
        if spec is not None:
            self.found.add(fullname)
        return spec


def _importer() -> str:
    """The top-level module whose code runs the import statement."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


_FINDERS: dict[str, _Beside] = {}


def _finder_of(folder: str) -> _Beside:
    """The finder of a directory, asked after all others."""
    finder = _FINDERS.setdefault(folder, _Beside(folder))
    if finder not in sys.meta_path:
        sys.meta_path.append(finder)
    return finder
