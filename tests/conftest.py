"""What the numerical tests share: one thread, and each case fitted once for all that ask."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Truth
from networks import Case, save_checkpoint
from xdist.scheduler import LoadScopeScheduling

import raycurv

torch.set_num_threads(1)

# Ray ends processes that have nothing to do when there are more of them than cores, here two. The
# next task then waits for another to load its libraries, which takes longer than most tests.
os.environ.setdefault("RAY_num_workers_soft_limit", "5")

# A cluster is many processes: files that start one take turns, in two lines, but for two that are
# left to the worker which has none to start until then.
CLUSTERS = (("kills", "preflight", "out_of_memory"), ("submitted", "stopping"))
# Of the others these begin first, or one of them would be under way alone at the end.
LONGEST = (
    "too_little", "prune_jobs", "resume", "prune", "combine", "object_store", "swept",
    "invariance", "links", "jobs", "mistakes", "ray", "watching",
)  # fmt: skip


# What `--fast` leaves out: whatever starts a Ray, a node or jobs in processes of their own; runs
# that are stopped at many points; plans and measurements; files of deployment.
SLOW = (
    *CLUSTERS[0], *CLUSTERS[1], "ray", "watching", "object_store", "links", "too_little", "jobs",
    "prune_jobs", "resume", "lock", "flat", "plan", "combine", "demo", "cluster_files", "footprint",
    "structure", "bench", "notebook",
)  # fmt: skip
SLOW_WORDS = ("stopped", "killed", "process_of_its_own")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out what is slow: Ray, jobs as processes of their own, runs stopped everywhere",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.stem.removeprefix("test_")
    return True if config.getoption("--fast") and name in SLOW else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first (``--no-loadscope-reorder`` keeps them there)."""
    order = (CLUSTERS[0][0], CLUSTERS[1][0], LONGEST[0], *CLUSTERS[0], *CLUSTERS[1], *LONGEST)
    places = {f"test_{name}.py": place for place, name in reversed(list(enumerate(order)))}
    items.sort(key=lambda item: places.get(item.path.name, len(order)))
    if config.getoption("--fast"):
        slow = [item for item in items if any(word in item.name for word in SLOW_WORDS)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


class Lines(LoadScopeScheduling):  # type: ignore[misc]
    """Deals files out to workers, each whole; those that start clusters go to one of two."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.split("::", 1)[0]
        for number, names in enumerate(CLUSTERS):
            if Path(name).stem.removeprefix("test_") in names:
                return f"clusters {number}"
        return name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lines:
    return Lines(config, log)


class Fits:
    """Runs, scores and dense truths by case and settings, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Any, Any] = {}
        self._numbers = count()

    def source(self, case: Case) -> Any:
        """What ``raycurv.fit`` takes as the model: a directory, or the callable."""
        if not case.checkpoint:
            return case.network
        folder = self._folder / f"model-{case.name.replace(' ', '-')}"
        return str(self.once(("model", case.name), lambda: save_checkpoint(case, folder)))

    def run(self, case: Case, **settings: Any) -> raycurv.Run:
        """The case's run with these settings on top of its own."""
        chosen = self._settings(case, settings)
        key = ("run", case.name, *sorted(chosen.items()))
        return self.once(
            key,
            lambda: raycurv.fit(
                self.source(case), list(case.data), self.place(), objective=case.objective,
                quiet=True, **chosen,
            ),
        )  # fmt: skip

    def scores(
        self, case: Case, fit: dict[str, Any] | None = None, **settings: Any
    ) -> raycurv.Scores:
        """Scores of the case's queries on its data, under the run that ``fit`` asks for."""
        chosen = {"address": "none", "rank": "full"} | settings
        key = ("scores", case.name, *sorted((fit or {}).items()), None, *sorted(chosen.items()))
        run = self.run(case, **(fit or {}))
        return self.once(
            key,
            lambda: run.influence(
                list(case.queries), list(case.data), self.place(), quiet=True, **chosen
            ),
        )

    def truth(self, case: Case) -> Truth:
        """The dense truth of the case, from plain autograd."""
        return self.once(("truth", case.name), lambda: Truth(case))

    def place(self) -> str:
        """A directory that nothing was written to yet."""
        return str(self._folder / f"out-{next(self._numbers)}")

    def _settings(self, case: Case, settings: dict[str, Any]) -> dict[str, Any]:
        folder = self.source(case) if case.adapters else ""
        own = {
            "adapter": tuple(f"{folder}/{adapter}" for adapter in case.adapters),
            "address": "none",
            "dtype": "float64",
            "fisher": "sampled",
            "keep_sums": True,
            "batch_tokens": case.batch_tokens,
        }
        return own | dict(case.settings) | settings

    def once(self, key: Any, make: Any) -> Any:
        """What is made for a key, when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


_imported = 0


@pytest.fixture(autouse=True)
def libraries_are_no_garbage() -> None:
    """What was imported is left out of all later collections of garbage.

    Whenever stages are given back every object is looked at: those of the libraries are so many
    that a tiny fit would do little else.
    """
    global _imported
    if len(sys.modules) != _imported:
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Files of the tests' own process need not outlive a loss of power: half of a tiny fit would be
    waiting. Jobs and actors in processes of their own do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of any width: the axes of tiny networks are no wider than the narrowest allowed."""
    monkeypatch.setattr("raycurv.jobs.fit.fit_settings.SMALLEST_TILE", 1)


@pytest.fixture(scope="session")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return Fits(tmp_path_factory.mktemp("fits"))


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
