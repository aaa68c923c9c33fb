"""Memory of the driver: what it knows of every example is a few bytes in arrays, no object."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raycurv.data.digests import BYTES, Digests, Smallest, digest
from raycurv.data.examples import Example
from raycurv.data.microbatch import plan_microbatches
from raycurv.driver import timeline_table as timeline
from raycurv.driver.commits import plan_mark
from raycurv.driver.corpus import Corpus, one_array, store_corpus, stored_corpus
from raycurv.driver.feed import Feed
from raycurv.driver.sinks import ExampleRows, Pile
from raycurv.files.store import Store
from raycurv.jobs.fit import fitting
from raycurv.jobs.influence import score_rows as rows
from raycurv.jobs.influence.influence_settings import InfluenceSettings
from raycurv.jobs.influence.score_rows import ScoreRows
from raycurv.planning.shapes import DataShape
from raycurv.stages.seen import Seen
from raycurv.stages.spans import Span, SpanLog

MANY = 200_000
# Of ids 14 characters and an offset of 8, lengths 4, the plan 8 and as much a microbatch.
MOST_BYTES = 50


def ids(count: int) -> list[str]:
    return [f"example {n:06d}" for n in range(count)]


def corpus_of(store: Store, count: int) -> Corpus:
    """Stored as a job leaves it, without the parts, which nobody reads here."""
    tokens = np.random.default_rng(0).integers(1, 400, count).astype(np.int32)
    return Corpus(store, "data", one_array(pa.chunked_array([ids(count)])), tokens, count, {})


def growth(act: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes of Python and Arrow that an act left behind, those of Python at their highest, and
    what it gave."""
    pa.array(["a"])  # imports pandas, once
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        found = act()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held + pa.total_allocated_bytes() - arrow, peak, found


def test_a_plan_takes_few_bytes_an_example(tmp_path: Path) -> None:
    def plan() -> tuple[Corpus, Feed, str, DataShape]:
        corpus = corpus_of(Store(str(tmp_path)), MANY)
        feed = Feed(corpus.plan(2048), corpus.reader(torch.float32), corpus.lengths)
        shape = DataShape.of_lengths(corpus.lengths, 2048, 1024)
        return corpus, feed, plan_mark(feed.plan), shape

    held, _, (corpus, feed, *_) = growth(plan)
    assert held < MOST_BYTES * MANY
    assert len(feed.plan) > MANY / 50

    # The same as Python's own: this is what the measure is to notice.
    def objects() -> Any:
        return corpus.ids.to_pylist(), list(feed.plan), corpus.lengths.tolist()

    assert growth(objects)[0] > 2 * MOST_BYTES * MANY


def test_a_plan_of_single_examples_takes_no_more(tmp_path: Path) -> None:
    corpus = corpus_of(Store(str(tmp_path)), MANY)
    held, peak, plan = growth(lambda: corpus.plan(1))
    assert len(plan) == MANY
    assert held < 17 * MANY
    assert peak < MOST_BYTES * MANY


def test_a_stored_corpus_is_opened_in_few_bytes_an_example(tmp_path: Path) -> None:
    store = Store(str(tmp_path), lasting=False)
    count = 20_000
    shared = np.zeros(3, np.int32)

    def read() -> Corpus:
        examples = (Example(n, f"example {n:06d}", shared) for n in range(count))
        return store_corpus(store, "data", examples, "--data", dict)

    held, _, corpus = growth(read)
    assert held < MOST_BYTES * count
    held, _, again = growth(lambda: stored_corpus(store, "data"))
    assert held < MOST_BYTES * count
    assert again is not None and again.ids.equals(corpus.ids)
    assert corpus.named([3, 1, 3]).to_pylist() == [f"example 00000{n}" for n in (3, 1, 3)]
    assert np.array_equal(again.lengths, corpus.lengths) and corpus.tokens == 3 * count


def test_a_check_of_ids_takes_few_bytes_each() -> None:
    def read() -> Digests:
        seen = Digests()
        for start in range(0, MANY, 1024):
            some = [f"example {n}" for n in range(start, min(start + 1024, MANY))]
            assert seen.add(some) is None
        return seen

    held, peak, seen = growth(read)
    assert len(seen) == MANY and seen.nbytes == BYTES * MANY
    assert held < (BYTES + 1) * MANY
    assert peak < MOST_BYTES * MANY
    assert growth(lambda: {digest(f"example {n}") for n in range(MANY)})[0] > MOST_BYTES * MANY


@pytest.mark.parametrize("seed", range(20))
def test_a_repeated_text_is_found_where_it_comes_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen, known = Digests(), set[str]()
    for _ in range(50):
        some = [str(n) for n in rng.integers(0, 5000, int(rng.integers(0, 20)))]
        first = next((i for i, text in enumerate(some) if text in known or text in some[:i]), None)
        assert seen.add(some) == first
        known |= set(some)


def test_a_sample_is_of_the_smallest_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"7 {id}" for id in ids(70_000)]
    smallest = Smallest(300)
    for start in range(0, len(texts), 999):
        smallest.add(texts[start : start + 999], start)
    wanted = sorted(range(len(texts)), key=lambda n: int.from_bytes(digest(texts[n]), "big"))[:300]
    assert smallest.numbers().tolist() == sorted(wanted)


def test_marks_are_those_of_runs_of_before(tmp_path: Path) -> None:
    """Or a run that was begun would begin again."""
    plan = plan_microbatches([3, 1, 2, 9, 4, 4], 8, 4)
    whole = json.dumps([list(members) for members in plan]).encode()
    assert plan_mark(plan) == hashlib.blake2b(whole, digest_size=16).hexdigest()
    assert plan_mark([]) == hashlib.blake2b(b"[]", digest_size=16).hexdigest()
    corpus = corpus_of(Store(str(tmp_path)), 2500)
    joined = "\0".join(ids(2500)).encode()
    said = fitting._mark_of(corpus)
    assert said["examples"] == hashlib.blake2b(joined, digest_size=16).hexdigest()


def test_a_pile_keeps_few_arrays_and_every_row() -> None:
    pile, put = Pile(), np.arange(3 * 5000).reshape(-1, 3)
    for row in put:
        pile.put(row[None])
    assert len(pile._parts) < 5000 / 10
    assert np.array_equal(pile.whole(), put)
    pile.put(put[:1])
    assert np.array_equal(pile.whole(), np.concatenate([put, put[:1]]))


@pytest.mark.parametrize("seed", range(5))
def test_what_a_stage_has_seen_is_a_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen, known = Seen(), set[int]()
    seen.update(given := rng.integers(0, 300, 20).tolist())
    known.update(given)
    for m in rng.integers(0, 1000, 200).tolist():
        assert (m in seen) == (m in known)
        seen.add(m)
        known.add(m)
    assert list(seen) == sorted(known)


# Rows


@dataclass(frozen=True)
class Found:
    """Microbatches of a pass, with scores of every kind; their numbers say whose they are."""

    corpus: Corpus
    queries: int = 3
    blocks: int = 2

    def into(self, sink: ScoreRows) -> None:
        for members in self.corpus.plan(1500):
            n, q = np.array(members)[:, None], np.arange(self.queries)[None]
            scores = torch.from_numpy((n * 7919 + q * 31) % 1009 - 500.0)
            longest = int(self.corpus.lengths[list(members)].max())
            results = {
                "scores": scores,
                "self_scores": torch.from_numpy(n[:, 0] / 2.0),
                "block_scores": torch.stack([scores, -scores], dim=-1),
                "token_scores": scores[..., None] + torch.arange(longest) / 1024,
            }
            sink.take(members, results)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("all_kinds", [False, True])
def test_rows_of_scores_do_not_depend_on_how_many_are_written_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | None, all_kinds: bool
) -> None:
    corpus = corpus_of(Store(str(tmp_path)), 300)
    settings = InfluenceSettings(top_k=top_k, per_block=all_kinds, per_token=all_kinds)
    tables = {}
    for at_a_time in (7, 1 << 15):
        monkeypatch.setattr(rows, "ROWS", at_a_time)
        store = Store(str(tmp_path / str(at_a_time)), lasting=False)
        queries = [f"query {q}" for q in range(3)]
        sink = ScoreRows(store, "part-0", queries, corpus, settings, True, {"a note": "b"})
        Found(corpus).into(sink)
        own, scores = sink.commit("work/x/0000009")
        assert sink.commit("work/x/0000009") == []
        tables[at_a_time] = [pq.read_table(store.path(name)) for name in (own, scores)]
        groups = pq.ParquetFile(store.path(scores)).metadata.num_row_groups
        assert (groups > 1) == (at_a_time == 7)
    for one, other in zip(*tables.values(), strict=True):
        assert one.equals(other, check_metadata=False)
        assert one.schema.metadata[b"a note"] == b"b"
    own, scores = tables[7]
    assert own["id"].to_pylist() == ids(300)
    assert own["score"].to_pylist() == [n / 2 for n in range(300)]
    found = scores.to_pylist()
    assert len(found) == 3 * (300 if top_k is None else 10)
    for row in found:
        n, q = int(row["train_id"].split()[1]), int(row["query_id"].split()[1])
        assert row["score"] == (n * 7919 + q * 31) % 1009 - 500.0
        if all_kinds:
            assert row["block_scores"] == [row["score"], -row["score"]]
            steps = [t / 1024 for t in range(corpus.lengths[n])]
            assert row["token_scores"] == [row["score"] + step for step in steps]


def test_what_waits_for_a_commit_is_arrays(tmp_path: Path) -> None:
    count, queries = 50_000, 4
    corpus = corpus_of(Store(str(tmp_path)), count)
    store = Store(str(tmp_path / "out"), lasting=False)
    sink = ScoreRows(store, "p", list("abcd"), corpus, InfluenceSettings(), False, {})
    found = torch.zeros(16, queries, dtype=torch.float64)

    def take() -> None:
        for start in range(0, count, 16):
            sink.take(range(start, start + 16), {"scores": found.clone()})

    held, _, _ = growth(take)
    assert held < 1.5 * 8 * (queries + 1) * count
    _, peak, _ = growth(lambda: sink.commit("work/x/0000001"))
    # Two copies of the scores for a moment, and the rows that are written at a time.
    assert peak < 3 * 8 * (queries + 1) * count + 200 * rows.ROWS


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_of_examples_are_what_was_found(tmp_path: Path, drawn: bool) -> None:
    corpus = corpus_of(Store(str(tmp_path)), 40)
    sink = ExampleRows(corpus.store, corpus.lengths)
    for members in corpus.plan(900):
        n = torch.tensor(members)
        results = {"loss": n / 3}
        if drawn:
            width = int(corpus.lengths[list(members)].max())
            results["drawn"] = n[None, :, None].expand(2, len(n), width) + torch.arange(width)
        sink.take(members, results)
    (name,) = sink.commit("work/x/0000001")
    table = pq.read_table(corpus.store.path(name)).sort_by("index")
    assert sink.commit("work/x/0000001") == []
    assert table["index"].to_pylist() == list(range(40))
    assert table["loss"].to_pylist() == [float(torch.tensor(n) / 3) for n in range(40)]
    assert table["gradient_sq_norm"].null_count == table["correct"].null_count == 40
    lengths = corpus.lengths.tolist()
    if drawn:
        assert table["shape"].to_pylist() == [[2, length] for length in lengths]
        wanted = [[n + t for t in range(length)] * 2 for n, length in enumerate(lengths)]
        assert table["drawn"].to_pylist() == wanted
    else:
        assert table["drawn"].null_count == 40


def test_a_long_timeline_is_written_before_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Some:
        spans = SpanLog()

    monkeypatch.setattr(timeline, "_FULL", 5)
    store, pool = Store(str(tmp_path), lasting=False), Some()
    for m in range(8):
        pool.spans.append(Span("replica 0, stage 0", "turn", m, 1.5 * m, 1.5 * m + 1, note="x"))
        timeline.write_long_timeline(store, pool, "scores")  # type: ignore[arg-type]
    assert len(pool.spans) == 2
    timeline.write_timeline(store, pool, "scores")  # type: ignore[arg-type]
    names = store.names(timeline.DIRECTORY)
    assert len(names) == 2
    table = pa.concat_tables(pq.read_table(store.path(name)) for name in names)
    assert table["microbatch"].to_pylist() == list(range(8))
    assert [end.timestamp() for end in table["end"].to_pylist()] == [1.5 * m + 1 for m in range(8)]
    assert set(table["note"].to_pylist()) == {"x"} and set(table["phase"].to_pylist()) == {"scores"}
