"""What the pages say: what is copied from the README runs, links lead somewhere, and the site has
all that there is to look up."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run_here
from test_cluster_files import dead_links

import raycurv
from raycurv.jobs.registry import JOBS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
_COMMAND = re.compile(r"(?:raycurv|python jobs/|.* python jobs/)\s?(\w+)(?:\.py)?(?= )")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page's consoles, those of several lines in one."""
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


@cache
def flags(job: str) -> set[str]:
    """All flags that ``--help`` of a job explains."""
    outcome = run_here(job, ["--help"])
    assert outcome.code == 0, job
    return set(re.findall(r"--[a-z][a-z-]*", outcome.out))


@pytest.mark.usefixtures("quiet_transformers")
def test_what_is_copied_from_the_readme_runs_in_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = section(README.read_text(), "First steps")
    prepare, *steps = blocks(shown, "python")
    there = [tmp_path / "python", tmp_path / "commands"]
    there[0].mkdir()
    monkeypatch.chdir(there[0])
    exec(compile(prepare, "prepare.py", "exec"), {})
    shutil.copytree(there[0], there[1])
    said: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for step in steps:
            exec(compile(step, "README.md", "exec"), said)
    assert "model.layers.1.mlp.down_proj" in out.getvalue()
    from pydoc_data.topics import topics

    *_, first, second, third = (line.split() for line in out.getvalue().splitlines())
    assert float(first[0]) >= float(second[0]) >= float(third[0]) and first[1] in topics
    monkeypatch.chdir(there[1])
    typed = [shlex.split(line) for line in commands(shown)]
    assert [line[:2] for line in typed] == [["raycurv", "fit"], ["raycurv", "influence"]]
    for _, job, *more in typed:
        outcome = run_here(job, more)
        assert json.loads(outcome.out)["status"] == "complete", outcome.err
    import pandas as pd

    ours, theirs = (pd.read_parquet(place / "scores" / "scores") for place in there)
    assert len(ours) > 50 and ours.equals(theirs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.stem)
def test_commands_of_pages_have_flags_that_there_are(page: Path) -> None:
    for command in commands(page.read_text()):
        found = _COMMAND.match(command)
        if found is not None:
            typed = command[found.end() :].split(" # ")[0]
            assert set(re.findall(r"(?<=\s)--[a-z][a-z-]*", typed)) <= flags(found[1]), command
    assert "--modell" not in flags("fit")


def test_every_page_is_one_click_from_the_readme_which_is_short() -> None:
    text = README.read_text()
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text)}
    assert [page.name for page in PAGES if page != README and page.resolve() not in linked] == []
    assert len(text.splitlines()) <= 150


@cache
def site() -> tuple[dict[str, Path], dict[str, str], set[str]]:
    """The site's files of the repository, its generated pages, and the pages that its menu names.

    MkDocs, which the tests do without, is asked to build it by `make docs` alone.
    """
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site/site_pages.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return made.repository_files(), made.generated_pages(), set(_leaves(yaml.safe_load(menu)))


def _leaves(menu: object) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    inner = menu.values() if isinstance(menu, dict) else menu
    return [leaf for one in inner for leaf in _leaves(one)]  # type: ignore[attr-defined]


def test_the_menu_of_the_site_has_every_page_of_it_and_no_other() -> None:
    files, made, menu = site()
    pages = {name for name in files if name.endswith(".md")} | made.keys()
    assert {str(page.relative_to(ROOT)) for page in PAGES} <= pages
    assert {name for name in pages if not name.startswith("benchmarks/results/")} == menu
    # A link to what is no page is to a file that the site has as well.
    assert {"constraints.txt", "docs/report.png", "docs/quickstart.ipynb"} <= files.keys()


def test_every_flag_stands_in_the_reference_with_its_help() -> None:
    _, made, _ = site()
    for name, job in JOBS.items():
        page = made[f"reference/{name}.md"]
        shown = re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)
        rows = [row for row in re.findall(r"^\| .*", page, re.MULTILINE) if row[:7] != "| flag "]
        assert set(shown) <= flags(name) and len(shown) == len(set(shown)), name
        assert len(rows) == len(dataclasses.fields(job.load_settings())) <= len(shown) + 1, name
        assert not re.search(r"\|\s*\|$", page, re.MULTILINE)  # a flag without a description


def test_every_public_name_stands_in_the_reference() -> None:
    _, made, _ = site()
    text = made["reference/python.md"] + made["reference/objectives.md"]
    named = re.findall(r"^::: raycurv\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted({*raycurv.__all__, "open_run"})


def test_the_page_of_the_notebook_has_its_cells_and_what_they_made() -> None:
    _, made, _ = site()
    page = made["docs/quickstart.md"]
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    assert all("".join(cell["source"]) in page for cell in cells)
    assert "](data:image/png;base64," in page and "<table" in page
