"""Claims about views of scores: each equals its dense formula, and costs no pass over the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from networks import LLAMA, MLP, Case
from test_scores import dense_scores

import raycurv
from raycurv.errors import NumericalError, UserError
from raycurv.files.tables import read_table, write_table
from raycurv.mathematics.influence.normalisation import divided, roots

# float64: sums of some numbers in another order; and dense solves.
EXACT, DENSE = 1e-12, 1e-9


def alike(mine: Any, dense: Any) -> bool:
    mine, dense = np.asarray(mine), np.asarray(dense)
    return mine.shape == dense.shape and np.abs(mine - dense).max() <= EXACT * np.abs(dense).max()


def in_order(scores: Any, case: Case, normalise: Any = None) -> np.ndarray[Any, Any]:
    matrix, queries, trains = scores.matrix(normalise)
    return matrix[np.ix_([queries.index(r["id"]) for r in case.queries],
                         [trains.index(r["id"]) for r in case.data])]  # fmt: skip


def over(scores: Any, *roots: Any) -> np.ndarray[Any, Any]:
    """A dense quotient; zero where a gradient is."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(scores / np.outer(*roots))


def test_normalised_scores_are_those_of_dense_gradients(fits) -> None:
    case = MLP
    pairs, own = dense_scores(fits.truth(case), fits.run(case), case)
    pairs, root, q = pairs.sum(2).numpy(), own.sum(1).sqrt().numpy(), len(case.queries)
    scores = fits.scores(case, self_influence=True)
    cosine, relative = over(pairs, root[:q], root), over(pairs, np.ones(q), root)
    assert np.abs(in_order(scores, case, "cosine") - cosine).max() < DENSE
    assert np.abs(in_order(scores, case, "relative") - relative).max() < DENSE * relative.max()
    assert np.abs(cosine).max() <= 1 + DENSE and np.abs(np.diag(cosine) - 1).max() < DENSE
    # The controls: neither is the other, nor the plain scores.
    assert np.abs(cosine - relative / relative.max()).max() > 1e-3
    assert np.abs(cosine - pairs / np.abs(pairs).max()).max() > 1e-3


HOW: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "resident": (LLAMA, {}, {}),
    "truncated": (LLAMA, {}, {"rank": "2"}),
    "swept": (LLAMA, {}, {"stages": 2, "schedule": "swept"}),
    "replicas": (LLAMA, {}, {"replicas": 2}),
    "several passes": (LLAMA, {}, {"query_memory": "1", "ihvp": True}),
    "mfac": (MLP, {"method": "mfac", "rows": 5}, {"rank": "2"}),
    "diagonal": (MLP, {"method": "diagonal"}, {}),
}


@pytest.mark.parametrize("how", HOW)
def test_roots_are_of_self_influence_at_full_rank_however_it_is_run(fits, how: str) -> None:
    case, fit, settings = HOW[how]
    scores = fits.scores(case, fit, self_influence=True, **settings)
    own = scores.self_influence()
    found = dict(zip(own["id"].to_pylist(), own["score"].to_pylist(), strict=True))
    # Queries are examples of the data, whose self-influence another pass has found.
    root = np.sqrt([found[row["id"]] for row in case.data])
    want = over(in_order(scores, case), root[: len(case.queries)], root)
    assert np.abs(in_order(scores, case, "cosine") - want).max() < EXACT * 10


def test_scores_per_token_are_over_the_tokens_of_the_example(fits) -> None:
    scores = fits.scores(LLAMA, per_token=True)
    tokens = np.array([len(row["input_ids"]) for row in LLAMA.data])
    plain = in_order(scores, LLAMA)
    assert alike(in_order(scores, LLAMA, "per-token"), plain / tokens)
    assert len(set(tokens)) > 1
    means = {
        (row["query_id"], row["train_id"]): np.mean(row["token_scores"])
        for row in scores.table().to_pylist()
    }
    want = [[means[a["id"], b["id"]] for b in LLAMA.data] for a in LLAMA.queries]
    assert np.abs(in_order(scores, LLAMA, "per-token") - want).max() < 1e-9 * np.abs(want).max()


def test_top_orders_by_what_is_asked_for(fits) -> None:
    scores = fits.scores(LLAMA, {}, self_influence=True)
    query, plain = LLAMA.queries[1]["id"], in_order(scores, LLAMA)[1]
    cosine = in_order(scores, LLAMA, "cosine")[1]
    top = scores.top(query, 4, "cosine", text=False)
    order = np.argsort(-cosine)[:4]
    assert top["train_id"].to_pylist() == [LLAMA.data[n]["id"] for n in order]
    assert alike(top["normalised"], cosine[order]) and alike(top["score"], plain[order])
    assert list(np.argsort(-cosine)) != list(np.argsort(-plain))
    assert scores.top(query, 4, text=False)["train_id"].to_pylist() == [
        LLAMA.data[n]["id"] for n in np.argsort(-plain)[:4]
    ]


@pytest.mark.parametrize("normalise", [None, "cosine"])
def test_groups_are_sums_and_means_of_the_matrix(fits, normalise: Any) -> None:
    labelled = [
        row | {"domain": f"d{n % 3}", "year": 2000 + n % 2} for n, row in enumerate(MLP.data)
    ]
    scores = fits.run(MLP).influence(
        labelled[:3], labelled, fits.place(), rank="full", address="none", quiet=True,
        self_influence=True,
    )  # fmt: skip
    matrix = in_order(scores, MLP, normalise)
    for column, of in (("domain", "train"), ("year", "queries")):
        side = labelled if of == "train" else labelled[:3]
        names = sorted({row[column] for row in side})
        onehot = np.array([[row[column] == name for name in names] for row in side], float)
        sums = matrix @ onehot if of == "train" else (onehot.T @ matrix).T
        found = scores.by(column, of, normalise)
        other = "query_id" if of == "train" else "train_id"
        assert found.column_names == [other, "group", "count", "sum", "mean"]
        rows = {(r[other], r["group"]): r for r in found.to_pylist()}
        for x, one in enumerate(labelled[:3] if of == "train" else labelled):
            mine = [rows[one["id"], name] for name in names]
            assert alike([r["sum"] for r in mine], sums[x])
            assert alike([r["mean"] for r in mine], sums[x] / onehot.sum(0))
            assert [r["count"] for r in mine] == onehot.sum(0).tolist()
    by_hand = {row["id"]: row["domain"] for row in labelled}
    assert scores.by(by_hand).equals(scores.by("domain"))
    # The control: other groups, other sums.
    other = by_hand | {labelled[0]["id"]: "d1"}
    assert not scores.by(other).equals(scores.by("domain"))
    for wrong, said in (
        (
            "source",
            r"a column `source`, got the columns `domain`, `id`, `inputs`, `labels`, `year`",
        ),
        ("inputs", "values that make groups"),
        ({MLP.data[0]["id"]: 1}, f"got none of .* and {len(MLP.data) - 2} more"),
        (by_hand | {labelled[1]["id"]: None}, f"got None of '{labelled[1]['id']}'"),
    ):
        with pytest.raises(UserError, match=said):
            scores.by(wrong)


def test_a_contrast_is_the_difference_of_means(fits) -> None:
    scores = fits.scores(MLP, {}, self_influence=True)
    a, b = [MLP.queries[0]["id"]], [row["id"] for row in MLP.queries[1:]]
    for normalise in (None, "cosine"):
        matrix = in_order(scores, MLP, normalise)
        want = matrix[:1].mean(0) - matrix[1:].mean(0)
        found = scores.contrast(a, b, normalise=normalise)
        order = np.argsort(-want)
        assert found["train_id"].to_pylist() == [MLP.data[n]["id"] for n in order]
        assert alike(found["score"], want[order]) and alike(found["a"], matrix[0, order])
        turned = scores.contrast(b, a, 2, normalise)
        assert turned["train_id"].to_pylist() == [MLP.data[n]["id"] for n in order[:-3:-1]]
    assert scores.contrast(a[0], b).equals(scores.contrast(a, b))
    for wrong, said in (([], "got none"), (a * 2, "got one twice"), (["nobody"], "no such id")):
        with pytest.raises(UserError, match=said):
            scores.contrast(wrong, b)


def test_views_of_what_was_not_kept_say_how_to_keep_it(fits) -> None:
    plain = fits.scores(MLP)
    for normalise in ("cosine", "relative"):
        with pytest.raises(UserError, match="Score again with --self"):
            plain.matrix(normalise)
    for view in (lambda: plain.by("x", of="trian"), lambda: plain.data("test")):
        with pytest.raises(UserError, match="expected train or queries"):
            view()
    with pytest.raises(UserError, match="several tokens, to divide by, got one of each"):
        plain.matrix("per-token")
    with pytest.raises(UserError, match="one of cosine, relative, per-token"):
        plain.top(MLP.queries[0]["id"], normalise="length")
    some, id = fits.scores(MLP, top_k=2, self_influence=True), MLP.queries[0]["id"]
    # What follows the highest that were kept is the lowest: no third.
    assert some.top(id, 3, text=False).equals(plain.top(id, 2, text=False))
    assert some.top(id, 3, text=False)["train_id"] != plain.top(id, 3, text=False)["train_id"]
    for view in (lambda: plain.top(id, -1), lambda: plain.contrast(id, MLP.queries[1]["id"], -1)):
        with pytest.raises(UserError, match="a number of rows, got -1"):
            view()
    for view in (
        lambda: some.top(id, 2, "cosine"),
        lambda: some.by({row["id"]: 1 for row in MLP.data}),
        lambda: some.contrast(id, MLP.queries[1]["id"]),
    ):
        with pytest.raises(UserError, match="without --top-k into another directory"):
            view()
    # Of a version that kept no tokens.
    before = raycurv.open_scores(plain.path)
    files = before.manifest.facts["files"]
    before.manifest.facts["files"] = {
        span: {n: size for n, size in sizes.items() if not n.startswith("tables/")}
        for span, sizes in files.items()
    }
    with pytest.raises(UserError, match="tables/train, got scores of a version"):
        before.matrix("per-token")
    assert (before.matrix()[0] == plain.matrix()[0]).all()


def test_a_view_of_a_table_that_lacks_an_example_is_refused(fits) -> None:
    scores = fits.run(MLP).influence(
        list(MLP.queries), list(MLP.data), fits.place(), address="none", quiet=True
    )
    (name,) = (n for n in next(iter(scores.manifest.facts["files"].values())) if "train/" in n)
    write_table(scores._store, name, read_table(scores._store, name).slice(1))
    with pytest.raises(raycurv.DamagedFile, match="`tokens` of every example"):
        scores.matrix("per-token")


def test_zeros_stay_zeros_and_nothing_else_is_over_zero() -> None:
    scores, own = np.array([[0.0, 2.0], [0.0, -1.0]]), np.array([0.0, 4.0])
    assert (divided(scores, np.array([1.0, 2.0]), own) == [[0, 0.5], [0, -0.125]]).all()
    with pytest.raises(NumericalError, match="above zero"):
        divided(scores + 1, None, own)
    with pytest.raises(NumericalError, match=r"below zero, got -0\.1"):
        roots(np.array([1.0, -0.1]))


# What a notebook shows


def test_results_say_what_they_are_in_a_line_and_as_html_that_stays_text(fits, tmp_path) -> None:
    mean = "<script>alert(1)</script> & more"
    folder = tmp_path / mean.replace("/", "")
    run = raycurv.fit(
        MLP.network, list(MLP.data), folder / "run", objective="classification", address="none",
        quiet=True,
    )  # fmt: skip
    scores = run.influence(
        list(MLP.queries), list(MLP.data), folder / "scores", self_influence=True, top_k=2,
        address="none", quiet=True,
    )  # fmt: skip
    evaluation = raycurv.evaluate(
        MLP.network, list(MLP.data), folder / "loss", objective="classification",
        address="none", quiet=True,
    )  # fmt: skip
    pruned = run.prune(folder / "pruned", sparsity=0.5, address="none", quiet=True)
    data = list(MLP.data)
    planned = raycurv.plan(MLP.network, data, objective="classification", memory="1MB")
    for result, said in (
        (run, "9 examples"),
        (scores, "3 queries x 9 training examples, rank 32, damping 0.1>"),
        (evaluation, f"loss {evaluation.loss:.6g}"),
        (pruned, "50.0% of the weights gone"),
        (planned, "<raycurv plan: does not fit, "),
    ):
        line, page = repr(result), result._repr_html_()
        assert said in line and "\n" not in line and line.startswith("<raycurv ")
        assert "<script>" not in page and len(page) < 4000
        assert page.count("<tr>") == page.count("</tr>") > 2
        if result is not planned:
            assert "&lt;script&gt;alert(1)" in page and "&amp; more" in page
    assert "--top-k 2, --self" in scores._repr_html_()
    assert not planned.fits and planned.details["short"]
