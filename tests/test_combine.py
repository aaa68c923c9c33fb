"""Claims about runs made of runs: extended by new data, merged, one subtracted from another.

Labels are drawn by example id, so runs of parts of the data have the labels of a run of it all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import (
    classified,
    classifier,
    failure_in,
    flags_of,
    rewritten,
    run_here,
    write_rows,
)
from dense import worst
from networks import LLAMA, MLP, REGRESSION, Case, arrays
from results import assert_same
from safetensors.torch import load_file
from stops import Stop, kind_of, stopped_everywhere
from test_corrected import EXACT, bases

import raycurv
from raycurv import UserError
from raycurv.files.store import Store

torch.set_num_threads(1)

# Sums of the same float64 numbers in another order.
SUMS = 1e-12
# What is solved with them; a difference of sums has the rounding of the larger one.
SCORES = 1e-9

TWO_DRAWS = Case("mlp, two draws", MLP.network, MLP.data, "classification", {"draws": 2})
EMPIRICAL = replace(MLP, name="mlp, empirical", settings={"fisher": "empirical"})
CASES = (MLP, TWO_DRAWS, EMPIRICAL, REGRESSION, LLAMA)
# K-FAC adds the same sums; what is without a second pass is not a matter of the case.
COMBINED = [*((case, "ekfac") for case in CASES), (MLP, "kfac")]


def part(case: Case, name: str, rows: slice) -> Case:
    """The case on a part of its data."""
    return replace(case, name=f"{case.name}, {name}", data=case.data[rows])


def halves(case: Case) -> tuple[Case, Case]:
    return part(case, "first", slice(0, 4)), part(case, "rest", slice(4, None))


def factors(run: raycurv.Run) -> dict[str, torch.Tensor]:
    """Every tensor below factors/."""
    return {
        f"{path.stem} {key}": tensor
        for path in sorted(Path(run.path, "factors").iterdir())
        for key, tensor in load_file(path).items()
    }


def files(run: raycurv.Run, directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(run.path, directory).iterdir())}


def scored(run: raycurv.Run, case: Case, out: str) -> torch.Tensor:
    """Scores of the case's queries on all its data, by their ids."""
    scores = run.influence(
        list(case.queries), list(case.data), out, address="none", rank="full", quiet=True
    )
    matrix, queries, trains = scores.matrix()
    q = [queries.index(row["id"]) for row in case.queries]
    n = [trains.index(row["id"]) for row in case.data]
    return torch.from_numpy(matrix[np.ix_(q, n)])


def column(table: Any, name: str) -> torch.Tensor:
    return torch.tensor(table[name].to_pylist(), dtype=torch.float64)


def assert_equal(fits: Any, got: raycurv.Run, want: raycurv.Run, case: Case) -> None:
    """Factors, scores, traces and examples' rows of two runs agree; the rows' order is free."""
    mine, theirs = factors(got), factors(want)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert worst(mine[name], value) < SUMS, name
    asked = replace(case, settings=want.manifest.settings)
    assert worst(scored(got, asked, fits.place()), scored(want, asked, fits.place())) < SCORES
    assert worst(column(got.blocks(), "trace"), column(want.blocks(), "trace")) < EXACT
    assert got.blocks()["tokens"].to_pylist() == want.blocks()["tokens"].to_pylist()
    rows, others = (run.examples().sort_by("id") for run in (got, want))
    assert rows["id"].to_pylist() == others["id"].to_pylist()
    assert worst(column(rows, "loss"), column(others, "loss")) < EXACT
    if want.manifest.settings["method"] == "ekfac":
        norms = (column(table, "gradient_sq_norm") for table in (rows, others))
        assert worst(*norms) < EXACT


# Extending


@pytest.mark.parametrize("keep_sums", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_extended_run_is_the_truth_of_all_data_in_the_bases_it_kept(
    fits, case: Case, keep_sums: bool
) -> None:
    first, rest = halves(case)
    before = fits.run(first, keep_sums=keep_sums)
    run = before.extend(list(rest.data), fits.place(), address="none", quiet=True, batch_tokens=9)
    assert files(run, "eigen") == files(before, "eigen")
    truth = fits.truth(case)
    for name in run.block_names():
        want = truth.corrected(name, *bases(run, name))
        assert worst(run.curvature(name).eigenvalues, want) < EXACT, name
        # The controls: it is not Λ of either part, nor that of the bases of all the data.
        assert worst(before.curvature(name).eigenvalues, want) > 1e-3
        assert worst(fits.run(case).curvature(name).eigenvalues, want) > 1e-3
    table = run.examples()
    assert table["id"].to_pylist() == [row["id"] for row in case.data]
    assert worst(column(table, "loss"), truth.losses()) < EXACT
    trace = float(column(run.blocks(), "trace").sum())
    assert float(column(table, "gradient_sq_norm").mean()) == pytest.approx(trace, rel=EXACT)
    assert set(run.blocks()["examples"].to_pylist()) == {len(case.data)}
    facts, whole = run.manifest.facts, fits.run(case).manifest.facts
    for name in ("examples", "tokens", "examples_without_loss"):
        assert facts[name] == whole[name]
    assert facts["extend"] == [before.path]


def test_extending_again_and_again_is_extending_once(fits) -> None:
    first, rest = halves(MLP)
    rows = list(rest.data)
    for keep_sums in (True, False):
        how = {"address": "none", "quiet": True, "keep_sums": keep_sums}
        before = fits.run(first, keep_sums=keep_sums)
        once = before.extend(rows, fits.place(), **how)
        twice = before.extend(rows[:2], fits.place(), **how).extend(rows[2:], fits.place(), **how)
        for name in once.block_names():
            got, want = (run.curvature(name).eigenvalues for run in (twice, once))
            assert worst(got, want) < SUMS
        assert twice.examples().equals(once.examples())


@pytest.mark.parametrize("case", [MLP, TWO_DRAWS, EMPIRICAL], ids=lambda case: case.name)
def test_an_extended_diagonal_is_the_diagonal_of_all_data(fits, case: Case) -> None:
    first, rest = halves(case)
    run = fits.run(first, method="diagonal").extend(
        list(rest.data), fits.place(), address="none", quiet=True
    )
    whole = fits.run(case, method="diagonal")
    for name in run.block_names():
        got, want = (r.curvature(name).eigenvalues for r in (run, whole))
        assert worst(got, want) < SUMS
    # Scores under both, so that influence takes the run as it takes any other.
    assert worst(scored(run, case, fits.place()), scored(whole, case, fits.place())) < SCORES


def test_the_corpus_of_an_extended_run_is_not_taken_for_all_its_data(fits) -> None:
    first, rest = halves(MLP)
    run = fits.run(first).extend(list(rest.data), fits.place(), address="none", quiet=True)
    for rows in (MLP.data, first.data, rest.data):
        scores = run.influence(
            list(MLP.queries), list(rows), fits.place(), address="none", quiet=True
        )
        assert scores.matrix()[2] == [row["id"] for row in rows]


@pytest.mark.parametrize("keep_sums", [True, False])
def test_rounded_means_are_extended_only_where_that_loses_nothing(fits, keep_sums: bool) -> None:
    first, rest = halves(MLP)
    how: dict[str, Any] = {"dtype": "float32", "store_dtype": "bfloat16", "keep_sums": keep_sums}
    before = fits.run(first, **how)
    if not keep_sums:
        with pytest.raises(UserError, match=r"in bfloat16 alone.*--keep-sums"):
            before.extend(list(rest.data), fits.place(), address="none", quiet=True)
        return
    run = before.extend(list(rest.data), fits.place(), address="none", quiet=True, keep_sums=True)
    truth = fits.truth(MLP)
    for path in Path(run.path, "corrected").iterdir():
        file = load_file(path)
        want = truth.corrected(path.stem, *bases(run, path.stem))
        assert worst(file["sum"] / file["count"], want) < 1e-5
        # The control: bfloat16 has 8 bits.
        assert worst(file["lam"], want) > 1e-4


def test_a_run_fitted_again_with_its_sums_has_them(fits, tmp_path: Path) -> None:
    first, rest = halves(MLP)
    how: dict[str, Any] = {
        "objective": "classification", "address": "none", "quiet": True,
        "store_dtype": "bfloat16", "batch_tokens": 4,
    }  # fmt: skip
    for keep in (False, True):
        run = raycurv.fit(MLP.network, list(first.data), tmp_path / "run", keep_sums=keep, **how)
    kept = raycurv.fit(MLP.network, list(first.data), tmp_path / "kept", keep_sums=True, **how)
    assert_same(tmp_path / "run", tmp_path / "kept")
    other = raycurv.fit(MLP.network, list(rest.data), tmp_path / "other", keep_sums=True, **how)
    assert len(run.merge(other, out=fits.place(), address="none", quiet=True).examples()) == 9
    assert len(kept.extend(list(rest.data), fits.place(), address="none", quiet=True).examples())


# Merging and subtracting


@pytest.mark.parametrize(
    ("case", "method"), COMBINED, ids=lambda value: getattr(value, "name", value)
)
def test_merged_runs_are_the_run_of_all_their_data(fits, case: Case, method: str) -> None:
    first, rest = (fits.run(c, method=method) for c in halves(case))
    merged = first.merge(
        rest, out=fits.place(), keep_sums=True, address="none", quiet=True, batch_tokens=9
    )
    assert_equal(fits, merged, fits.run(case, method=method), case)
    assert merged.examples()["id"].to_pylist() == [row["id"] for row in case.data]
    assert merged.manifest.facts["merge"] == [first.path, rest.path]


@pytest.mark.parametrize(
    ("case", "method"), COMBINED, ids=lambda value: getattr(value, "name", value)
)
def test_subtracting_what_was_merged_gives_back_the_rest(fits, case: Case, method: str) -> None:
    first, rest = (fits.run(c, method=method) for c in halves(case))
    whole = fits.run(case, method=method)
    left = whole.subtract(rest, out=fits.place(), keep_sums=True, address="none", quiet=True)
    assert_equal(fits, left, first, case)
    assert left.manifest.facts["subtracted_with_other_labels"] == 0
    # The control: what was there before is not what is left.
    worse = [worst(factors(whole)[k], v) for k, v in factors(first).items() if k.endswith("sum")]
    assert min(worse) > 1e-3


def test_the_order_of_merging_is_free(fits) -> None:
    cases = [part(MLP, f"part {n}", slice(3 * n, 3 * n + 3)) for n in range(3)]
    a, b, c = (fits.run(case) for case in cases)
    how: dict[str, Any] = {"keep_sums": True, "address": "none", "quiet": True}
    together = a.merge(b, c, out=fits.place(), **how)
    for run in (
        c.merge(a, b, out=fits.place(), **how),
        c.merge(b.merge(a, out=fits.place(), **how), out=fits.place(), **how),
    ):
        assert_equal(fits, run, together, MLP)
    assert_equal(fits, together, fits.run(MLP), MLP)
    left = together.subtract(c.path, a, out=fits.place(), **how)
    assert_equal(fits, left, b, cases[1])


def test_other_data_gives_another_run(fits) -> None:
    first, rest = halves(MLP)
    others = [row | {"inputs": [x + 1 for x in row["inputs"]]} for row in rest.data]
    moved = fits.run(replace(rest, name="moved", data=tuple(others)))
    run = fits.run(first).merge(moved, out=fits.place(), keep_sums=True, address="none", quiet=True)
    whole = factors(fits.run(MLP))
    assert worst(factors(run)["0.input sum"], whole["0.input sum"]) > 1e-2


def test_recorded_labels_are_read_and_not_drawn_again(
    fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rest = (fits.run(case) for case in halves(MLP))

    def draw(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("raycurv.mathematics.loss.objective.Classification.sample", draw)
    merged = first.merge(rest, out=fits.place(), keep_sums=True, address="none", quiet=True)
    left = merged.subtract(first, out=fits.place(), keep_sums=True, address="none", quiet=True)
    assert len(left.examples()) == len(rest.examples())


@pytest.mark.parametrize(
    ("case", "how"),
    [(MLP, {}), (MLP, {"stages": 3, "homes": 2}), (LLAMA, {"stages": 2})],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_sweep_through_the_stages_gives_the_same(fits, case: Case, how: dict[str, Any]) -> None:
    swept: dict[str, Any] = {"schedule": "swept", "address": "none", "quiet": True} | how
    first, rest = halves(case)
    a, b = fits.run(first), fits.run(rest)
    for method in ("ekfac", "kfac") if case is MLP else ("ekfac",):
        x, y = (fits.run(c, method=method) for c in halves(case))
        merged = x.merge(y, out=fits.place(), keep_sums=True, **swept)
        assert_equal(fits, merged, fits.run(case, method=method), case)
        left = merged.subtract(y, out=fits.place(), keep_sums=True, **swept)
        assert_equal(fits, left, x, first)
    run = a.extend(list(rest.data), fits.place(), **swept)
    want = a.extend(list(rest.data), fits.place(), address="none", quiet=True)
    for name in run.block_names():
        got, expected = (r.curvature(name).eigenvalues for r in (run, want))
        assert worst(got, expected) < EXACT
    assert run.examples()["id"].to_pylist() == want.examples()["id"].to_pylist()
    norms = (column(r.examples(), "gradient_sq_norm") for r in (run, want))
    assert worst(*norms) < EXACT
    # A run that was swept itself is taken as any other.
    again = fits.run(rest, **{k: v for k, v in swept.items() if k != "quiet"})
    assert_equal(
        fits, a.merge(again, out=fits.place(), **swept, keep_sums=True), fits.run(case), case
    )
    assert b.manifest.facts["examples"] == len(rest.data)


def test_a_difference_below_zero_is_clamped_and_counted(fits) -> None:
    rows = arrays(40, (5,), "classes")
    # Large numbers leave in float32 sums a rounding that the few that stay do not reach.
    large = [row | {"inputs": [1e3 * x for x in row["inputs"]]} for row in rows[2:]]
    case = Case("large", MLP.network, (*rows[:2], *large), "classification")
    single: dict[str, Any] = {"dtype": "float32"}
    whole = fits.run(case, **single)
    gone = fits.run(replace(case, name="gone", data=tuple(large)), **single)
    left = whole.subtract(gone, out=fits.place(), keep_sums=True, address="none", quiet=True)
    outcome = {row["block"]: row["eigh_outcome"] for row in left.blocks().to_pylist()}["0"]
    assert outcome.startswith("clamped ")
    assert float(column(left.spectrum(), "eigenvalue").min()) >= 0.0
    # Λ is refitted on what is left, so that it does not know of any of this.
    few = fits.run(replace(case, name="few", data=tuple(rows[:2])), **single)
    assert worst(column(left.blocks(), "trace"), column(few.blocks(), "trace")) < 1e-5
    assert "clamped" not in few.blocks()["eigh_outcome"][0].as_py()


def test_labels_that_were_drawn_otherwise_are_counted(fits, tmp_path: Path) -> None:
    first, rest = halves(MLP)
    # As another kernel would: the labels of the other seed, under the same name.
    other = raycurv.fit(
        MLP.network, list(rest.data), tmp_path / "rest", objective="classification", seed=5,
        dtype="float64", fisher="sampled", keep_sums=True, address="none", quiet=True,
    )  # fmt: skip
    with rewritten(tmp_path / "rest") as said:
        said["settings"]["seed"] = 0
    other = raycurv.open(other.path)
    left = fits.run(MLP).subtract(other, out=fits.place(), address="none", quiet=True)
    drawn = [
        [labels["drawn"][0] for labels in _labels(run)][-len(rest.data) :]
        for run in (fits.run(MLP), other)
    ]
    expected = sum(x != y for x, y in zip(*drawn, strict=True))
    assert left.manifest.facts["subtracted_with_other_labels"] == expected > 0
    assert len(left.examples()) == len(first.data)


def _labels(run: raycurv.Run) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(f"{run.path}/labels").to_pylist()
    return rows


# Stopping and going on


HOW: dict[str, Any] = {"address": "none", "quiet": True, "keep_sums": True}
FOLLOW: dict[str, Callable[[Any, str], raycurv.Run]] = {
    "extend": lambda fits, out: fits.run(halves(MLP)[0]).extend(
        list(halves(MLP)[1].data), out, **HOW
    ),
    "merge": lambda fits, out: fits.run(halves(MLP)[0]).merge(
        fits.run(halves(MLP)[1]), out=out, **HOW
    ),
    "merge kfac": lambda fits, out: fits.run(halves(MLP)[0], method="kfac").merge(
        fits.run(halves(MLP)[1], method="kfac"), out=out, **HOW
    ),
    "subtract": lambda fits, out: fits.run(MLP).subtract(fits.run(halves(MLP)[1]), out=out, **HOW),
    "merge lean": lambda fits, out: fits.run(halves(MLP)[0]).merge(
        fits.run(halves(MLP)[1]), out=out, **(HOW | {"keep_sums": False})
    ),
    "swept": lambda fits, out: fits.run(halves(MLP)[0]).merge(
        fits.run(halves(MLP)[1]), out=out, schedule="swept", stages=2, **HOW
    ),
    "swept extend": lambda fits, out: fits.run(halves(MLP)[0]).extend(
        list(halves(MLP)[1].data), out, schedule="swept", stages=2, **HOW
    ),
}


@pytest.fixture(scope="module")
def undisturbed(fits) -> Callable[[str], Path]:
    """The directory of a run that follows others, each made once."""
    return cache(lambda what: Path(FOLLOW[what](fits, fits.place()).path))


@pytest.mark.parametrize("what", FOLLOW)
def test_a_run_killed_at_every_kind_of_file_goes_on_from_there(
    what: str, fits, undisturbed: Callable[[str], Path]
) -> None:
    out = Path(fits.place())
    assert stopped_everywhere("a write", False, lambda out: FOLLOW[what](fits, str(out)), out) > 5
    assert_same(out, undisturbed(what))


@pytest.mark.parametrize("what", FOLLOW)
def test_a_finished_run_is_not_written_again_but_what_it_lost_is(
    what: str, fits, undisturbed: Callable[[str], Path]
) -> None:
    run = FOLLOW[what](fits, fits.place())
    folder = Path(run.path)

    def stamps() -> dict[str, int]:
        found = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        return {str(p): at for p, at in found.items() if p.name != "run.json"}

    before = stamps()
    FOLLOW[what](fits, run.path)
    assert stamps() == before
    kinds = {kind_of(path): path for path in sorted(before)}
    for path in kinds.values():
        Path(path).unlink()
        FOLLOW[what](fits, run.path)
        assert_same(folder, undisturbed(what))


def test_another_run_to_start_from_is_refused_once_work_has_begun(fits) -> None:
    cases = [part(MLP, f"part {n}", slice(3 * n, 3 * n + 3)) for n in range(3)]
    a, b, c = (fits.run(case) for case in cases)
    merged = a.merge(b, out=fits.place(), **HOW)
    with pytest.raises(UserError, match=r"--merge was \[.*\] and is now \["):
        a.merge(c, out=merged.path, **HOW)
    with pytest.raises(UserError, match=r"--merge was \[.*\] and is now None"):
        raycurv.fit(
            MLP.network, list(MLP.data), merged.path, objective="classification",
            dtype="float64", **HOW,
        )  # fmt: skip
    extended = a.extend(list(cases[1].data), fits.place(), **HOW)
    with pytest.raises(UserError, match=r"--extend was .* and is now "):
        c.extend(list(cases[1].data), extended.path, **HOW)
    with pytest.raises(UserError, match="the data is another one"):
        a.extend(list(cases[2].data), extended.path, **HOW)
    with pytest.raises(UserError, match=r"--extend was None and is now \["):
        a.extend(list(cases[1].data), b.path, **HOW)


def test_what_was_prepared_for_other_runs_is_not_taken(
    fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [part(MLP, f"part {n}", slice(3 * n, 3 * n + 3)) for n in range(3)]
    a, b, c = (fits.run(case) for case in cases)
    out, write = fits.place(), Store.write

    def dying(self: Store, name: str, *args: Any) -> None:
        if name.startswith("factors/4"):
            raise Stop
        write(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", dying)
        with pytest.raises(Stop):
            a.merge(b, out=out, **HOW)
    assert Path(out, "factors", "0.input.safetensors").exists()
    assert_same(
        Path(a.merge(c, out=out, **HOW).path), Path(a.merge(c, out=fits.place(), **HOW).path)
    )


# Mistakes


@dataclass(frozen=True)
class Runs:
    """Finished runs of a classifier on parts of one data set, and of others."""

    folder: Path

    def fit(self, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
        chosen = {
            "model": "commands:classifier", "objective": "classification", "address": "none",
            "keep_sums": True, "data": write_rows(self.folder / f"{name}.parquet", rows),
            "out": self.folder / name,
        } | settings  # fmt: skip
        outcome = run_here("fit.py", flags_of(chosen))
        assert outcome.code == 0, outcome.err

    def flags(self, out: Path, flags: Sequence[str]) -> list[str]:
        """A fit's flags; ``@name`` is a run or data of this folder."""
        own = {} if "--model" in flags else {"model": "commands:classifier"}
        own |= {"objective": "classification", "address": "none"}
        own |= {} if "--out" in flags else {"out": out}
        return flags_of(own) + [f.replace("@", f"{self.folder}/") for f in flags]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    rows = classified(12)
    made.fit("a", rows[:6])
    made.fit("b", rows[6:])
    made.fit("ab", rows)
    made.fit("overlap", rows[5:])
    made.fit("double", rows[6:], dtype="float64", seed=3, max_factor_dim=8)
    made.fit("empirical", rows[6:], fisher="empirical", blocks=["0", "2"])
    made.fit("kfac", rows[:6], method="kfac")
    made.fit("diagonal", rows[:6], method="diagonal")
    made.fit("identity", rows[:6], method="identity")
    made.fit("lean", rows[6:], keep_sums=False)
    made.fit("other-model", rows[6:], model="commands:dead")
    made.fit("changed", [rows[6] | {"inputs": [0.0] * 5}, *rows[7:]])
    made.fit("unlabelled", [{k: r[k] for k in ("id", "inputs")} for r in rows[6:]])
    made.fit("extended", rows[6:9], extend=made.folder / "a")
    write_rows(made.folder / "new.parquet", rows[6:])
    folder = made.folder / "unfinished"
    folder.mkdir()
    shutil.copy(made.folder / "a" / "run.json", folder)
    with rewritten(folder) as said:
        said["complete"].remove("tables")
    return made


MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "two ways at once": (
        ["--merge", "@a", "@b", "--extend", "@a"], ("--extend", "one of", "--merge too"),
    ),
    "merging one": (["--merge", "@a"], ("--merge", "two or more", "--merge RUN_A RUN_B")),
    "subtracting from nothing": (["--subtract", "@a"], ("--subtract", "two or more")),
    "merging with data": (
        ["--merge", "@a", "@b", "--data", "@new.parquet"], ("--merge", "no --data", "Leave"),
    ),
    "merging a sample": (
        ["--merge", "@a", "@b", "--max-examples", "3"], ("no --max-examples", "Leave"),
    ),
    "extending without data": (["--extend", "@a"], ("--data", "a value")),
    "merging diagonals": (
        ["--merge", "@diagonal", "@a", "--method", "diagonal"], ("ekfac or kfac", "diagonal"),
    ),
    "extending K-FAC": (
        ["--extend", "@kfac", "--data", "@new.parquet", "--method", "kfac"],
        ("--extend", "corrected eigenvalues", "--method kfac"),
    ),
    "extending a run of K-FAC": (
        ["--extend", "@kfac", "--data", "@new.parquet"], ("kfac:", "ekfac or diagonal", "kfac"),
    ),
    "extending the identity": (
        ["--extend", "@identity", "--data", "@new.parquet"], ("ekfac or diagonal", "identity"),
    ),
    "merging a run of the diagonal": (
        ["--merge", "@a", "@diagonal"], ("diagonal:", "no factors to add"),
    ),
    "merging an extended run": (
        ["--merge", "@extended", "@b"], ("extended", "whose factors are", "fit its data anew"),
    ),
    "no such run": (["--merge", "@a", "@nothing"], ("--merge", "nothing", "no run.json")),
    "an unfinished run": (
        ["--extend", "@unfinished", "--data", "@new.parquet"], ("a finished fit", "goes on where"),
    ),
    "into one of the runs": (
        ["--merge", "@a", "@b", "--out", "@b"], ("--out", "that of --merge", "stay as they are"),
    ),
    "into the run that is extended": (
        ["--extend", "@a", "--data", "@new.parquet", "--out", "@b/../a"],
        ("--out", "that of --extend"),
    ),
    "another model": (
        ["--merge", "@a", "@other-model"], ("other-model was fitted on", "other tensors"),
    ),
    "another model than the runs": (
        ["--merge", "@a", "@b", "--model", "commands:dead"], ("commands:dead", "other tensors"),
    ),
    "runs of other settings": (
        ["--merge", "@a", "@double"],
        (
            "--merge", "--dtype 'float64' against 'float32'", "--seed 3 against 0",
            "--max-factor-dim 8 against None", "--store-dtype 'float64' against 'float32'",
        ),
    ),
    "runs of other blocks and labels": (
        ["--subtract", "@ab", "@empirical"],
        ("--fisher 'empirical' against 'signs'", "--blocks ['0', '2'] against []"),
    ),
    "other settings than the run's": (
        ["--extend", "@double", "--data", "@new.parquet", "--draws", "2"],
        (
            "--dtype 'float64', and not 'float32'", "--draws 1, and not 2",
            "Give --draws 1 --max-factor-dim 8 --seed 3 --dtype float64 --store-dtype float64",
        ),
    ),
    "other blocks than the run's": (
        ["--extend", "@empirical", "--data", "@new.parquet", "--max-length", "9"],
        ("Give no --max-length --fisher empirical --blocks '0' --blocks '2', as its fit was",),
    ),
    "a run without sums": (
        ["--merge", "@a", "@lean"], ("lean", "kept its factors' sums", "again with --keep-sums"),
    ),
    "an example twice": (
        ["--merge", "@a", "@overlap"],
        ("example 'row 5'", "counts once", "in --merge", "/a and in --merge", "column `id`"),
    ),
    "an example that the run has": (
        ["--extend", "@a", "--data", "@overlap.parquet"],
        ("example 'row 5'", "/a and in --data", "counts once"),
    ),
    "an example that an extended run has": (
        ["--extend", "@extended", "--data", "@overlap.parquet"], ("example 'row 5'",),
    ),
    "subtracting what is not there": (
        ["--subtract", "@a", "@b"], ("example 'row 6'", "/b", "none of that id"),
    ),
    "subtracting twice": (
        ["--subtract", "@ab", "@b", "@b"], ("example 'row 6'", "subtracted already"),
    ),
    "subtracting all": (["--subtract", "@ab", "@a", "@b"], ("that are left", "none")),
    "subtracting another example of the id": (
        ["--subtract", "@ab", "@changed"], ("example 'row 6'", "the same content", "another"),
    ),
    "examples with and without labels": (
        ["--merge", "@a", "@unlabelled"], ("example 'row 6'", "inputs and labels as"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_ends_with_2(name: str, runs: Runs, tmp_path: Path) -> None:
    flags, says = MISTAKES[name]
    outcome = run_here("fit.py", runs.flags(tmp_path / "out", flags))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert failure_in(outcome)["error"]["kind"] == "UserError"
    message = outcome.err.strip().splitlines()[-1]
    assert ": expected " in message and ", got " in message
    for piece in says:
        assert piece in message, message


def test_the_runs_that_the_mistakes_start_from_are_fine(runs: Runs, tmp_path: Path) -> None:
    for name, flags in {
        "merge": ["--merge", "@a", "@b", "--keep-sums"],
        "subtract": ["--subtract", "@ab", "@b"],
        "extend": ["--extend", "@a", "--data", "@new.parquet"],
        "extend again": ["--extend", "@extended", "--data", "@tail.parquet"],
        "diagonal": ["--extend", "@diagonal", "--data", "@new.parquet", "--method", "diagonal"],
        "without a sum": ["--extend", "@lean", "--data", "@head.parquet"],
    }.items():
        write_rows(runs.folder / "tail.parquet", classified(12)[9:])
        write_rows(runs.folder / "head.parquet", classified(12)[:6])
        outcome = run_here("fit.py", runs.flags(tmp_path / name, flags))
        assert outcome.code == 0, outcome.err
        run = raycurv.open(tmp_path / name)
        assert len(run.examples()) == (6 if name == "subtract" else 12)
        assert Path(run.path, "factors").exists() == (name == "merge")


def test_a_corrected_mistake_may_use_the_same_directory(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flags, code in (
        (["--subtract", "@ab", "@changed"], 2),
        (["--merge", "@a", "@unlabelled"], 2),
        (["--extend", "@a", "--data", "@overlap.parquet"], 2),
        (["--merge", "@a", "@b"], 0),
    ):
        assert run_here("fit.py", runs.flags(out, flags)).code == code


def test_runs_are_given_as_they_are_or_as_directories(fits) -> None:
    first, rest = (fits.run(case) for case in halves(MLP))
    how: dict[str, Any] = {"objective": "classification", "dtype": "float64", **HOW}
    for runs in ([first, rest], (first.path, Path(rest.path))):
        run = raycurv.fit(MLP.network, None, fits.place(), merge=runs, **how)
        assert len(run.examples()) == len(MLP.data)
    more = list(halves(MLP)[1].data)
    for one in (first, first.path, Path(first.path)):
        run = raycurv.fit(MLP.network, more, fits.place(), extend=one, **how)
        assert len(run.examples()) == len(MLP.data)


def test_runs_in_memory_say_how_to_get_their_model_back(fits) -> None:
    first, rest = (fits.run(case) for case in halves(MLP))
    with pytest.raises(UserError, match=r"give it again as model=, or call raycurv\.fit"):
        raycurv.open(first.path).merge(rest, out=fits.place(), **HOW)
    with pytest.raises(UserError, match="a list of run directories"):
        raycurv.fit(classifier, None, fits.place(), merge=first.path, **HOW)
