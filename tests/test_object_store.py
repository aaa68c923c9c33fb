"""Claims about runs on an object store, over HTTP against a server that speaks S3.

What must be equal is equal bit for bit: same process, one thread, float64.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest
import torch
from commands import (
    EXACT_FIT,
    EXACT_INFLUENCE,
    Holder,
    classified,
    classifier,
    run_here,
    write_rows,
)  # fmt: skip
from s3 import ENVIRONMENT, Proxy, Server, free_port, proxy, server
from safetensors.torch import load_file

import raycurv
from raycurv.data.sources import fingerprint, open_parts
from raycurv.data.uri import hidden, redacted, shown
from raycurv.files import lease as leases
from raycurv.files.lease import Lease, Rhythm
from raycurv.files.lock import NAME, hold
from raycurv.files.store import Store, open_store
from raycurv.files.tables import read_table
from raycurv.files.tensorfile import open_tensors
from raycurv.files.weights import write_checkpoint
from raycurv.models.opening import open_model

torch.set_num_threads(1)

ROWS = classified(11)
QUERIES = ROWS[:3]
QUICK = Rhythm(beat=0.1, good=2.0, settle=0.05)
MIB = 1 << 20


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with server() as started:
            started.system().create_dir("bucket")
            yield started


@pytest.fixture
def between(s3: Server) -> Iterator[Proxy]:
    with proxy(s3) as started:
        yield started


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RHYTHM", Rhythm(beat=5.0, good=10.0, settle=0.05))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RHYTHM", QUICK)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[raycurv.Run, raycurv.Scores]:
    """A fit and scores on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    run = fit(folder / "run")
    return run, score(run, folder / "scores")


def fit(out: Any, data: Any = ROWS, **settings: Any) -> raycurv.Run:
    return raycurv.fit(classifier, data, out, **(EXACT_FIT | settings))


def score(run: raycurv.Run, out: Any, **settings: Any) -> raycurv.Scores:
    return run.influence(QUERIES, ROWS, out, **(EXACT_INFLUENCE | settings))


def results(found: raycurv.Run | raycurv.Scores) -> dict[str, Any]:
    """Every table and tensor, without footers and the times that it took."""
    store = found._store
    tables = (
        {"blocks": found.blocks(), "spectrum": found.spectrum(), "examples": found.examples()}
        if isinstance(found, raycurv.Run)
        else {"scores": found.table(), "self": found.self_influence()}
    )
    said: dict[str, Any] = {
        name: table.replace_schema_metadata(None).drop(
            [c for c in table.column_names if c == "eigh_seconds"]
        )
        for name, table in tables.items()
    }
    for name in store.names("", ".safetensors"):
        said |= {f"{name} {k}": t for k, t in open_tensors(store, name).read_all().items()}
    return said


def assert_same(found: raycurv.Run | raycurv.Scores, reference: Any) -> None:
    a, b = results(found), results(reference)
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x.equals(y), name
    assert not [n for n in found._store.names() if n.startswith(("work/", NAME))]


# Runs


def test_a_run_on_an_object_store_is_that_of_a_disk_and_stays_as_it_is(
    s3: Server, whole: tuple[raycurv.Run, raycurv.Scores]
) -> None:
    run = fit(s3.uri("bucket/same/run"))
    scores = score(run, s3.uri("bucket/same/scores"))
    assert_same(run, whole[0])
    assert_same(scores, whole[1])
    assert run._store.names() == whole[0]._store.names()
    assert_same(raycurv.open(s3.uri("bucket/same/run")), whole[0])
    assert_same(raycurv.open_scores(run.path.replace("/run", "/scores")), whole[1])
    # A rerun writes what says that it ran, and its lock.
    before = {n: (run._store.written(n), run._store.size(n)) for n in run._store.names()}
    assert uploads(lambda: fit(run._store.uri)) == {"run.json", NAME}
    after = {n: (run._store.written(n), run._store.size(n)) for n in run._store.names()}
    assert {n for n in after if after[n] != before[n]} <= {"run.json"}
    assert uploads(lambda: score(run, s3.uri("bucket/same/scores"))) == {NAME}


def test_an_evaluation_and_a_checkpoint_lie_there_as_on_a_disk(s3: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "classification", "address": "none", "quiet": True}
    far = raycurv.evaluate(classifier, ROWS, s3.uri("bucket/evaluation"), **settings)
    near = raycurv.evaluate(classifier, ROWS, tmp_path / "evaluation", **settings)
    assert far.loss == near.loss and far.examples().equals(near.examples())
    saved = Store(s3.uri("bucket/saved"))
    for _ in range(2):  # anew, and in place of what is there
        write_checkpoint(saved, open_model(classifier))
    assert saved.names() == ["model.safetensors"]
    (tmp_path / "here.safetensors").write_bytes(bytes(saved.open("model.safetensors").read()))
    expected = classifier().state_dict()
    found = load_file(tmp_path / "here.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def uploads(job: Callable[[], Any], fails: str = "") -> set[str]:
    """Names of the objects that a job uploads, to wherever; those that begin with ``fails`` are
    refused."""
    done: list[str] = []
    upload = Store._upload

    def watched(self: Store, path: str, chunks: Any) -> None:
        name = path[len(self.path()) + 1 :]
        if fails and name.startswith(fails):
            raise OSError("AWS Error ACCESS_DENIED")
        upload(self, path, chunks)
        done.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_upload", watched)
        job()
    return set(done)


def test_a_fit_that_a_store_has_stopped_goes_on(
    s3: Server, whole: tuple[raycurv.Run, raycurv.Scores]
) -> None:
    out = s3.uri("bucket/stopped")
    finished: list[set[str]] = []
    for place in ("eigen/2.output", "corrected/2"):
        with pytest.raises(OSError, match="ACCESS_DENIED"):
            uploads(lambda: fit(out), place)
        there = set(Store(out).names())
        assert NAME not in there and not any(n.startswith(place) for n in there)
        kinds = ("data/", "labels/", "eigen/", "corrected/")
        finished.append({n for n in there if n.startswith(kinds)})
    made = uploads(lambda: fit(out))
    assert_same(raycurv.open(out), whole[0])
    assert finished[0] and finished[0] < finished[1] and not finished[1] & made


def test_a_truncated_object_is_found_and_made_again(
    s3: Server, whole: tuple[raycurv.Run, raycurv.Scores]
) -> None:
    out = s3.uri("bucket/truncated/run")
    store = fit(out)._store
    sizes = {n: store.size(n) for n in ("eigen/0.input.safetensors", "data/part-00000.parquet")}
    for name in sizes:
        with store.open(name) as file:
            data = file.read()
        store.write(name, [data[:-7]])
        with pytest.raises(raycurv.DamagedFile):
            (open_tensors if name.endswith(".safetensors") else read_table)(store, name)
    assert sizes.keys() <= uploads(lambda: fit(out))
    assert {name: store.size(name) for name in sizes} == sizes
    assert_same(raycurv.open(out), whole[0])


def test_stopped_scores_go_on(s3: Server, whole: tuple[raycurv.Run, raycurv.Scores]) -> None:
    out = s3.uri("bucket/stopped-scores")
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        uploads(lambda: score(whole[0], out), "self/")
    assert_same(score(whole[0], out), whole[1])


def test_a_swept_run_keeps_its_spool_on_a_disk(
    s3: Server, whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    with pytest.raises(raycurv.UserError, match="--spool-dir"):
        fit(s3.uri("bucket/swept/run"), schedule="swept", stages=2)
    how: dict[str, Any] = {"schedule": "swept", "stages": 2, "spool_dir": str(tmp_path)}
    run = fit(s3.uri("bucket/swept/run"), method="diagonal", **how)
    assert run.examples()["loss"].equals(whole[0].examples()["loss"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["parquet", "jsonl", "arrow"])
def test_data_on_an_object_store_is_that_of_a_disk(
    format: str, s3: Server, whole: tuple[raycurv.Run, raycurv.Scores], tmp_path: Path
) -> None:
    path = tmp_path / "rows" / f"data.{format}"
    write_rows(path, ROWS)
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif format == "arrow":
        pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(path), "uncompressed")
    store = Store(s3.uri(f"bucket/data/{format}"))
    store.copy(path.name, Store(str(path.parent)))
    store.write("README.txt", [b"not data"])
    for place in ("", f"/data.{format}", f"/*.{format}", "/"):
        source = s3.uri(f"bucket/data/{format}{place}")
        assert fingerprint(source) == fingerprint(path)
    (part,) = open_parts(s3.uri(f"bucket/data/{format}"))
    assert part.location == f"data.{format} in {store.root}"
    if format == "parquet":
        run = fit(tmp_path / "run", data=s3.uri("bucket/data/parquet"))
        assert_same(run, whole[0])
        uri = s3.uri("bucket/data/parquet/data.parquet")
        scores = run.influence(uri, uri, tmp_path / "scores", **EXACT_INFLUENCE)
        mine = scores.table().filter(pa.compute.is_in(
            scores.table()["query_id"], pa.array([q["id"] for q in QUERIES])
        ))  # fmt: skip
        assert mine.num_rows == len(QUERIES) * len(ROWS)


# Whole or not at all


def test_what_stops_a_program_does_not_cut_an_object(s3: Server, between: Proxy) -> None:
    store = Store(between.uri("bucket/cut"))
    chunks = [bytes([n]) * (6 * MIB) for n in range(3)]

    def fails(method: str, path: str) -> int | None:
        if "partNumber=1&" in path:
            _thread.interrupt_main()
        return None

    between.fails = fails
    # What a shell starts in the background ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            store.write("interrupted", chunks)
    finally:
        signal.signal(signal.SIGINT, before)
    assert store.size("interrupted") == 18 * MIB

    def lost() -> Iterator[bytes]:
        yield chunks[0]
        raise ConnectionError("the source is gone")

    with pytest.raises(ConnectionError):
        store.write("copied", lost())
    assert not store.exists("copied")
    # What pyarrow does by itself, and why the above takes more than a `with`.
    with pytest.raises(ConnectionError), s3.system().open_output_stream("bucket/cut/by") as out:
        for chunk in lost():
            out.write(chunk)
    assert store.size("by") == 6 * MIB


def test_a_store_that_fails_in_the_middle_keeps_what_was_there(between: Proxy) -> None:
    store = Store(between.uri("bucket/kept"))
    store.write("old", [b"old"])
    between.fails = lambda method, path: 403 if "partNumber=2&" in path else None
    for name in ("old", "new"):
        with pytest.raises(OSError, match="ACCESS_DENIED"):
            store.write(name, [b"x" * (6 * MIB), b"y" * (6 * MIB)])
    assert store.size("old") == 3
    assert store.names() == ["old"]
    store.write("new", [])
    assert store.size("new") == 0


def test_a_server_that_fails_for_a_moment_is_asked_again(between: Proxy) -> None:
    store = Store(between.uri("bucket/asked"))
    answers = iter([503, 500, 503] * 2)
    between.fails = lambda method, path: next(answers, None)
    store.write("a", [b"a"])
    assert store.read_json("nothing") is None
    assert store.names() == ["a"]
    with pytest.raises(FileNotFoundError):
        store.open("nothing")


# Names


def test_a_name_stands_before_the_options() -> None:
    store = Store("s3://bucket/run/?endpoint_override=http://127.0.0.1:9/&scheme=http")
    assert store.root == "s3://bucket/run?endpoint_override=http://127.0.0.1:9/&scheme=http"
    inside = store.inside("products/pass 1")
    assert inside.root.startswith("s3://bucket/run/products/pass%201?endpoint_override=")
    assert (store.path("a"), inside.path("a")) == ("bucket/run/a", "bucket/run/products/pass 1/a")
    assert store == Store("s3://bucket/run?scheme=http&endpoint_override=127.0.0.1:9")
    assert store == Store("s3://key:secret@bucket/run?endpoint_override=127.0.0.1:9")
    assert store != Store("s3://bucket/run?endpoint_override=127.0.0.1:10")
    assert store != inside and len({store, inside, store.inside("products/pass 1")}) == 2
    assert Store("/a/b/").inside("c d").root == "/a/b/c d"
    assert Store("/a?b").inside("c").path("d") == "/a?b/c/d"


SECRETS = {
    "s3://KEY:SECRET@bucket/a@b?region=x": "s3://bucket/a@b?region=x",
    "s3://KEY:SEC%2FRET@bucket": "s3://bucket",
    "s3://KEY:SEC/RET@bucket/run?region=x": "s3://bucket/run?region=x",
    "s3://KEY:SEC?RET@bucket/run": "s3://bucket/run",
    "s3://KEY:SECRET/bucket": "s3:///bucket",
    "s3://bucket/run?secret_key=SECRET&region=x&session_token=SECRET": "s3://bucket/run?region=x",
    "s3://bucket/run?access_key=KEY": "s3://bucket/run",
    "s3://bucket/run?secret%5Fkey=SECRET&%72egion=x": "s3://bucket/run?%72egion=x",
    "s3://bucket/run?unheard_of=SECRET&SECRET&scheme=http": "s3://bucket/run?scheme=http",
    "s3://bucket/run?endpoint_override=http%3A%2F%2Fme%3ASECRET%40host%3A9000": (
        "s3://bucket/run?endpoint_override=http://host:9000"
    ),
    "s3://bucket/run&secret_key=SECRET": "s3://bucket/run&secret_key=***",
    "s3:///KEY:SECRET@bucket/run": "s3:///bucket/run",
    "S3://KEY:SECRET@bucket": "S3://bucket",
    "https://SECRET@host/run": "https://host/run",
    "https://host/run?X-Amz-Signature=SECRET&X-Amz-Credential=SECRET": "https://host/run",
    "https://host/run?sv=2020&sig=SECRET#SECRET": "https://host/run",
    "gs://SECRET@bucket/run": "gs://bucket/run",
    "hdfs://me:SECRET@host:8020/run": "hdfs://me@host:8020/run",
    "abfs://container%3ASECRET@account/run": "abfs://container@account/run",
    "s3:/KEY:SECRET@bucket": "s3:/***",
    "ray://host:10001": "ray://host:10001",
    "abfs://container:SECRET@account.dfs.core.windows.net/run": (
        "abfs://container@account.dfs.core.windows.net/run"
    ),
    "gs://anonymous@bucket/run": "gs://anonymous@bucket/run",
    "hdfs://host:8020/user@home": "hdfs://host:8020/user@home",
    "/plain/KEY:SECRET@path": "/plain/KEY:SECRET@path",
    "model.*:x": "model.*:x",
}


@pytest.mark.parametrize("uri", SECRETS)
def test_credentials_are_not_shown(uri: str) -> None:
    assert shown(uri) == SECRETS[uri]
    assert shown(shown(uri)) == shown(uri)
    if shown(uri) != uri:
        said = redacted(f"Cannot parse URI: '{uri}', '{uri[5:]}'", uri)
        told = hidden(f"a library says: <{uri}>, or so")
        assert told == f"a library says: <{shown(uri)}>, or so"
        for word in ("SECRET", "SEC%2FRET", "SEC/RET", "SEC?RET"):
            assert word not in said and word not in told


def test_credentials_reach_the_store_and_nothing_else(
    s3: Server, between: Proxy, tmp_path: Path
) -> None:
    keys = "LETMEIN:OPEN%2FSESAME@"
    store = Store(between.uri("bucket/keys/data", keys=keys))
    store.copy("rows.parquet", Store(str(write_rows(tmp_path / "rows.parquet", ROWS).parent)))
    assert {key.partition("/")[0] for key in between.keys if key} == {"LETMEIN"}
    run = fit(s3.uri("bucket/keys/run", keys=keys), s3.uri("bucket/keys/data", keys=keys))
    data = s3.uri("bucket/keys/data/rows.parquet", keys=keys)
    run.influence(data, data, s3.uri("bucket/keys/scores", keys=keys), **EXACT_INFLUENCE)
    everything = Store(s3.uri("bucket/keys"))
    assert "scores/run.json" in everything.names()
    for name in everything.names():
        with everything.open(name) as file:
            content = bytes(file.read())
        assert not any(word in content for word in (b"LETMEIN", b"SESAME")), name
    said = json.dumps(everything.read_json("run/run.json")["facts"])
    assert "s3://bucket/keys/data?endpoint_override=" in said
    assert "LETMEIN" not in f"{run!r} {run.path}"


# Mistakes


def mistake(job: Any) -> str:
    """The message of a mistake that is found within seconds."""
    begun = time.monotonic()
    with pytest.raises(raycurv.UserError) as caught:
        job()
    assert time.monotonic() - begun < 10
    error: BaseException = caught.value
    assert error.__cause__ is None or "SECRET" not in str(error.__cause__)
    assert error.__context__ is None or "SECRET" not in str(error)
    assert "SECRET" not in str(error)
    return str(error)


def test_a_store_that_does_not_answer_is_named_within_seconds(s3: Server, tmp_path: Path) -> None:
    dead = Server(free_port())
    keys = "KEY:SECRET@"
    for job in (
        lambda: fit(dead.uri("bucket/run", keys=keys)),
        lambda: fit(tmp_path / "run", data=dead.uri("bucket/data", keys=keys)),
        lambda: raycurv.open(dead.uri("bucket/run", keys=keys)),
    ):
        text = mistake(job)
        assert f"expected an object store that answers at {dead.endpoint}" in text
        assert "s3://bucket/" in text and "refused" in text
    outcome = run_here("fit.py", ["--model", "commands:classifier", "--data", tmp_path, "--out",
                                  dead.uri("bucket/run", keys=keys)])  # fmt: skip
    assert outcome.code == 2 and dead.endpoint in outcome.err and "SECRET" not in outcome.err


def test_a_bucket_that_is_not_there_is_named_or_made(s3: Server) -> None:
    text = mistake(lambda: fit(s3.uri("no-bucket/run", keys="KEY:SECRET@")))
    assert "--out s3://no-bucket/run?" in text and "none of the name no-bucket" in text
    assert "allow_bucket_creation=true" in text
    text = mistake(lambda: raycurv.open(s3.uri("bucket/no-run")))
    assert "no run.json" in text
    text = mistake(lambda: fit(s3.uri("bucket/x"), data=s3.uri("bucket/no-data", keys="A:SECRET@")))
    assert text.startswith("s3://bucket/no-data?") and "nothing of that name" in text
    store = open_store(s3.uri("new-bucket/run", "&allow_bucket_creation=true"), "--out")
    with hold(store, "fit.py"):
        store.write("a", [b"a"])
    assert store.names() == ["a"]


def test_keys_that_may_not_write_are_named(between: Proxy) -> None:
    between.fails = lambda method, path: None if method in ("GET", "HEAD") else 403
    text = mistake(lambda: fit(between.uri("bucket/rights/run", keys="KEY:SECRET@")))
    assert "a directory that can be written" in text and "ACCESS_DENIED" in text


def test_a_uri_that_cannot_be_parsed_is_shown_without_its_secret() -> None:
    for uri in ("s3://KEY:SECRET/MORE@bucket/run", "s3://KEY:SECRET@bucket/run?no=1"):
        for job in (lambda u=uri: open_store(u, "--out"), lambda u=uri: open_parts(u)):
            assert "s3://bucket/run" in mistake(job)


# Leases


def refused(store: Store) -> str:
    with pytest.raises(raycurv.UserError) as caught, hold(store, "another job"):
        pass
    return str(caught.value)


def test_a_live_lease_is_respected_and_a_dead_one_taken(s3: Server, quick: None) -> None:
    uri = s3.uri("bucket/lease")
    store, said = Store(uri), []
    with Holder(uri, QUICK.beat, QUICK.good, QUICK.settle) as holder:
        text = refused(store)
        assert f"fit.py in process {holder.pid} on " in text and "--out s3://bucket/lease?" in text
        assert holder.tell("write") == "written"
        holder.signal(signal.SIGKILL)
        begun = time.monotonic()
        with hold(store, "another job", said.append):
            assert QUICK.good < time.monotonic() - begun < 10 * QUICK.good
            assert f"another job in process {os.getpid()}" in refused(store)
        assert str(holder.pid) in said[0] and "up to 2 s" in said[0]
    assert store.names() == ["written"]


def test_who_was_suspended_for_too_long_stops(s3: Server, quick: None) -> None:
    uri = s3.uri("bucket/suspended")
    store = Store(uri)
    with Holder(uri, QUICK.beat, QUICK.good, QUICK.settle) as holder:
        holder.signal(signal.SIGSTOP)
        with hold(store, "another job"):
            holder.signal(signal.SIGCONT)
            text = holder.tell("write")
            assert text.startswith("lost: --out s3://bucket/suspended?")
            assert "that of another job in process" in text
            store.write("mine", [b"x"])
    assert store.names() == ["mine"]


def test_an_old_lease_is_dead_by_the_clock_of_the_store(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3.uri("bucket/old"))
    store.write_json(NAME, {"lease": "another", "job": "fit.py", "beat": 60, "good": 3600})
    written = Store.written
    monkeypatch.setattr(
        Store, "written", lambda self, name: written(self, name) - 7300 * (name == NAME)
    )
    begun = time.monotonic()
    with hold(store, "fit.py"):
        assert time.monotonic() - begun < 2
    assert store.names() == []


def test_of_two_that_start_at_once_one_wins(
    s3: Server, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        store = Store(s3.uri(f"bucket/race-{number}"))
        two = [Lease(store, NAME, {"job": f"job {n}"}, "here") for n in range(2)]
        barrier = threading.Barrier(2)
        found: list[Any] = [None, None]
        read = Lease._read

        def together(self: Lease, read: Any = read, barrier: Any = barrier) -> Any:
            """What both see at first is nothing."""
            seen = read(self)
            if not self._beats:
                barrier.wait()
            return seen

        def take(n: int, two: Any = two, found: Any = found) -> None:
            found[n] = two[n].take(lambda text: None)

        monkeypatch.setattr(Lease, "_read", together)
        threads = [threading.Thread(target=take, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setattr(Lease, "_read", read)
        (loser,) = (n for n in range(2) if found[n] is not None)
        assert found[loser]["job"] == f"job {1 - loser}"
        two[1 - loser].check()
        two[loser].release()
        assert store.exists(NAME)  # a loser does not delete what is not his
        two[1 - loser].release()
        assert not store.exists(NAME)


def test_of_two_that_both_passed_one_stops(
    s3: Server, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3.uri("bucket/both"))
    first, second = (Lease(store, NAME, {"job": name}, "here") for name in ("a", "b"))
    assert first.take(lambda text: None) is None
    monkeypatch.setattr(Lease, "_alive", lambda self, there, say: False)
    assert second.take(lambda text: None) is None
    end = time.monotonic() + 2
    lost: list[Lease] = []
    while not lost and time.monotonic() < end:
        time.sleep(0.05)
        for one in (first, second):
            try:
                one.check()
            except raycurv.errors.LostLock:
                lost.append(one)
    assert len(lost) == 1
    for one in (first, second):
        one.release()
    assert not store.exists(NAME)


def test_a_lost_lease_stops_a_fit(s3: Server, quick: None) -> None:
    store = Store(s3.uri("bucket/taken"))
    write = Store.write

    def stolen(self: Store, name: str, chunks: Any) -> None:
        if name.startswith("corrected/"):
            write(Store(store.uri), NAME, [b'{"lease": "another", "job": "fit.py"}'])
            # Several beats, of which a busy machine may miss some.
            time.sleep(20 * QUICK.beat)
        write(self, name, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", stolen)
        with pytest.raises(raycurv.errors.LostLock, match="Stop one of the two"):
            fit(store.uri)
    assert store.names("corrected") == []
    assert store.read_json(NAME)["lease"] == "another"
