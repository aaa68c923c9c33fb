"""The pages of the site that `make docs` builds: the repository's own, and the reference.

The site has no copies of its own: every file that the README leads to, over any number of links, is
in it at the file's path in the repository, so that a link is the same on both. What is written
anywhere else already is made from there: flags from the settings, the Python API from docstrings
(by mkdocstrings), the notebook's page from the notebook. MkDocs calls :func:`on_files`
and :func:`on_page_markdown`.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import tyro

import raycurv
from raycurv.driver.settings import Marked, declarations
from raycurv.jobs.registry import JOBS, Job

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(([^)\s#]+)")
_OBJECTIVES = "mathematics.loss."
# Of pages that a search finds, those that say it in full come earlier.
_FOUND_FIRST = "---\nsearch:\n  boost: 4\n---\n\n"


def on_files(files: Any, config: Any) -> Any:
    """Add all pages to the site; see MkDocs' event of this name."""
    from mkdocs.structure.files import File

    for uri, path in repository_files().items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for uri, text in generated_pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to the notebook lead to its page; see MkDocs' event of this name."""
    if page.file.src_uri == "docs/quickstart.md":
        return markdown
    return markdown.replace("quickstart.ipynb)", "quickstart.md)")


def repository_files() -> dict[str, Path]:
    """Every file that the README leads to, by its path from the root."""
    found: dict[str, Path] = {}
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        uri = path.relative_to(ROOT).as_posix()
        if uri in found or not path.is_file():
            continue
        found[uri] = path
        if path.suffix in (".md", ".ipynb"):
            links = [link for link in _LINK.findall(path.read_text()) if "://" not in link]
            waiting += [(path.parent / link).resolve() for link in links]
    return found


def generated_pages() -> dict[str, str]:
    """The Markdown of all pages that no file of the repository holds, by their paths."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    places = raycurv._PLACES
    objectives = [name for name, place in places.items() if place.startswith(_OBJECTIVES)]
    others = [name for name in reversed(places) if name not in objectives]
    return {
        "docs/quickstart.md": notebook_page(notebook),
        "reference/python.md": api_page(
            "Python", sorted(others, key=lambda n: (not n.islower(), n if n.islower() else "")),
            "`raycurv.open` is `open_run`. Settings are called as flags, whose pages explain them.",
        ),
        "reference/objectives.md": api_page(
            "Objectives", sorted(objectives, key=lambda name: name != "Objective"),
            "What `--objective` names and `objective=` takes: those below, or one of your own.",
        ),
        **{f"reference/{name}.md": flags_page(job) for name, job in JOBS.items()},
    }  # fmt: skip


def api_page(title: str, names: list[str], text: str) -> str:
    """A page of public names, which mkdocstrings fills with their signatures and docstrings."""
    parts = [f"# {title}", text]
    for name in names:
        parts.append(f"::: raycurv.{name}")
        if name.endswith("Settings"):
            parts[-1] += "\n    options:\n      members: false"
    return _FOUND_FIRST + "\n\n".join(parts) + "\n"


def flags_page(job: Job) -> str:
    """The flags of a job as its command line has them: its own, then those that jobs share."""
    settings = job.load_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(settings, config=(tyro.conf.FlagCreatePairsOff,))
    actions = {action.dest.replace("-", "_"): action for action in parser._actions}
    required = {n for n, _, marks in declarations(settings) if Marked("required") in marks}
    defaults = {field.name: field.default for field in fields(settings)}
    lines = [f"# raycurv {job.name}", f"{job.help[0].upper()}{job.help[1:]}."]
    for owner in settings.__mro__:
        own = [name for name in defaults if name in vars(owner).get("__annotations__", {})]
        shown = [name for name in own if name in actions]
        if not shown:
            continue
        if owner is not settings:
            said = (owner.__doc__ or owner.__name__).strip().splitlines()[0]
            lines.append(f"## {said.partition(';')[0].rstrip('.')}")
        rows = ["| flag | value | default | what it says |", "|---|---|---|---|"]
        for name in shown:
            # A field that a subclass declares anew is in the first table.
            action, default = actions.pop(name), defaults.pop(name)
            flag = " ".join(action.option_strings) or "(without a flag)"
            values = "" if action.nargs == 0 else str(action.metavar).replace("{None}|", "")
            values = values.replace("None,", "")
            needed = "required" if name in required else ""
            plain = default in (None, "", (), MISSING) or isinstance(default, bool)
            cells = [
                f"`{flag}`" if action.option_strings else flag,
                f"`{values}`" if values else "",
                needed if plain else f"`{default}`",
                re.sub(r" \((default: .*|repeatable)\)$", "", str(action.help)).replace("%%", "%"),
            ]
            rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("\n".join(rows))
    return _FOUND_FIRST + "\n\n".join(lines) + "\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown, with the outputs that it holds."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = "".join(data["image/png"]).strip()
                parts.append(f"![](data:image/png;base64,{picture})".replace("\n", ""))
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n\nThis page is [a notebook](quickstart.ipynb).\n"


def _cell(text: str) -> str:
    """A text within one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
