"""Claims about sweeping: few stages in memory, the rest on disk, and the numbers never know it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import classifier, flags_of, run_here, write_rows
from results import assert_close, assert_same
from stops import stopped, stopped_everywhere
from test_resume import (
    FIT,
    INFLUENCE,
    QUERIES,
    ROWS,
    commits,
    delete,
    empty,
    flip,
    kill_when,
    truncate,
)

import raycurv
from raycurv.files.spool import KINDS, LostSpool, Spool, spool_store
from raycurv.files.store import Store
from raycurv.jobs.inputs import Inputs
from raycurv.stages.dealing import group_stages
from raycurv.stages.stage import Stage

torch.set_num_threads(1)

SWEPT: dict[str, Any] = {"schedule": "swept", "stages": 3}


def fit(out: Path, **settings: Any) -> raycurv.Run:
    return raycurv.fit(classifier, ROWS, out, **(FIT | SWEPT | settings))


def score(fitted: raycurv.Run, out: Path, **settings: Any) -> raycurv.Scores:
    return fitted.influence(QUERIES, ROWS, out, **(INFLUENCE | SWEPT | settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A swept fit and swept scores that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    score(fit(folder / "run"), folder / "scores")
    return folder / "run", folder / "scores"


# The same numbers


@pytest.mark.parametrize("homes", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "kfac"},
        {"method": "diagonal", "draws": 2},
        {"method": "identity"},
        {"fisher": "empirical", "max_factor_dim": 4},
    ],
    ids=str,
)
def test_sweeping_changes_no_number(
    settings: dict[str, Any], homes: int, tmp_path: Path, narrow_tiles: None
) -> None:
    mine = fit(tmp_path / "swept", homes=homes, **settings)
    plain = {"schedule": "pipelined", "stages": 1}
    theirs = fit(tmp_path / "whole", **settings, **plain)
    assert_close(tmp_path / "swept", tmp_path / "whole")
    score(mine, tmp_path / "a", homes=homes)
    score(theirs, tmp_path / "b", **plain)
    assert_close(tmp_path / "a", tmp_path / "b")


def test_two_groups_of_stages_are_not_one(whole: tuple[Path, Path], tmp_path: Path) -> None:
    # The control of the above: what the comparison looks at does differ between runs.
    fit(tmp_path / "other", seed=1)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "other", whole[0])


@pytest.mark.parametrize(
    ("stages", "homes", "sizes"),
    [(5, 1, [1] * 5), (5, 2, [2, 2, 1]), (7, 3, [3, 2, 2]), (4, 9, [4]), (1, 1, [1])],
)
def test_groups_are_as_few_as_homes_allow_and_alike(
    stages: int, homes: int, sizes: list[int]
) -> None:
    groups = group_stages(stages, homes)
    assert [len(g) for g in groups] == sizes
    assert [s for g in groups for s in g] == list(range(stages))


# What a sweep costs


def test_every_weight_is_read_twice_and_the_last_stages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[int] = Counter()
    make = Stage.__init__

    def count(self: Stage, spec: Any) -> None:
        built[spec.index] += 1
        make(self, spec)

    monkeypatch.setattr(Stage, "__init__", count)
    run = fit(tmp_path / "run")
    assert built == {0: 2, 1: 2, 2: 1}
    built.clear()
    score(run, tmp_path / "scores", query_memory="1GiB")
    assert built == {0: 2, 1: 2, 2: 1}


def test_the_spool_holds_what_a_stage_still_needs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[tuple[int, int]] = []
    write = Spool.write

    def look(self: Spool, *args: Any) -> None:
        write(self, *args)
        place = Path(self.directory) / args[0]
        counts = [len(list((place / kind).glob("*/*.safetensors"))) for kind in KINDS]
        alive.append((counts[0], len(list((place / "gradient").glob("*")))))

    monkeypatch.setattr(Spool, "write", look)
    fit(tmp_path / "run", stages=5, batch_tokens=6)
    microbatches = 4
    assert max(hidden for hidden, _ in alive) == 4 * microbatches  # in front of all but the first
    assert max(boundaries for _, boundaries in alive) == 2
    assert alive[-1][0] <= 2 * microbatches
    assert not (tmp_path / "run" / "work").exists()


def test_a_spool_of_its_own_disk_is_emptied_at_the_end(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    run = fit(tmp_path / "run", spool_dir=str(disk))
    score(run, tmp_path / "scores", spool_dir=str(disk))
    assert not list(disk.glob("*"))
    assert_same(tmp_path / "run", whole[0])
    assert_same(tmp_path / "scores", whole[1])
    # Two runs may share it.
    assert stopped("a backward", 3, False, lambda: fit(tmp_path / "one", spool_dir=str(disk)))
    assert stopped("a backward", 3, False, lambda: fit(tmp_path / "two", spool_dir=str(disk)))
    assert len(list(disk.glob("raycurv-*"))) == 2


def test_spools_are_local() -> None:
    bucket = Store("s3://bucket/run?endpoint_override=localhost:9")
    with pytest.raises(
        raycurv.UserError, match=r"--spool-dir: expected a local directory.*nothing"
    ):
        spool_store(bucket, None)
    with pytest.raises(raycurv.UserError, match="Spools are never remote"):
        spool_store(bucket, "s3://bucket/spool?endpoint_override=localhost:9")
    assert spool_store(bucket, "/disk").root.startswith("/disk/raycurv-")


# Stopping and going on


@pytest.mark.parametrize(
    ("point", "after", "commit_seconds", "step"),
    [
        ("a write", False, 1e-9, 3),
        ("a write", True, None, 2),
        ("a deletion of a directory", False, None, 1),
        ("a forward", False, None, 3),
        ("a backward", True, 1e-9, 2),
        ("a decomposition", True, None, 1),
    ],
)
def test_a_sweep_that_stopped_everywhere_ends_as_if_it_had_not(
    point: str,
    after: bool,
    commit_seconds: float | None,
    step: int,
    whole: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    def job(out: Path) -> None:
        fit(out, commit_seconds=commit_seconds)

    assert stopped_everywhere(point, after, job, tmp_path / "run", step) >= 3
    assert_same(tmp_path / "run", whole[0])


@pytest.mark.parametrize(("point", "after"), [("a write", False), ("a backward", False)])
def test_swept_scores_that_stopped_everywhere_end_as_if_they_had_not(
    point: str, after: bool, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    run = raycurv.open(whole[0])
    run._inputs = Inputs(model=classifier)
    out = tmp_path / "scores"
    assert stopped_everywhere(point, after, lambda out: score(run, out), out, 2) >= 3
    assert_same(out, whole[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 2},
        {"homes": 2},
        {"schedule": "pipelined", "stages": 2},
        {"batch_tokens": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(("point", "at"), [("a forward", 9), ("a backward", 9), ("a backward", 16)])
def test_a_sweep_may_go_on_with_other_stages(
    point: str, at: int, changes: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert stopped(point, at, False, lambda: fit(out, commit_seconds=1e-9))
    fit(out, **changes)
    assert_close(out, whole[0])


@pytest.mark.parametrize("job", ["fit", "scores"])
def test_a_finished_operation_is_not_done_again(
    job: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Stopped at every 23rd write and gone on from there: a backward a stop is lost at most."""
    done: list[int] = []
    backward = Stage.backward
    fitted = raycurv.open(whole[0])
    fitted._inputs = Inputs(model=classifier)

    def count(self: Stage, index: int, *args: Any) -> Any:
        result = backward(self, index, *args)
        done.append(index)
        return result

    def again(out: Path) -> None:
        if job == "fit":
            fit(out, commit_seconds=1e-9)
        else:
            score(fitted, out, commit_seconds=1e-9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "backward", count)
        again(tmp_path / "once")
        once = len(done)
        done.clear()
        stops = 0
        while stopped("a write", 23, True, lambda: again(tmp_path / "run")):
            stops += 1
    assert stops >= 5
    assert once <= len(done) <= once + stops
    assert_same(tmp_path / "run", tmp_path / "once")


FLAGS: dict[str, Any] = FIT | SWEPT | {"model": "commands:classifier", "commit_seconds": 1e-9}
MOMENTS: dict[str, Callable[[Path], int]] = {
    "on the way forward": lambda out: len(spooled(out)["hidden"]) - 3,
    "in a second pass": lambda out: commits(out, "corrected/group-0001"),
}


def test_a_sweep_that_was_killed_again_and_again_ends_as_if_it_had_not_been(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data = write_rows(tmp_path / "rows.parquet", ROWS)
    settings = {k: v for k, v in FLAGS.items() if k != "quiet"}
    flags = flags_of(settings | {"out": out, "data": data})
    for moment in MOMENTS.values():
        kill_when("fit.py", flags, lambda moment=moment: moment(out) > 0)
    assert run_here("fit.py", flags).code == 0
    assert_same(out, whole[0])


# What the spool loses


def spooled(folder: Path) -> dict[str, list[Path]]:
    """Spool files by kind."""
    place = folder / "work" / "spool"
    return {kind: sorted(place.glob(f"*/{kind}/*/*.safetensors")) for kind in KINDS}


DAMAGE = (flip, truncate, delete, empty)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_spool_loses_is_made_again(
    kind: str, whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = 0
    for at in (9, 21, 33):
        out = tmp_path / str(at)
        assert stopped("a backward", at, False, lambda out=out: fit(out, commit_seconds=1e-9))
        files = spooled(out)[kind]
        damaged += len(files)
        for number, path in enumerate(files):
            DAMAGE[number % len(DAMAGE)](path)
        fit(out, quiet=False)
        assert_same(out, whole[0])
    assert damaged > 5
    assert "making it again" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_spool_loses_of_scores_is_made_again(
    kind: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    run = raycurv.open(whole[0])
    run._inputs = Inputs(model=classifier)
    damaged = 0
    for at in (9, 17):
        out = tmp_path / str(at)
        assert stopped("a backward", at, False, lambda out=out: score(run, out))
        files = spooled(out)[kind]
        damaged += len(files)
        for number, path in enumerate(files):
            DAMAGE[number % len(DAMAGE)](path)
        score(run, out)
        assert_same(out, whole[1])
    assert damaged > 5


def test_a_damaged_spool_file_is_never_read_as_if_it_were_whole(tmp_path: Path) -> None:
    spool = Spool(Store(str(tmp_path / "spool")), "mark", 3)
    tensors = {"hidden": torch.arange(12.0)}
    spool.write("examples", "hidden", 1, 0, tensors)
    (path,) = spooled_in(tmp_path / "spool")
    good = path.read_bytes()
    for at in range(0, len(good), 5):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            found = spool.read("examples", "hidden", 1, 0)
            assert good[at : at + 1] == b" "  # what pads the header says nothing
            assert torch.equal(found["hidden"], tensors["hidden"])
        except LostSpool as lost:
            assert (lost.kind, lost.boundary, lost.microbatch) == ("hidden", 1, 0)
            assert not path.exists()
    path.write_bytes(good)
    assert torch.equal(spool.read("examples", "hidden", 1, 0)["hidden"], tensors["hidden"])
    # Another run's spool in the same place is not believed.
    assert Spool(Store(str(tmp_path / "spool")), "mark", 3).has("examples", "hidden", 1, 0)
    assert not Spool(Store(str(tmp_path / "spool")), "other", 3).has("examples", "hidden", 1, 0)


def spooled_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))
