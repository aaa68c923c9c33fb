"""What is packed into a wheel: all that raycurv reads beside its code, and nothing but raycurv."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import tomllib
from commands import ROOT

TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def forgotten(declared: dict[str, list[str]]) -> set[str]:
    """Files of the package that no declaration names, and that are not Python's."""
    patterns = [
        (Path(*package.split(".")), pattern)
        for package, several in declared.items()
        for pattern in several
    ]
    there = (path.relative_to(ROOT) for path in (ROOT / "raycurv").rglob("*") if path.is_file())
    return {
        str(path)
        for path in there
        if path.suffix not in (".py", ".pyc")
        and not any(
            path.parent == (at / p).parent and fnmatchcase(path.name, Path(p).name)
            for at, p in patterns
        )
    }


def test_every_file_that_is_no_code_is_declared() -> None:
    declared = TOOL["package-data"]
    assert not forgotten(declared)
    for name in declared:
        assert forgotten({other: p for other, p in declared.items() if other != name}), name


def test_every_directory_of_code_is_a_package_and_nothing_else_is_packed() -> None:
    code = {path.parent for path in (ROOT / "raycurv").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in code)
    include = TOOL["packages"]["find"]["include"]
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"raycurv", "jobs", "tests", "demo"} <= folders
    packed = {f for f in folders if any(fnmatchcase(f, pattern) for pattern in include)}
    assert packed == {"raycurv"}
