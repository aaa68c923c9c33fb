"""Claims about a run directory as data: settings that changed, links, full and failing disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from commands import EXACT_FIT, classified, classifier, rewritten
from results import assert_same

import raycurv
from raycurv import UserError
from raycurv.errors import DamagedFile, DiskError, NoSpace
from raycurv.files import lock
from raycurv.files.store import Store
from raycurv.files.tables import read_table, write_tables
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.jobs.fit.phases import FitLoop
from raycurv.jobs.recorded import fit_settings, is_of_fit

ROWS = classified(12)


def fit(out: Path, **settings: Any) -> raycurv.Run:
    return raycurv.fit(classifier, ROWS, out, **(EXACT_FIT | settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit of EK-FAC."""
    out = tmp_path_factory.mktemp("run") / "run"
    fit(out)
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


# What run.json and blocks.json say


SLIPS = {
    "run.json": (
        ('"method": "ekfac"', '"method": "kfac"'),
        ('"examples": 12', '"examples": -5'),
        ('"schema": "2"', '"schema": "1"'),
        ('"checksum"', '"chfcksum"'),
        ('"seed": 0', '"seed": 0, "seed": 1'),
        ('"draws": 1', '"draws": NaN'),
    ),
    "blocks.json": (('"d_in": 6', '"d_in": 8'), ('"bias": false', '"bias": true')),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_of_an_editor_is_refused(name: str, copied: Path) -> None:
    text = (copied / name).read_text()
    for old, new in SLIPS[name]:
        assert old in text
        (copied / name).write_text(text.replace(old, new, 1))
        with pytest.raises(DamagedFile, match=name):
            raycurv.open(copied).curvature("0")
    # The layout of the text is nobody's concern.
    (copied / name).write_text(json.dumps(json.loads(text)))
    assert raycurv.open(copied).curvature("0")
    # Without checksums the same slip is read as if it were meant.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycurv.files.store.checksum", lambda value: json.loads(text)["checksum"])
        (copied / name).write_text(text.replace(*SLIPS[name][0], 1))
        if name == "run.json":
            assert raycurv.open(copied).manifest.settings["method"] == "kfac"


SETTINGS: tuple[tuple[str, Any], ...] = (
    ("method", "kfak"), ("draws", 0), ("draws", "1"), ("draws", True), ("blocks", "all"),
    ("blocks", [1]), ("seed", 1.5), ("dtype", None), ("max_factor_dim", 0), ("rows", -1),
    ("merge", 7), ("nothing_known", 1), ("objective", ["a"]), ("seed", 2**70),
)  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=lambda one: str(one))
def test_a_setting_that_no_job_has_is_refused(key: str, value: Any, copied: Path) -> None:
    with rewritten(copied) as said:
        said["settings"][key] = value
    with pytest.raises(DamagedFile, match=r"run\.json") as caught:
        raycurv.open(copied)
    assert key.replace("_", "-") in str(caught.value).replace("_", "-")


def _twice(blocks: list[dict[str, Any]]) -> None:
    blocks.append(blocks[0])


BLOCKS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "'0' twice": _twice,
    "a plain name": lambda blocks: blocks[0].update(name="../../0", module="0"),
    "a name with a zero": lambda blocks: blocks[0].update(name="a\0b"),
    "no shape": lambda blocks: blocks[0].update(d_in=0),
    "a shape below zero": lambda blocks: blocks[0].update(d_out=-7),
    "no number": lambda blocks: blocks[0].update(d_out="7"),
    "an unknown kind": lambda blocks: blocks[0].update(kind="quadratic"),
    "an input of nobody": lambda blocks: blocks[0].update(input_factor="9.input"),
    "an input of another width": lambda blocks: blocks[1].update(input_factor="0.input"),
    "an unknown key": lambda blocks: blocks[0].update(path="/etc"),
    "no object": lambda blocks: blocks.append([]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_can_be_none_are_refused(name: str, copied: Path) -> None:
    with rewritten(copied, "blocks.json") as said:
        BLOCKS[name](said["blocks"])
    with pytest.raises(DamagedFile, match=r"blocks\.json"):
        raycurv.open(copied).block_names()


def _number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


TENSORS: tuple[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
    ("corrected/0", "lam", _number(torch.nan)),
    ("corrected/0", "lam", _number(-1e-300)),
    ("corrected/0", "lam", _number(torch.inf)),
    ("corrected/0", "lam", lambda lam: lam.T.contiguous()),
    ("corrected/0", "lam", lambda lam: lam.long()),
    ("eigen/0.input", "eigenvectors", _number(torch.nan)),
    ("eigen/0.input", "eigenvectors", lambda q: q[:5]),
    ("eigen/0.input", "eigenvalues", _number(-1.0)),
    ("eigen/0.input", "eigenvalues", lambda w: w.flip(0)),
    ("eigen/0.input", "eigenvalues", lambda w: w[:-1]),
)


@pytest.mark.parametrize(("name", "key", "change"), TENSORS)
def test_numbers_that_can_be_none_are_refused_though_their_checksums_are_right(
    name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor], copied: Path
) -> None:
    store = Store(str(copied))
    file = open_tensors(store, f"{name}.safetensors")
    raycurv.open(copied).curvature("0")
    changed = file.read_all() | {key: change(file.read(key))}
    write_tensors(store, f"{name}.safetensors", changed, file.metadata, finite=False)
    if name.startswith("eigen"):
        # Its checksum is part of what Λ was fitted in.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "raycurv.files.curvature_files.basis_mark", lambda store, block: _mark(copied)
            )
            with pytest.raises(DamagedFile, match=name):
                raycurv.open(copied).curvature("0")
        return
    with pytest.raises(DamagedFile, match=name):
        raycurv.open(copied).curvature("0")


def _mark(run: Path) -> str:
    return open_tensors(Store(str(run)), "corrected/0.safetensors").metadata["bases"]


def test_a_file_of_another_block_is_none_of_this_one(tmp_path: Path) -> None:
    made = fit(tmp_path / "run", method="diagonal")
    folder = tmp_path / "run" / "corrected"
    shutil.copy(folder / "0.safetensors", folder / "2.safetensors")
    with pytest.raises(DamagedFile, match="the file of block 2"):
        made.curvature("2")


def _older(folder: Path) -> None:
    """Make of a run what a version left that knew no checksums of JSON."""
    for path in folder.rglob("*.json"):
        said = json.loads(path.read_text())
        if isinstance(said, list):
            continue
        for key in ("checksum", "schema"):
            said.pop(key, None)
        if path.name == "run.json":
            said["schema"] = "1"
            # A setting that there was not yet.
            said["settings"].pop("rows", None)
        lists = {"blocks.json": "blocks", "gathers.json": "gathers"}
        path.write_text(json.dumps(said[lists[path.name]] if path.name in lists else said))


def test_a_run_of_an_earlier_version_opens_and_goes_on(run: Path, copied: Path) -> None:
    _older(copied)
    assert raycurv.open(copied).manifest.settings["rows"] is None
    (copied / "corrected" / "2.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitLoop, "_write_tables", _stop)
        with pytest.raises(KeyboardInterrupt):
            fit(copied)
    _older(copied)
    fit(copied)
    assert_same(copied, run)
    assert json.loads((copied / "run.json").read_text())["schema"] == "2"


def test_what_is_no_run_of_this_version_is_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        raycurv.open(tmp_path)
    store = Store(str(copied))
    said = store.read_json("run.json")
    assert said is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycurv.files.store.SCHEMA", "3")
        store.write_json("run.json", said)
    with pytest.raises(UserError, match=r"version 2 or before, got one of 3"):
        raycurv.open(copied)
    store.write_json("run.json", said | {"job": "foresee"})
    with pytest.raises(UserError, match="foresee"):
        raycurv.open(copied)


# Where a fit stops


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


PHASES = [
    *(("ekfac", phase) for phase in ("layout", "factors", "eigen", "corrected", "tables")),
    ("kfac", "factors"), ("kfac", "eigen"), ("mfac", "rows"), ("diagonal", "corrected"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_a_fit_that_stops_before_it_says_that_a_phase_is_complete_says_it_later(
    method: str, phase: str, tmp_path: Path
) -> None:
    settings = {"method": method, "gradients": method == "ekfac"}
    settings |= {"rows": 4} if method == "mfac" else {}
    complete = fit(tmp_path / "whole", **settings).manifest.complete
    assert phase in complete
    done = FitLoop._done

    def stop(self: FitLoop, *names: str) -> None:
        if phase in names:
            raise KeyboardInterrupt
        done(self, *names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitLoop, "_done", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", **settings)
    assert fit(tmp_path / "run", **settings).manifest.complete == complete
    assert_same(tmp_path / "run", tmp_path / "whole")


# Links


def test_nothing_is_written_or_deleted_through_a_link(copied: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").write_text("dear")
    store = Store(str(copied))
    for name in ("eigen", "work"):
        shutil.rmtree(copied / name, ignore_errors=True)
        (copied / name).symlink_to(home)
        inner = store.inside(f"{name}/deeper")
        for act in (
            lambda: store.write(f"{name}/letter", [b"gone"]),  # noqa: B023
            lambda: store.delete(f"{name}/letter"),  # noqa: B023
            lambda: store.delete_directory(name),  # noqa: B023
            lambda: store.delete_directory(f"{name}/deeper"),  # noqa: B023
            lambda: store.names(name),  # noqa: B023
            lambda: inner.write("letter", [b"gone"]),  # noqa: B023
            lambda: inner.delete_directory(""),  # noqa: B023
            inner.make,
            lambda: fit(copied),
        ):
            with pytest.raises(UserError, match="link"):
                act()
        (copied / name).unlink()
    assert sorted(p.name for p in home.iterdir()) == ["letter"]
    assert (home / "letter").read_text() == "dear"
    # The directory itself may be a link: its user named it.
    (tmp_path / "alias").symlink_to(copied)
    fit(tmp_path / "alias")
    assert (copied / "eigen").is_dir()


def test_a_link_that_waits_for_a_file_has_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("dear")
    out = tmp_path / "run"
    (out / "corrected").mkdir(parents=True)
    for name in ("run.json.part", "corrected/0.safetensors.part", "corrected/0.safetensors"):
        (out / name).symlink_to(target)
    Store(str(out)).write("corrected/0.safetensors", [b"whole"])
    assert not (out / "corrected/0.safetensors").is_symlink()
    (out / "corrected/0.safetensors").unlink()
    (out / "corrected").rmdir()
    fit(out)
    assert target.read_text() == "dear"
    assert not list(out.rglob("*.part"))


def test_what_a_link_leads_to_outside_is_not_read(copied: Path, tmp_path: Path) -> None:
    for name in ("run.json", "corrected/0.safetensors", "tables/blocks/part-00000.parquet"):
        outside = tmp_path / "outside"
        (copied / name).rename(outside)
        (copied / name).symlink_to(outside)
        with pytest.raises(UserError, match=f"expected {name} as a file"):
            opened = raycurv.open(copied)
            opened.blocks()
            opened.curvature("0")
        (copied / name).unlink()
        outside.rename(copied / name)


def test_files_follow_the_umask_and_a_spool_elsewhere_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        modes: set[int] = set()

        def look(store: Store, spool: Path = tmp_path / "spool") -> None:
            modes.update(stat.S_IMODE(p.stat().st_mode) for p in spool.glob("raycurv-*"))

        with pytest.MonkeyPatch.context() as patch:
            write = Store.write

            def watched(self: Store, name: str, chunks: Any) -> None:
                write(self, name, chunks)
                look(self)

            patch.setattr(Store, "write", watched)
            fit(tmp_path / "run", schedule="swept", stages=2, spool_dir=str(tmp_path / "spool"))
    finally:
        os.umask(before)
    assert modes == {0o700}
    found = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert found == {0o640}
    stranger = Store(str(tmp_path / "laid"), private=True)
    (tmp_path / "laid").symlink_to(tmp_path / "run")
    with pytest.raises(UserError, match="link"):
        stranger.write("state.json", [b""])


# Disks


FAULTS = (
    (errno.EFBIG, "ulimit -f"), (errno.EROFS, "Mount"), (errno.EIO, "dmesg"),
    (errno.EDQUOT, "Make room"), (errno.ENOSPC, "Make room"), (errno.EACCES, "permissions"),
    (errno.EMFILE, "ulimit -n"), (errno.ENAMETOOLONG, "shorter"),
)  # fmt: skip


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
@pytest.mark.parametrize(("number", "remedy"), FAULTS, ids=lambda one: str(one))
def test_what_a_disk_says_is_told_with_a_remedy(
    call: str, number: int, remedy: str, tmp_path: Path
) -> None:
    store, name = Store(str(tmp_path)), "eigen/a"
    store.write(name, [b"before"])
    original = getattr(os, call)

    def fail(*given: Any, **named: Any) -> Any:
        if call == "open" and not (len(given) > 1 and given[1] & os.O_CREAT):
            return original(*given, **named)
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskError, match=remedy) as caught:
            store.write(name, [b"after"])
    assert str(tmp_path) in caught.value.where and os.strerror(number) in caught.value.got
    assert isinstance(caught.value, NoSpace) == (number in (28, 27, 122))
    assert (tmp_path / name).read_bytes() == b"before"
    assert not list(tmp_path.rglob("*.part"))


def test_a_limit_of_a_files_size_ends_a_fit_with_all_that_was_finished(
    run: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            fit(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.part"))
    fit(tmp_path / "run")
    assert_same(tmp_path / "run", run)


# Locks


def _directory(path: Path) -> None:
    path.mkdir()


LOCKS: dict[str, Callable[[Path], object]] = {
    "a directory": _directory,
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to(path.parent / "target"),
    "a file that has another name": lambda path: os.link(path.parent / "target", path),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_what_is_no_lock_is_named_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("dear")
    LOCKS[kind](tmp_path / lock.NAME)
    with (
        pytest.raises(UserError, match=f"got {kind}.*Remove"),
        lock.hold(Store(str(tmp_path)), "fit.py"),
    ):
        pass
    assert (tmp_path / "target").read_text() == "dear"


@pytest.mark.parametrize(
    "text", ["", "[" * 4000, "{}", '{"job": "\\u001b[2J", "host": [1]', "\xff"]
)
def test_a_lock_that_says_nothing_sensible_is_a_lock_all_the_same(
    text: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    with lock.hold(store, "fit.py"):
        (tmp_path / lock.NAME).write_text(text, "latin-1")
        with pytest.raises(UserError, match="no other job"), lock.hold(store, "fit.py"):
            pass


def test_what_goes_while_a_job_runs_is_named(tmp_path: Path) -> None:
    rename = os.replace

    def take_away(source: str, target: str, **folders: Any) -> None:
        rename(source, target, **folders)
        if target == "0.input.safetensors":
            shutil.rmtree(tmp_path / "run" / "factors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", take_away)
        with pytest.raises(DamagedFile, match=r"--out .*factors.*taken away"):
            fit(tmp_path / "run")
    assert fit(tmp_path / "run").blocks().num_rows == 3


# What follows a run, and what names its files


def test_what_follows_a_run_of_the_first_version_is_known_again(run: Path, tmp_path: Path) -> None:
    first = {
        "blocks", "draws", "dtype", "extend", "fisher", "long", "max_examples", "max_factor_dim",
        "max_length", "merge", "method", "objective", "rows", "seed", "store_dtype", "subtract",
    }  # fmt: skip
    opened = raycurv.open(run, model=classifier)
    scores = opened.influence(ROWS[:2], ROWS, tmp_path / "scores", quiet=True, address="none")
    assert scores.manifest.fingerprints["fit"]["settings"].keys() == first
    new = [row | {"id": f"new {row['id']}"} for row in classified(3, seed=9)]
    more = opened.extend(new, tmp_path / "more", quiet=True, address="none")
    said = opened.manifest
    kept = {name: said.settings[name] for name in first}
    text = json.dumps([kept, said.fingerprints], sort_keys=True).encode()
    assert more.manifest.settings["extend"] == [hashlib.blake2b(text, digest_size=8).hexdigest()]
    # Where a later setting is not as if there were none, it counts.
    said.settings["empty"] = "skip"
    assert fit_settings(said).keys() == {*first, "empty"}


def test_scores_are_not_taken_for_those_of_a_model_that_was_fitted_since(tmp_path: Path) -> None:
    def scores(model: Any) -> raycurv.Scores:
        found = raycurv.fit(model, ROWS, tmp_path / "run", **EXACT_FIT)
        return found.influence(ROWS[:2], ROWS, tmp_path / "scores", quiet=True, address="none")

    def trained() -> torch.nn.Module:
        model = classifier()
        with torch.no_grad():
            model[2].weight *= 1.5
        return model

    before = scores(classifier)
    assert scores(classifier).table().equals(before.table())
    # Fitted again where it was: settings and data say nothing of that.
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"the model is another one \(2.weight changed\)"):
        scores(trained)
    fitted = raycurv.open(tmp_path / "run").manifest
    assert not is_of_fit(before.manifest, fitted)
    # An earlier version did not say which model it was: its scores stay.
    with rewritten(tmp_path / "scores") as said:
        for name in ("model", "config"):
            said["fingerprints"].pop(name, None)
    found = scores(trained)
    assert found.table().equals(before.table()) and is_of_fit(found.manifest, fitted)


OTHERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "another module": lambda blocks: blocks[0].update(module="2"),
    "without its bias": lambda blocks: blocks[0].update(bias=False, d_in=5),
    "of another kind": lambda blocks: blocks[0].update(kind="conv1d"),
    "a part of a parameter": lambda blocks: blocks[0].update(index=3),
    "no parameter": lambda blocks: blocks[0].update(parameter="__class__"),
    "of groups": lambda blocks: blocks[0].update(groups=5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_that_the_model_does_not_have_are_refused(name: str, copied: Path) -> None:
    with rewritten(copied, "blocks.json") as said:
        OTHERS[name](said["blocks"])
    opened = raycurv.open(copied, model=classifier)
    with pytest.raises(DamagedFile, match=r"blocks\.json.*the blocks of the model"):
        opened.influence(ROWS[:2], ROWS, copied.parent / "scores", quiet=True, address="none")
    with pytest.raises(DamagedFile, match=r"blocks\.json.*the blocks of the model"):
        opened.prune(copied.parent / "pruned", sparsity=0.5, quiet=True, address="none")


@pytest.mark.parametrize("name", ["a\nb", "x" * 240])
def test_a_block_whose_name_no_file_can_have_is_named_at_once(name: str, tmp_path: Path) -> None:
    def network() -> torch.nn.Module:
        made = torch.nn.Sequential()
        made.add_module("fine", torch.nn.Linear(5, 3))
        made.add_module(name, torch.nn.Linear(3, 3))
        return made

    with pytest.raises(UserError, match="a name that files can have"):
        raycurv.fit(network, ROWS, tmp_path / "run", **EXACT_FIT)
    left_out = EXACT_FIT | {"blocks": ("fine",)}
    assert raycurv.fit(network, ROWS, tmp_path / "run", **left_out).block_names() == ["fine"]


@pytest.mark.parametrize("value", ["x" * 1000, 0.0], ids=["texts", "numbers"])
def test_a_table_that_takes_far_more_memory_than_its_file_is_refused(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycurv.data.bounds.EXPANDED", 4 << 20)
    store, rows = Store(str(tmp_path)), 2_000 if value else 200_000
    table = pa.table({"id": [value] * rows})
    for count, fits in ((2, True), (20, False)):
        write_tables(store, "a.parquet", table.schema, (table for _ in range(count)), {})
        assert 32 * store.size("a.parquet") < 20 * table.nbytes  # type: ignore[operator]
        if fits:
            assert read_table(store, "a.parquet").equals(pa.concat_tables([table] * count))
            (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
            with pytest.raises(DamagedFile, match=r"a copy of a\.parquet"):
                read_table(store, "b.parquet")
            continue
        with pytest.raises(UserError, match="at most 4 MiB"):
            read_table(store, "a.parquet")
