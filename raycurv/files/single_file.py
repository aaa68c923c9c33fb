"""A file that a flag names and a person opens: on this machine, outside of any run directory."""

from __future__ import annotations

import os
from pathlib import Path

from raycurv.errors import UserError, user_errors


def check_single_file(flag: str, path: str, *endings: str) -> None:
    """Refuse a file that cannot be made, before anything is read; UserError that names the flag."""
    if not path.endswith(endings):
        raise UserError(flag, f"a file that ends in {' or '.join(endings)}", repr(path), "")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(flag, "a file in a directory that exists", repr(path), "")
    if Path(path).is_dir():
        raise UserError(flag, "a file", f"the directory {path!r}", "")


def write_single_file(path: str, content: bytes) -> str:
    """Write the file, whole or not at all; gives its absolute path. UserError if it cannot be."""
    whole = Path(path).absolute()
    part = whole.with_name(f"{whole.name}.part")
    with user_errors(str(whole), "a file that can be written", "", OSError):
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            file.write(content)
        os.replace(part, whole)
    return str(whole)
