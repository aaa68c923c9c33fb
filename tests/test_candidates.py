"""Candidates are scored as all are: the same numbers for fewer pairs, by fewer examples."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import save_byte_tokenizer
from networks import LLAMA, MLP
from test_scores import lists

import raycurv
from raycurv import UserError
from raycurv.data.bm25 import BM25, Matching
from raycurv.data.examples import Example
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.driver.corpus import store_corpus
from raycurv.files.store import Store
from raycurv.files.tables import read_table, write_table
from raycurv.jobs.influence.candidates import Candidates, choose_candidates
from raycurv.stages.stage import Stage

# Float64; microbatches are others, so rows are added up in another order.
SAME = 1e-12
TOKENS = "bm25:3,over=tokens"


# BM25


def dense_scores(documents: Sequence[Any], query: Sequence[Any], b: float) -> np.ndarray:
    """The formula, a term and a document at a time."""
    lengths = [len(document) for document in documents]
    mean, count = sum(lengths) / len(lengths), len(documents)
    found = np.zeros(count)
    for term in query:
        n = sum(term in document for document in documents)
        idf = math.log((count - n + 0.5) / (n + 0.5) + 1)
        for d, document in enumerate(documents):
            f = document.count(term)
            found[d] += idf * 2.5 * f / (f + 1.5 * (1 - b + b * lengths[d] / mean))
    return found


@pytest.mark.parametrize("b", [0.0, 0.75])
def test_bm25_is_the_formula(b: float) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 20, draw.integers(1, 30)).tolist() for _ in range(60)]
    queries = [draw.integers(0, 30, 12).tolist() for _ in range(4)] + [[5, 5, 7]]
    index = BM25(iter(documents), queries, b)
    for q, query in enumerate(queries):
        want = dense_scores(documents, query, b)
        assert np.abs(index.scores(q) - want).max() < 1e-12
        order = sorted(np.argsort(-want, kind="stable")[:7])
        assert index.best(q, 7).tolist() == order
    # The control: another b is another order.
    other = BM25(iter(documents), queries, 0.75 - b)
    assert any(index.best(q, 7).tolist() != other.best(q, 7).tolist() for q in range(5))


def test_bm25_finds_nothing_without_a_term_in_common() -> None:
    index = BM25(iter([["a", "b"], ["a"]]), [["c"], ["a", "c"]], 0.75)
    assert index.best(0, 2).tolist() == [] and index.best(1, 1).tolist() == [1]
    assert not index.scores(0).any()


def examples(texts: Sequence[str], folder: Path) -> list[Example]:
    save_byte_tokenizer(folder)
    ids = LazyTokenizer(folder).encode(list(texts), special=True)
    return [Example(n, f"t{n}", np.array(one, np.int32)) for n, one in enumerate(ids)]


def test_words_are_read_of_the_tokens_and_tokens_are_not_words(tmp_path: Path) -> None:
    train = ["The heap queue of Heapq", "xylophone qqq", "heaps of texts", "a HEAP!"]
    store, made = Store(str(tmp_path)), examples([*train, "the heap,"], tmp_path / "tokens")
    corpora = [
        store_corpus(store, name, (e.numbered(n) for n, e in enumerate(some)), "", dict)
        for name, some in (("queries", made[-1:]), ("train", made[:-1]))
    ]
    tokenizer = LazyTokenizer(tmp_path / "tokens")

    def found(text: str, with_: Any = tokenizer) -> list[int]:
        chosen = choose_candidates(text, *corpora, with_)
        assert chosen is not None
        return chosen.examples.tolist()

    # Two of a short text's words are worth more than the same in a long one, but for b = 0.
    assert found("bm25:2") == [0, 3] and found("bm25:1") == [0] and found("bm25:3") == [0, 3]
    bytes_ = [one.input_ids.tolist() for one in made]  # type: ignore[union-attr]
    want = np.argsort(-dense_scores(bytes_[:-1], bytes_[-1], 0.75), kind="stable")[:3]
    assert found("bm25:3,over=tokens") == sorted(want.tolist())
    with pytest.raises(UserError, match="over=tokens"):
        found("bm25:2", None)
    # Without spaces between its words a text is a single one.
    (other,) = examples(["没有空格"], tmp_path / "tokens")
    asked = store_corpus(store, "other", iter([other.numbered(0)]), "", dict)
    with pytest.raises(UserError, match=r"any of its words.*bm25:2,over=tokens\)"):
        choose_candidates("bm25:2", asked, corpora[1], tokenizer)


def test_a_table_is_a_file_of_any_format_and_ids_are_text(tmp_path: Path) -> None:
    names, ids = ("007", "7", "x"), np.arange(3, dtype=np.int32)
    some = [Example(n, name, ids) for n, name in enumerate(names)]
    corpora = [store_corpus(Store(str(tmp_path)), name, some, "", dict) for name in ("q", "n")]
    pairs = [("007", "7"), ("7", "x"), ("x", "007")]
    rows = [f'{{"query_id": "{q}", "train_id": "{n}"}}\n' for q, n in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    lines = ["train_id,query_id,why", *(f"{n},{q},so" for q, n in pairs)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    pq.write_table(table(*pairs), tmp_path / "pairs.parquet")
    for kind in ("jsonl", "csv", "parquet"):
        found = choose_candidates(str(tmp_path / f"pairs.{kind}"), *corpora, None)
        assert found is not None
        assert (found.queries.tolist(), found.examples.tolist()) == ([0, 1, 2], [1, 2, 0])


def test_the_package_that_is_missing_is_named(fits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'raycurv\[candidates\]'"):
        fits.scores(LLAMA, candidates="bm25:4,over=tokens")


# Pairs


def test_pairs_of_a_pass_are_those_that_were_asked_for() -> None:
    draw = np.random.default_rng(0)
    asked = draw.random((7, 50)) < 0.2
    candidates = Candidates(*np.nonzero(asked))
    union, pairs = candidates.of_pass(range(2, 5))
    assert union.tolist() == np.flatnonzero(asked[2:5].any(axis=0)).tolist()
    some = draw.permutation(len(union))[:6]
    place, queries = pairs.of(some)
    want = [(i, q) for i, n in enumerate(some) for q in range(3) if asked[2 + q, union[n]]]
    assert list(zip(place.tolist(), queries.tolist(), strict=True)) == want
    # Each example is scored on itself in the first pass that it takes part in, and in no other.
    assert pairs.own.tolist() == (~asked[:2, union].any(axis=0)).tolist()
    assert candidates.of(3).tolist() == np.flatnonzero(asked[3]).tolist()


# Scores

HOW: dict[str, dict[str, Any]] = {
    "at once": {},
    "stages": {"stages": 2},
    "swept": {"stages": 2, "schedule": "swept", "commit_seconds": 1e-9},
    "a query a pass": {"query_memory": 1},
    "replicas": {"replicas": 2, "batch_tokens": 20},
}
PAIRS = [
    {"query_id": query["id"], "train_id": LLAMA.data[n]["id"]}
    for q, query in enumerate(LLAMA.queries)
    for n in ((0, 3), (3,), (3, 5, 2))[q]
]


def pairs_of(scores: raycurv.Scores) -> dict[tuple[str, str], float]:
    return {(r["query_id"], r["train_id"]): r["score"] for r in scores.table().to_pylist()}


def same(got: Any, want: Any) -> bool:
    scale = max(np.abs(want[key]).max() for key in want)
    return all(np.abs(np.subtract(got[key], want[key])).max() < SAME * scale for key in got)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_candidates_score_as_in_the_full_run(fits: Any, how: dict[str, Any]) -> None:
    columns = {"per_block": True, "per_token": True, "self_influence": True}
    full = fits.scores(LLAMA, **columns)
    some = fits.run(LLAMA).influence(
        list(LLAMA.queries), list(LLAMA.data), fits.place(), quiet=True, address="none",
        rank="full", candidates=[*PAIRS, PAIRS[0]], **columns, **how,
    )  # fmt: skip
    asked = {(p["query_id"], p["train_id"]) for p in PAIRS}
    assert pairs_of(some).keys() == asked and len(some.table()) == len(asked)
    assert same(pairs_of(some), pairs_of(full))
    for column in ("block_scores", "token_scores"):
        assert same(lists(some, column), lists(full, column))
    own, every = (
        dict(zip(t["id"].to_pylist(), t["score"].to_pylist(), strict=True))
        for t in (some.self_influence(), full.self_influence())
    )
    assert sorted(own) == sorted({train for _, train in asked}) and same(own, every)
    assert len(some.self_influence()) == len(own)
    facts = some.manifest.facts["candidates"]
    assert facts == {"pairs": len(asked), "examples": len(own)}


def test_only_candidates_go_through_the_model(fits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    forward = Stage.forward

    def watched(self: Any, batch: Any, *more: Any, **named: Any) -> Any:
        seen.update(batch.ids)
        return forward(self, batch, *more, **named)

    monkeypatch.setattr(Stage, "forward", watched)
    asked = [{"id": f"query {n}", **{k: v for k, v in row.items() if k != "id"}}
             for n, row in enumerate(LLAMA.queries)]  # fmt: skip
    pairs = [{"query_id": row["id"], "train_id": LLAMA.data[4]["id"]} for row in asked]
    for candidates, want in ((pairs, {LLAMA.data[4]["id"]}), ("", {r["id"] for r in LLAMA.data})):
        seen.clear()
        fits.run(LLAMA).influence(
            asked, list(LLAMA.data), fits.place(), quiet=True, address="none",
            candidates=candidates, check_causality=False,
        )  # fmt: skip
        assert seen - {row["id"] for row in asked} == want


def test_with_top_k_the_extremes_of_the_candidates_are_kept(fits: Any) -> None:
    def made(**settings: Any) -> dict[tuple[str, str], float]:
        return pairs_of(fits.scores(LLAMA, candidates="bm25:5,over=tokens", **settings))

    everything, kept = made(), made(top_k=1)
    for query in LLAMA.queries:
        mine = {pair: s for pair, s in everything.items() if pair[0] == query["id"]}
        assert len(mine) >= 3
        want = {max(mine, key=mine.__getitem__), min(mine, key=mine.__getitem__)}
        assert {pair for pair in kept if pair[0] == query["id"]} == want


def test_what_candidates_hold_is_measured(fits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place = fits.place()

    def score(**settings: Any) -> raycurv.Scores:
        given = {"address": "none", "rank": "full", "candidates": TOKENS} | settings
        return fits.run(LLAMA).influence(list(LLAMA.queries), list(LLAMA.data), place, **given)

    first = score()
    assert "what of the influence they hold was not measured" in capsys.readouterr().err
    files = {f: f.stat().st_mtime_ns for f in (Path(place) / "scores").iterdir()}
    before = pairs_of(first)
    checked = score(candidates_check=2, query_memory=1)
    # Scores that are there are not made again.
    assert files == {f: f.stat().st_mtime_ns for f in (Path(place) / "scores").iterdir()}
    assert pairs_of(checked) == before
    said = checked.manifest.facts["candidates"]["check"]
    assert f"{said['recall']:.0%} of the 10 highest" in capsys.readouterr().err
    exact = pq.read_table(f"{place}/check").to_pylist()
    sample = sorted({row["query_id"] for row in exact})
    assert len(sample) == said["queries"] == 2 and len(exact) == 2 * len(LLAMA.data)
    full = pairs_of(fits.scores(LLAMA))
    recalls, shares = [], []
    for query in sample:
        mine = {n: s for (q, n), s in full.items() if q == query}
        held = {n for q, n in before if q == query}
        top = sorted(mine, key=lambda n: -mine[n])[:10]
        recalls.append(len(held & set(top)) / len(top))
        positive = {n: max(s, 0) for n, s in mine.items()}
        shares.append(sum(positive[n] for n in held) / sum(positive.values()))
    assert said["recall"] == pytest.approx(np.mean(recalls))
    assert said["positive"] == pytest.approx(np.mean(shares))
    # Asked for once more nothing is done, and of other queries it is measured anew.
    assert score(candidates_check=2).manifest.facts["candidates"]["check"] == said
    assert "complete:" in capsys.readouterr().err
    assert score(candidates_check=1).manifest.facts["candidates"]["check"]["queries"] == 1
    assert len(pq.read_table(f"{place}/check")) == len(LLAMA.data)


def test_absent_pairs_are_not_zero(fits: Any) -> None:
    some = fits.scores(LLAMA, candidates=TOKENS)
    query = LLAMA.queries[0]["id"]
    assert len(some.top(query, 100, text=False)) == 3
    assert f"training examples ({len(some.table())} pairs)" in repr(some)
    with pytest.raises(UserError, match=r"those of candidates: .* pairs have none"):
        some.matrix()


def test_as_many_candidates_as_examples_are_the_full_run(
    fits: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    every = fits.run(LLAMA).influence(
        list(LLAMA.queries), list(LLAMA.data), fits.place(), address="none", rank="full",
        candidates=f"bm25:{len(LLAMA.data)},over=tokens", candidates_check=1,
    )  # fmt: skip
    assert "are candidates of every query" in capsys.readouterr().err
    full = fits.scores(LLAMA)
    assert every.matrix()[1:] == full.matrix()[1:]
    assert (every.matrix()[0] == full.matrix()[0]).all()


# Mistakes


def table(*pairs: tuple[Any, Any], **names: str) -> pa.Table:
    q, n = (list(column) for column in zip(*pairs, strict=True))
    return pa.table({names.get("q", "query_id"): q, names.get("n", "train_id"): n})


ALL = [(row["id"], LLAMA.data[0]["id"]) for row in LLAMA.queries]
MISTAKES: dict[str, tuple[Any, str]] = {
    "unknown training ids": (
        table(*ALL, (ALL[0][0], "nobody"), (ALL[0][0], "none")),
        r"train_id: expected ids of --train, such as .* got 2 others: 'nobody', 'none'",
    ),
    "unknown queries": (table(*ALL, ("who", ALL[0][1])), "query_id: .* got 1 others: 'who'"),
    "a query without candidates": (table(*ALL[1:]), "none of its, and so for 1 of 3 queries"),
    "a column that is missing": (table(*ALL, q="query"), "no query_id among query, train_id"),
    "ids that are fractions": (table((0.5, 0.5)), "expected ids as text in query_id, got double"),
    "a null": (table(*ALL, (ALL[0][0], None)), "train_id"),
    "no rows": (table(*ALL).slice(0, 0), "none of its, and so for 3 of 3"),
    "no such file": ("/nowhere/pairs.parquet", "/nowhere"),
    "K of zero": ("bm25:0", "K of at least 1, got 'bm25:0'"),
    "K that is none": ("bm25:many", r"bm25:K.* got 'bm25:many'"),
    "b beyond 1": ("bm25:3,b=2", "b from 0 to 1"),
    "b that is none": ("bm25:3,b=nan", "b from 0 to 1"),
    "an option that is none": ("bm25:3,k1=2", r"got 'bm25:3,k1=2'"),
    "an option twice": ("bm25:3,b=0,b=1", "each of b and over once"),
    "other terms": ("bm25:3,over=lines", "over=words or over=tokens"),
    "no tokenizer": ("bm25:3", "expected a tokenizer, to read words"),
}


@pytest.mark.parametrize(("candidates", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(fits: Any, candidates: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fits.run(LLAMA).influence(
            list(LLAMA.queries), list(LLAMA.data), fits.place(), quiet=True, address="none",
            candidates=candidates,
        )  # fmt: skip


def test_an_index_that_memory_does_not_hold_is_refused(
    fits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    BM25([[1, 2, 2, 9], [3, 9]], [[1, 2], [3, 4]], 0.75, told.append)
    assert told == [3 * 48]  # what a document repeats is one entry
    place = "raycurv.jobs.influence.candidates"
    monkeypatch.setattr(f"{place}.memory_here", lambda: (1050, "memory"))
    monkeypatch.setattr(f"{place}.resident", lambda: 1000)

    def scored(**how: Any) -> raycurv.Scores:
        return fits.run(LLAMA).influence(
            list(LLAMA.queries), list(LLAMA.data), fits.place(), quiet=True, address="none",
            candidates=TOKENS, **how,
        )  # fmt: skip

    with pytest.raises(UserError, match=r"an index of at most 50.*rest of the memory.*--force"):
        scored()
    assert scored(force=True).table().num_rows


def test_numbers_have_no_terms(fits: Any) -> None:
    with pytest.raises(UserError, match="examples of tokens, got numbers"):
        fits.scores(MLP, candidates="bm25:2")


def test_candidates_belong_to_the_run(fits: Any) -> None:
    place = fits.place()

    def score(**settings: Any) -> None:
        fits.run(LLAMA).influence(
            list(LLAMA.queries), list(LLAMA.data), place, quiet=True, address="none", **settings
        )

    score(candidates="bm25:3,over=tokens")
    score(candidates="bm25:3,over=tokens,b=0.75")
    for other in ("bm25:4,over=tokens", "bm25:3,over=tokens,b=0", table(*ALL), ""):
        with pytest.raises(UserError, match="the candidates is another one"):
            score(candidates=other)


def test_a_run_goes_on_with_the_candidates_that_it_began_with(
    fits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fits.place()

    def score(check: int) -> raycurv.Scores:
        return fits.run(LLAMA).influence(
            list(LLAMA.queries), list(LLAMA.data), place, quiet=True, address="none",
            candidates=TOKENS, candidates_check=check,
        )  # fmt: skip

    before = score(0).table()
    monkeypatch.setattr(BM25, "best", lambda self, query, k: np.arange(k))
    assert score(1).table() == before
    pairs = Path(place) / "candidates" / "pairs.parquet"
    store = Store(place)
    for column in ("query", "example"):
        table_ = read_table(store, "candidates/pairs.parquet")
        wrong = pa.array([9] * len(table_), pa.int64())
        kept = pairs.read_bytes()
        write_table(
            store, "candidates/pairs.parquet",
            table_.set_column(table_.column_names.index(column), column, wrong),
        )  # fmt: skip
        with pytest.raises(raycurv.DamagedFile, match="pairs of queries"):
            score(2)
        pairs.write_bytes(kept)
    # The control: chosen anew they would be others.
    place = fits.place()
    assert score(0).table() != before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": "bm25:3", "train": "", "ihvp": True}, "--train"),
        ({"candidates_check": 2}, "--candidates-check"),
        ({"candidates": "bm25:3", "candidates_check": -1}, "--candidates-check"),
    ],
)
def test_flags_that_need_others_are_refused(settings: dict[str, Any], said: str) -> None:
    given = {"run": "r", "queries": "q", "train": "t", "out": "o"} | settings
    with pytest.raises(UserError, match=said):
        raycurv.InfluenceSettings(**given).check()


def test_a_default_is_spelt_in_full() -> None:
    assert Matching.parse("", "bm25:5") == Matching(5, 0.75, "words")
    assert Matching.parse("", "bm25:5,over=tokens,b=0") == Matching(5, 0.0, "tokens")
    assert Matching.parse("", "./bm25:5") is None
