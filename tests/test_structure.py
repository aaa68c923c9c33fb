"""Claims about the code's own shape: who imports whom, and that one name stands for one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raycurv"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

# Who may import whom: a package imports those that stand before it, and itself.
ORDER = (
    "batch", "errors", "summary_html", "names", "named_objects", "jsonfile", "hub", "mathematics",
    "models", "data", "files", "stages", "links", "onray", "planning", "progress", "driver",
    "steps", "jobs", "planned", "pruned", "scored", "run", "evaluation", "reporting", "measured",
    "__main__",
)  # fmt: skip
# Mathematics and plans: functions of tensors and numbers, without files, clusters or libraries of
# models.
PURE = [
    name
    for name in FILES
    if name.startswith("mathematics.") or name in ("stages.dealing", "stages.schedule")
]
FOREIGN = {"pyarrow", "ray", "rich", "safetensors", "transformers", "tyro"}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; without ``everywhere``, only those at its top level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if module == "raycurv" else module for a in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def own(path: Path, everywhere: bool = True) -> set[str]:
    """The files of raycurv that a file imports."""
    names = {n.removeprefix("raycurv.") for n in imported(path, everywhere)}
    return names & FILES.keys()


@pytest.mark.parametrize("name", PURE)
def test_mathematics_knows_tensors_and_mathematics_alone(name: str) -> None:
    assert not packages(FILES[name]) & FOREIGN
    assert own(FILES[name]) <= {*PURE, "batch", "errors", "named_objects"}


@pytest.mark.parametrize("name", FILES)
def test_packages_import_only_those_before_them(name: str) -> None:
    place = ORDER.index(name.split(".")[0])
    assert {other.split(".")[0] for other in own(FILES[name])} <= set(ORDER[: place + 1])


def test_ray_is_imported_at_the_edge_alone() -> None:
    importers = {n for n, path in FILES.items() if "ray" in packages(path)}
    assert importers and all(name.startswith("onray.") for name in importers)


def test_only_what_starts_ray_imports_what_does() -> None:
    edge = {name for name in FILES if name.startswith("onray.")}
    importers = {name for name, path in FILES.items() if own(path) & edge} - edge
    assert importers == {"driver.workers"}


def test_nothing_imports_the_jobs_or_the_tests() -> None:
    for path in FILES.values():
        assert not packages(path) & {"jobs", "tests", "commands", "pytest"}


def test_kinds_of_weights_are_told_apart_in_their_own_files_alone() -> None:
    told = re.compile(r"conv[12]d|block\.kind\b|isinstance\([^)]*nn\.Linear", re.IGNORECASE)
    found = {name for name, path in FILES.items() if told.search(path.read_text())}
    kinds = {name for name in FILES if name.startswith("mathematics.kinds.")}
    assert found <= kinds
    assert {"mathematics.kinds.linear", "mathematics.kinds.convolution"} <= found


def test_jobs_import_raycurv_alone() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert {"fit.py", "influence.py", "prune.py"} <= {path.name for path in jobs}
    for path in jobs:
        assert packages(path) == {"raycurv"}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A ring of imports, or nothing."""
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            found = follow(other, (*trail, name))
            if found:
                return found
        done.add(name)
        return []

    for name in graph:
        found = follow(name, ())
        if found:
            return found
    return []


def test_imports_point_one_way() -> None:
    graph = {name: own(path) for name, path in FILES.items()}
    assert cycle(graph) == []
    assert cycle(graph | {"errors": {"run"}})[0] == "errors"


def test_no_two_files_share_a_name() -> None:
    names = [name.rpartition(".")[2] for name in FILES]
    assert {name for name in names if names.count(name) > 1} == set()


def test_what_answers_a_signal_while_libraries_load_is_none_of_them() -> None:
    # What a command imports before it listens: the package, the registry, and what they import.
    seen: set[str] = set()
    waiting = ["jobs.registry"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += own(FILES[name], everywhere=False) - seen
        outside = {n.split(".")[0] for n in imported(FILES[name], everywhere=False)} - {"raycurv"}
        assert outside <= sys.stdlib_module_names, name
    assert "jobs.last_line" in seen


def test_a_job_without_ray_or_a_language_model_waits_for_neither() -> None:
    code = (
        "import sys; import raycurv, raycurv.jobs.fit.fitting, raycurv.jobs.influence.scoring, "
        "raycurv.jobs.plan.estimating, raycurv.jobs.prune.pruning; "
        "print(sorted({'ray', 'transformers'} & sys.modules.keys()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"
