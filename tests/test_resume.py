"""Claims about stopping and going on: nothing finished is lost or redone, no damage goes unseen.

What must be equal is equal bit for bit: same process, one thread, float64.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from commands import (
    EXACT_FIT,
    EXACT_INFLUENCE,
    classified,
    classifier,
    flags_of,
    run_here,
    snapshot,
    start,
    write_rows,
)  # fmt: skip
from results import assert_close, assert_same, changed, tensors
from safetensors.torch import load_file
from stops import stopped, stopped_everywhere

import raycurv
from raycurv import DamagedFile, RaycurvError
from raycurv.files.artifacts import read_eigen
from raycurv.files.store import Store
from raycurv.files.tables import read_rows, read_table
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.stages.stage import Stage

torch.set_num_threads(1)

ROWS = classified(23)
QUERIES = ROWS[:5]
FIT = EXACT_FIT
INFLUENCE = EXACT_INFLUENCE | {"query_memory": 2500}  # two queries a pass


def fit(out: Path, **settings: Any) -> raycurv.Run:
    return raycurv.fit(classifier, ROWS, out, **(FIT | settings))


def score(fitted: raycurv.Run, out: Path, **settings: Any) -> raycurv.Scores:
    return fitted.influence(QUERIES, ROWS, out, **(INFLUENCE | settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[raycurv.Run, raycurv.Scores]:
    """A fit and scores that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fitted = fit(folder / "run")
    return fitted, score(fitted, folder / "scores")


@pytest.fixture
def run(whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path) -> Path:
    """A copy of that fit, to be damaged."""
    return Path(shutil.copytree(whole[0].path, tmp_path / "run"))


@pytest.fixture
def scores(whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path) -> Path:
    """A copy of those scores, to be damaged."""
    return Path(shutil.copytree(whole[1].path, tmp_path / "scores"))


@pytest.fixture(scope="module")
def in_two(whole: tuple[raycurv.Run, raycurv.Scores], tmp_path_factory: Any) -> Path:
    """A fit in two stages that nothing disturbed."""
    out: Path = tmp_path_factory.mktemp("two") / "run"
    fit(out, stages=2)
    assert_close(out, Path(whole[0].path))
    return out


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, where: float = 0.5) -> None:
    """One bit of a byte in the middle, or at that share of the file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


# A file, and the only files that a rerun may write when its length gives the damage away.
REMADE = {
    "eigen/0.input.safetensors": {"tables/blocks", "tables/spectrum"},
    "eigen/2.output.safetensors": {"tables/blocks", "tables/spectrum"},
    "corrected/2.safetensors": {"tables"},
    "labels/part-00000.parquet": {"tables/blocks", "tables/spectrum"},
    "data/part-00000.parquet": {"data"},
    "data/index.parquet": {"data"},
    "data/corpus.json": {"data"},
    "blocks.json": {"tables/blocks", "tables/spectrum"},
    "tables/blocks/part-00000.parquet": {"tables/spectrum"},
    "tables/spectrum/part-00000.parquet": {"tables/blocks"},
    "tables/examples/part-00000.parquet": {"tables/blocks", "tables/spectrum"},
}


@pytest.mark.parametrize("damage", [truncate, empty, delete])
@pytest.mark.parametrize("name", REMADE)
def test_a_rerun_remakes_the_file_that_is_damaged_and_no_other(
    name: str,
    damage: Callable[[Path], None],
    whole: tuple[raycurv.Run, raycurv.Scores],
    run: Path,
) -> None:
    out = run
    damage(out / name)
    before = snapshot(out)
    if name.endswith(".json") and damage is not delete:
        with pytest.raises(DamagedFile, match="Delete it and run the command again") as caught:
            fit(out)
        assert caught.value.where.endswith(name)
        assert not changed(before, out)
        delete(out / name)
    fit(out)
    written = changed(before, out)
    assert name in written
    allowed = tuple(REMADE[name])
    assert {n for n in written if n != name and not n.startswith(allowed)} == set()
    assert_same(out, Path(whole[0].path))


def test_a_damaged_run_json_is_named_and_never_guessed(run: Path) -> None:
    out = run
    truncate(out / "run.json")
    before = snapshot(out)
    with pytest.raises(DamagedFile, match="Restore it, or give another directory") as caught:
        fit(out)
    assert caught.value.where.endswith("run.json")
    (out / "run.json").unlink()
    with pytest.raises(raycurv.UserError, match=r"no run\.json"):
        fit(out)
    assert snapshot(out).items() <= before.items()


def test_blocks_of_another_shape_are_not_believed(run: Path) -> None:
    out = run
    text = (out / "blocks.json").read_text()
    for wrong in (
        text.replace('"d_out": 6', '"d_out": 7'),
        text.replace('"2.input"', '"3.input"'),
        text.replace('"kind"', '"kinb"'),
    ):
        assert wrong != text
        (out / "blocks.json").write_text(wrong)
        with pytest.raises(DamagedFile, match=r"blocks\.json"):
            fit(out)
    (out / "blocks.json").write_text(text)
    fit(out)


# What reads a file whose content is damaged: the file, and another that then has to be made again.
READERS = {
    "labels/part-00000.parquet": "corrected/0.safetensors",
    "data/part-00000.parquet": "corrected/0.safetensors",
    "eigen/2.input.safetensors": "corrected/2.safetensors",
    "eigen/2.output.safetensors": "tables/spectrum/part-00000.parquet",
}


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_found_when_the_file_is_read(
    name: str, whole: tuple[raycurv.Run, raycurv.Scores], run: Path
) -> None:
    out = run
    original = (out / name).read_bytes()
    delete(out / READERS[name])
    # Behind the header, which would give the damage away at once.
    flip(out / name, {"eigen": 0.95, "label": 0.05}.get(name[:5], 0.5))
    assert (out / name).read_bytes() != original
    with pytest.raises(DamagedFile, match="Delete the file and run the command again") as caught:
        fit(out)
    assert caught.value.where.endswith(name)
    delete(out / name)
    fit(out)
    assert_same(out, Path(whole[0].path))


@pytest.mark.parametrize("name", ["blocks", "spectrum", "examples"])
def test_a_flipped_bit_in_a_table_is_found_when_it_is_read(name: str, run: Path) -> None:
    fitted = raycurv.open(run)
    (path,) = (run / "tables" / name).iterdir()
    flip(path, 0.1)
    with pytest.raises(DamagedFile, match="Delete the file and run the command again"):
        getattr(fitted, name)()
    delete(path)
    table = getattr(fit(run), name)()
    assert table.num_rows > 0


def test_no_flipped_bit_of_a_table_goes_unseen(
    whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    # A table says which file of its directory it is.
    name = "part-00000.parquet"
    good = (Path(whole[0].path) / "tables" / "blocks" / name).read_bytes()
    path = tmp_path / name
    store = Store(str(tmp_path))
    for at in range(0, len(good), 13):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(DamagedFile):
            read_table(store, name)
    for length in range(0, len(good), 61):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFile):
            read_table(store, name)
        with pytest.raises(DamagedFile):
            read_rows(store, name)
    path.write_bytes(good)
    assert read_table(store, name).num_rows == read_rows(store, name) == 3


def test_no_flipped_bit_of_an_artefact_goes_unseen(
    whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    good = (Path(whole[0].path) / "eigen" / "2.input.safetensors").read_bytes()
    path = tmp_path / "eigen" / "2.input.safetensors"
    path.parent.mkdir()
    store = Store(str(tmp_path))
    unseen = []
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            read_eigen(store, "2.input")
            unseen.append(at)
        except DamagedFile as error:
            assert error.where.endswith("2.input.safetensors")
    # Only what pads the header with blanks says nothing.
    assert all(good[at : at + 1] == b" " for at in unseen)
    path.write_bytes(good)
    read_eigen(store, "2.input")


def test_artefacts_hold_tensors_of_every_kind_as_safetensors_does(tmp_path: Path) -> None:
    held = {
        f"{dtype} {name}": shape(torch.arange(12).reshape(3, 4).to(dtype))
        for dtype in (
            torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
            torch.uint8, torch.bool,
        )
        for name, shape in {
            "plain": lambda t: t,
            "turned": lambda t: t.T,
            "one": lambda t: t[0, 0],
            "empty": lambda t: t[:0],
        }.items()
    }  # fmt: skip
    write_tensors(Store(str(tmp_path)), "all.safetensors", held, {"note": "Λ"})
    file = open_tensors(Store(str(tmp_path)), "all.safetensors")
    for found in (file.read_all(), load_file(tmp_path / "all.safetensors")):
        assert found.keys() == held.keys()
        for name, tensor in held.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert file.metadata == {"note": "Λ"}


SCORE_FILES = ["scores", "self", "ihvp"]


@pytest.mark.parametrize("damage", [truncate, delete])
@pytest.mark.parametrize("kind", SCORE_FILES)
def test_a_rerun_makes_damaged_scores_again(
    kind: str,
    damage: Callable[[Path], None],
    whole: tuple[raycurv.Run, raycurv.Scores],
    scores: Path,
) -> None:
    out = scores
    files = sorted((out / kind).iterdir())
    damage(files[-1])
    before = snapshot(out)
    score(whole[0], out)
    written = changed(before, out)
    assert f"{kind}/{files[-1].name}" in written
    # A pass makes its files together; those of other passes stay.
    stay = {n for n in before if n.startswith("scores/part-000000") and kind != "self"}
    assert not written & stay and (stay or kind == "self")
    assert_same(out, Path(whole[1].path))


def test_a_flipped_bit_in_scores_is_found_when_they_are_read_and_a_rerun_mends_it(
    whole: tuple[raycurv.Run, raycurv.Scores], scores: Path
) -> None:
    path = sorted((scores / "scores").iterdir())[1]
    flip(path, 0.1)
    with pytest.raises(DamagedFile, match="Delete the file and run the command again") as caught:
        raycurv.open_scores(scores).table()
    assert caught.value.where.endswith(path.name)
    delete(path)
    score(whole[0], scores)
    assert_same(scores, Path(whole[1].path))


# A rerun of what is finished


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "identity"])
def test_a_rerun_of_what_is_finished_does_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit(tmp_path / "run", method=method)
    score(fitted, tmp_path / "scores")
    before = snapshot(tmp_path / "run"), snapshot(tmp_path / "scores")

    def refuse(*args: Any) -> None:
        raise AssertionError("a stage was built")

    monkeypatch.setattr(Stage, "__init__", refuse)
    score(fit(tmp_path / "run", method=method), tmp_path / "scores")
    assert not changed(before[0], tmp_path / "run")
    assert not changed(before[1], tmp_path / "scores")
    with pytest.raises(AssertionError, match="a stage was built"):
        fit(tmp_path / "other", method=method)


def test_seconds_of_phases_are_kept_over_a_rerun(run: Path) -> None:
    def seconds() -> dict[str, float]:
        said: dict[str, float] = json.loads((run / "run.json").read_text())["seconds"]
        return said

    first = seconds()
    fit(run)
    assert first.keys() == seconds().keys() and all(seconds()[k] >= first[k] for k in first)


# A stop at every point


STOPS = [
    ("a write", False, 1e-9),
    ("a write", True, 1e-9),
    ("a write", False, 300.0),
    ("a deletion", False, 1e-9),
    ("a deletion of a directory", True, 300.0),
    ("a backward", False, 300.0),
    ("a backward", True, 1e-9),
    ("a stage's commit", True, 1e-9),
    ("a decomposition", False, 300.0),
    ("a decomposition", True, 300.0),
]


@pytest.mark.parametrize(("point", "after", "commit_seconds"), STOPS)
def test_a_fit_that_stopped_everywhere_ends_as_if_it_had_not(
    point: str,
    after: bool,
    commit_seconds: float,
    in_two: Path,
    tmp_path: Path,
) -> None:
    def job(out: Path) -> None:
        fit(out, stages=2, commit_seconds=commit_seconds)

    assert stopped_everywhere(point, after, job, tmp_path / "run") >= 3
    assert_same(tmp_path / "run", in_two)


TOP = {"top_k": 2}
CANDIDATES = {
    "candidates": [
        {"query_id": query["id"], "train_id": ROWS[(5 * q + k) % len(ROWS)]["id"]}
        for q, query in enumerate(QUERIES)
        for k in (0, 3, 9, 14)
    ],
    "candidates_check": 2,
}
SOLVER = {"solver": "cg", "steps": 2, "self_influence": False, "query_memory": 20_000}


CERTIFIED = {"certify": 2, "certify_steps": 2, "query_memory": 20_000}


@pytest.mark.parametrize(
    ("how", "point", "after", "commit_seconds"),
    [
        ({}, "a write", False, 1e-9),
        ({}, "a write", True, 300.0),
        ({}, "a deletion", True, 1e-9),
        ({}, "a deletion of a directory", False, 300.0),
        ({}, "a backward", False, 300.0),
        (TOP, "a write", False, 1e-9),
        (TOP, "a write", False, 300.0),
        (CANDIDATES, "a write", False, 1e-9),
        (CANDIDATES, "a deletion of a directory", False, 300.0),
        (SOLVER, "a write", False, 1e-9),
        (SOLVER, "a deletion of a directory", True, 300.0),
        (CERTIFIED, "a write", False, 1e-9),
    ],
)
def test_scores_that_stopped_everywhere_end_as_if_they_had_not(
    how: dict[str, Any],
    point: str,
    after: bool,
    commit_seconds: float,
    whole: tuple[raycurv.Run, raycurv.Scores],
    tmp_path: Path,
) -> None:
    def job(out: Path) -> None:
        score(whole[0], out, commit_seconds=commit_seconds, **how)

    job(tmp_path / "reference")
    assert stopped_everywhere(point, after, job, tmp_path / "scores") >= 2
    assert_same(tmp_path / "scores", tmp_path / "reference")


@pytest.mark.parametrize("at", [2, 5, 8, 12])
def test_stages_and_batches_may_change_between_a_stop_and_a_rerun(
    at: int, whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert stopped("a backward", at, False, lambda: fit(out, commit_seconds=1e-9))
    fit(out, stages=3, batch_tokens=4, commit_seconds=1e-9)
    assert_close(out, Path(whole[0].path))
    out = tmp_path / "again"
    assert stopped("a backward", at, False, lambda: fit(out, commit_seconds=1e-9, stages=2))
    fit(out, stages=1, batch_tokens=7)
    assert_close(out, Path(whole[0].path))


@pytest.mark.parametrize("at", [1, 4, 9, 18])
@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 3},
        {"batch_tokens": 9},
        {"query_memory": 4000},
        {"query_memory": "1GiB", "batch_tokens": 3},
        {"query_memory": 1},
    ],
    ids=str,
)
def test_stages_batches_and_memory_may_change_while_scoring(
    at: int,
    changes: dict[str, Any],
    whole: tuple[raycurv.Run, raycurv.Scores],
    tmp_path: Path,
) -> None:
    out = tmp_path / "scores"
    assert stopped("a backward", at, False, lambda: score(whole[0], out, commit_seconds=1e-9))
    score(whole[0], out, **changes)
    assert_close(out, Path(whole[1].path))


@pytest.mark.parametrize(("rank", "files"), [("full", False), (1, True)])
def test_whole_products_stay_in_memory_and_are_made_again(
    rank: str | int, files: bool, whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    def job(out: Path, **more: Any) -> raycurv.Scores:
        return score(whole[0], out, ihvp=False, rank=rank, commit_seconds=1e-9, **more)

    scores, *ids = job(tmp_path / "undisturbed").matrix()
    want, *known = whole[1].matrix()
    # In memory or through a file, the numbers are the same; those of rank 1 are others.
    assert ids == known and (abs(scores - want).max() <= 1e-12 * abs(want).max()) != files
    # The queries' backward, and then those of examples that are scored on them.
    for at in (1, 4, 7):
        out = tmp_path / f"{at}"
        assert stopped("a backward", at, True, lambda out=out: job(out))
        made = list(out.glob("work/pass-*/ihvp/*.safetensors"))
        assert bool(made) == (files and at > 1)
        job(out, schedule="swept", stages=2)
        assert_close(out, tmp_path / "undisturbed")


def test_a_second_loss_while_the_first_is_mended_is_mended_too(
    whole: tuple[raycurv.Run, raycurv.Scores], run: Path
) -> None:
    out = run
    delete(out / "eigen" / "0.input.safetensors")
    assert stopped("a backward", 4, False, lambda: fit(out, commit_seconds=1e-9))
    assert commits(out, "covariance") == 3
    delete(out / "eigen" / "2.output.safetensors")
    assert stopped("a backward", 2, False, lambda: fit(out, commit_seconds=1e-9))
    delete(out / "corrected" / "4.safetensors")
    fit(out)
    assert_same(out, Path(whole[0].path))


def test_a_run_that_is_being_mended_is_not_finished(
    whole: tuple[raycurv.Run, raycurv.Scores], run: Path
) -> None:
    out = run
    delete(out / "corrected" / "4.safetensors")
    assert stopped("a backward", 2, False, lambda: fit(out))
    with pytest.raises(raycurv.UserError, match="a finished fit"):
        raycurv.open(out)
    fit(out)
    assert raycurv.open(out).blocks().num_rows == 3


def test_eigenvalues_of_other_bases_are_fitted_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(out)
    right = tensors(out)
    # The same factor's basis of a run on other data: whole, but not this run's.
    other = tmp_path / "other"
    raycurv.fit(classifier, classified(9, seed=5), other, **FIT)
    name = "eigen/2.input.safetensors"
    (out / name).write_bytes((other / name).read_bytes())
    with pytest.raises(DamagedFile, match="other bases"):
        raycurv.open(out).curvature("2")
    fit(out)
    found = tensors(out)
    assert not torch.equal(
        found["corrected/2.safetensors/lam"], right["corrected/2.safetensors/lam"]
    )
    # Any orthonormal basis is valid: the trace stays.
    torch.testing.assert_close(
        found["corrected/2.safetensors/lam"].sum(), right["corrected/2.safetensors/lam"].sum()
    )
    raycurv.open(out).curvature("2")


# kill -9


def kill_when(job: str, flags: Sequence[str], ready: Callable[[], bool]) -> None:
    """Start a job, and kill it as soon as the moment has come."""
    # Not a pipe: processes of Ray's that outlive the job for a while would hold it open.
    with tempfile.TemporaryFile("w+") as errors:
        _kill_when(start(job, flags, errors), errors, ready)


def _kill_when(process: Any, errors: IO[str], ready: Callable[[], bool]) -> None:
    try:
        until = time.monotonic() + 90
        while not ready():
            assert process.poll() is None, errors.seek(0) or errors.read()
            assert time.monotonic() < until, "the moment did not come"
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def commits(out: Path, name: str) -> int:
    """Microbatches done, as a pass's last commit says."""
    try:
        return int(json.loads((out / "work" / name / "commit.json").read_bytes())["done"])
    except FileNotFoundError:
        return 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "in the first pass": lambda out: commits(out, "covariance") >= 3,
    "in the second pass": lambda out: commits(out, "corrected") >= 3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a fit of 60 rows, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("killed")
    write_rows(folder / "rows.parquet", classified(60))
    settings = {
        "model": "commands:classifier",
        "data": folder / "rows.parquet",
        "objective": "classification",
        "dtype": "float64",
        "batch_tokens": 2,
        "stages": 2,
        "commit_seconds": 1e-9,
    }
    whole = settings | {"out": folder / "whole", "address": "none"}
    assert run_here("fit.py", flags_of(whole)).code == 0
    return {"settings": settings, "whole": folder / "whole"}


def test_a_process_that_was_killed_again_and_again_ends_as_if_it_had_not_been(
    files: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = flags_of(files["settings"] | {"out": out, "address": "none"})
    for moment in MOMENTS.values():
        kill_when("fit.py", flags, lambda moment=moment: moment(out))
        assert not (out / "tables" / "blocks").exists()
    assert run_here("fit.py", flags).code == 0
    assert_same(out, files["whole"])


def test_only_mistakes_of_raycurvs_own_are_shown_without_a_traceback() -> None:
    assert issubclass(DamagedFile, RaycurvError) and not issubclass(DamagedFile, raycurv.UserError)
