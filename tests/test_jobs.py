"""Claims about the jobs as a person runs them: commands in, Parquet and safetensors out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import classified, flags_of, run, run_here, save_llama, texts, write_rows
from safetensors import safe_open

import raycurv

torch.set_num_threads(1)

COUNT, ASKED = 24, 5
# float32 scores of one fit, whose queries share passes in another way: only rounding differs.
CLOSE_32 = 1e-5
CLOSE_64 = 1e-10


class Made:
    """What the two jobs made: their folders, and what they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_llama(folder / "model", layers=2)
        self.train = write_rows(folder / "data" / "train.parquet", texts(COUNT))
        self.queries = write_rows(folder / "queries.parquet", texts(ASKED, seed=3))
        self.run = folder / "run"
        self.scores = folder / "scores"
        self.fit_flags = {
            "model": self.model,
            "data": folder / "data",
            "out": self.run,
            "address": "none",
            "stages": 2,
            "batch_tokens": 128,
        }
        self.influence_flags = {
            "run": self.run,
            "queries": self.queries,
            "train": folder / "data",
            "out": self.scores,
            "address": "none",
            "rank": "full",
            "batch_tokens": 128,
        }

    def fit(self, out: str, /, **settings: Any) -> raycurv.Run:
        """Another fit, in this process."""
        chosen = self.fit_flags | {"out": self.folder / out} | settings
        outcome = run_here("fit.py", flags_of(chosen))
        assert outcome.code == 0, outcome.err
        return raycurv.open(self.folder / out)

    def influence(self, out: str, /, **settings: Any) -> Path:
        """Other scores, in this process; gives their folder."""
        chosen = self.influence_flags | {"out": self.folder / out} | settings
        outcome = run_here("influence.py", flags_of(chosen))
        assert outcome.code == 0, outcome.err
        return self.folder / out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A fit and scores, each by a command of its own."""
    found = Made(tmp_path_factory.mktemp("jobs"))
    fitted = run("fit.py", flags_of(found.fit_flags))
    assert fitted.code == 0, fitted.err
    found.fit_out = fitted.out
    scored = run(
        "influence.py",
        flags_of(found.influence_flags | {"per_block": True, "per_token": True, "self": True}),
    )
    assert scored.code == 0, scored.err
    found.influence_out = scored.out
    return found


@pytest.fixture(scope="module")
def double(made: Made) -> raycurv.Run:
    return made.fit("double", dtype="float64")


def relative(mine: Any, reference: Any) -> float:
    a, b = np.asarray(mine, float), np.asarray(reference, float)
    return float(np.abs(a - b).max() / np.abs(b).max())


def matrix(folder: Path) -> np.ndarray[Any, Any]:
    return raycurv.open_scores(folder).matrix()[0]


def parquet(folder: Path) -> pa.Table:
    """All Parquet files of a folder, read by pyarrow alone."""
    return pq.read_table(folder)


# What is printed


def test_the_last_line_of_output_is_json(made: Made) -> None:
    for out, job, folder in (
        (made.fit_out, "fit.py", made.run),
        (made.influence_out, "influence.py", made.scores),
    ):
        said = json.loads(out.splitlines()[-1])
        phases = said.pop("phases")
        assert said == {"status": "complete", "job": job, "out": str(folder)}
        assert "loading" in phases and all(seconds >= 0 for seconds in phases.values())


HELP = {
    "fit.py": {
        "--model": "", "--data": "", "--out": "", "--method": "ekfac", "--fisher": "None",
        "--draws": "1", "--objective": "None", "--blocks": "", "--max-factor-dim": "None",
        "--max-examples": "None", "--max-length": "None", "--long": "error", "--seed": "0",
        "--dtype": "float32", "--store-dtype": "None", "--logits-chunk": "16777216",
        "--stages": "None", "--schedule": "pipelined", "--homes": "1", "--spool-dir": "None",
        "--batch-tokens": "4096", "--address": "None",
        "--keep-sums": "",
    },
    "influence.py": {
        "--run": "", "--queries": "", "--train": "", "--out": "", "--damping": "None",
        "--objective": "None",
        "--rank": "32", "--query-memory": "2GiB", "--top-k": "None", "--per-block": "",
        "--per-token": "", "--self": "", "--ihvp": "", "--seed": "0", "--max-examples": "None",
        "--max-length": "None", "--long": "error", "--dtype": "None", "--logits-chunk": "16777216",
        "--stages": "None", "--schedule": "pipelined", "--homes": "1", "--spool-dir": "None",
        "--batch-tokens": "4096", "--address": "None",
    },
    "evaluate.py": {
        "--model": "", "--data": "", "--out": "", "--objective": "None",
        "--max-examples": "None", "--seed": "0", "--dtype": "float32", "--max-length": "None",
        "--long": "error", "--stages": "None", "--schedule": "pipelined", "--batch-tokens": "4096",
    },
    "spectrum.py": {
        "--run": "", "--model": "", "--data": "", "--out": "", "--matrix": "ggn", "--blocks": "",
        "--traces": "xtrace", "--probes": "8", "--steps": "16", "--columns": "4", "--pairs": "5",
        "--at-once": "8", "--direction": "", "--diagonal": "", "--eigenvectors": "",
    },
    "prune.py": {
        "--run": "", "--out": "", "--sparsity": "None", "--structure": "unstructured",
        "--saliency": "obs", "--scope": "global", "--no-update": "", "--damping": "0.1",
        "--inverse": "None", "--first-order": "", "--steps": "1", "--blocks": "",
        "--tolerance": "0.0001", "--iterations": "300", "--measure": "total",
        "--measure-examples": "512", "--seed": "0", "--stages": "None",
        "--schedule": "pipelined", "--batch-tokens": "4096", "--address": "None",
    },
}  # fmt: skip


@pytest.mark.parametrize("job", HELP)
def test_help_explains_every_flag_with_its_default(
    job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run_here(job, ["--help"])
    assert outcome.code == 0
    entries = outcome.out.replace("│", " ").split("\n")
    for flag, default in HELP[job].items():
        (at,) = (i for i, line in enumerate(entries) if flag in line.strip().split(" ")[0:1])
        entry = entries[at]
        for line in entries[at + 1 :]:
            if line.strip().startswith(("--", "╰")):
                break
            entry += " " + line.strip()
        words = entry.replace(flag, "", 1)
        assert len(words.split()) > 4, flag
        if default:
            assert f"(default: {default})" in entry, flag


# Tables and files

NUMBER = pa.float32()
BLOCKS = {
    "block": pa.string(), "module": pa.string(), "stage": pa.int32(), "input_factor": pa.string(),
    "input_tiles": pa.list_(pa.int32()), "output_tiles": pa.list_(pa.int32()), "d_in": pa.int32(),
    "d_out": pa.int32(), "bias": pa.bool_(), "tokens": pa.int64(), "examples": pa.int64(),
    "trace": pa.float64(), "mean_eigenvalue": pa.float64(), "input_effective_rank": pa.float64(),
    "output_effective_rank": pa.float64(), "eigh_outcome": pa.string(),
    "eigh_seconds": pa.float64(), "thin": pa.bool_(),
}  # fmt: skip
SPECTRUM = {
    "factor": pa.string(), "block": pa.string(), "tile": pa.int32(), "side": pa.string(),
    "index": pa.int32(), "eigenvalue": pa.float64(), "tile_start": pa.int32(),
    "tile_stop": pa.int32(),
}  # fmt: skip


def examples_columns(number: pa.DataType) -> dict[str, pa.DataType]:
    return {"id": pa.string(), "tokens": pa.int32(), "loss": number, "gradient_sq_norm": number}


def columns(table: pa.Table) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in table.schema}


def test_tables_have_the_columns_of_the_contract_in_order(made: Made, double: raycurv.Run) -> None:
    for folder, number in ((made.run, pa.float32()), (Path(double.path), pa.float64())):
        for name, expected in (
            ("blocks", BLOCKS),
            ("spectrum", SPECTRUM),
            ("examples", examples_columns(number)),
        ):
            assert list(columns(parquet(folder / "tables" / name)).items()) == list(
                expected.items()
            )
    scores = {"query_id": pa.string(), "train_id": pa.string(), "score": NUMBER}
    lists = {"block_scores": pa.list_(NUMBER), "token_scores": pa.list_(NUMBER)}
    assert columns(parquet(made.scores / "scores")) == scores | lists
    assert columns(parquet(made.scores / "self")) == {"id": pa.string(), "score": NUMBER}
    wide = made.influence("double-scores", run=double.path)
    assert columns(parquet(wide / "scores")) == scores | {"score": pa.float64()}


def test_footers_carry_the_version_and_the_settings(made: Made) -> None:
    folders = [made.run / "tables" / name for name in ("blocks", "spectrum", "examples")]
    for folder in (*folders, made.scores / "scores", made.scores / "self"):
        files = sorted(folder.glob("*.parquet"))
        assert files
        for file in files:
            footer = pq.read_schema(file).metadata
            assert footer[b"raycurv.schema"] == b"1"
            said = json.loads(footer[b"raycurv.run"])
            if folder in folders:
                assert (said["method"], said["seed"], said["model"]) == (
                    "ekfac",
                    0,
                    str(made.model),
                )
            else:
                assert (said["rank"], said["damping"], said["fit"]) == (
                    "full",
                    "0.1",
                    str(made.run),
                )


def test_tables_say_what_was_fitted(made: Made) -> None:
    blocks = parquet(made.run / "tables" / "blocks").to_pylist()
    names = [row["block"] for row in blocks]
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    assert {row["stage"] for row in blocks} == {0, 1}
    inputs = {row["block"].rpartition(".")[2]: row["input_factor"] for row in blocks[:7]}
    assert inputs["q_proj"] == inputs["k_proj"] == inputs["v_proj"] != inputs["o_proj"]
    assert inputs["gate_proj"] == inputs["up_proj"] != inputs["down_proj"]
    examples = parquet(made.run / "tables" / "examples").to_pydict()
    assert examples["id"] == [f"text {n}" for n in range(COUNT)]
    assert examples["tokens"] == [len(row["text"]) for row in texts(COUNT)]
    assert {row["tokens"] for row in blocks} == {sum(examples["tokens"])}
    assert {row["examples"] for row in blocks} == {COUNT}
    # The mean squared norm is the sum of the traces, whatever the basis.
    traces = sum(row["trace"] for row in blocks)
    assert abs(np.mean(examples["gradient_sq_norm"]) - traces) < 1e-5 * traces
    spectrum = parquet(made.run / "tables" / "spectrum").to_pandas()
    assert len(spectrum) == sum(
        row["d_out"] + (row["d_in"] if row["input_factor"] == f"{row['block']}.input" else 0)
        for row in blocks
    )
    for _, rows in spectrum.groupby("factor"):
        assert list(rows["index"]) == list(range(len(rows)))
        assert rows["eigenvalue"].is_monotonic_decreasing and rows["eigenvalue"].min() >= 0


def test_the_run_directory_is_laid_out_as_the_contract_says(made: Made) -> None:
    assert {path.name for path in made.run.iterdir()} == {
        "run.json", "blocks.json", "data", "eigen", "corrected", "tables",
    }  # fmt: skip
    said = json.loads((made.run / "run.json").read_text())
    assert {"schema", "job", "settings", "fingerprints", "complete", "versions"} <= said.keys()
    assert "tables" in said["complete"]
    assert said["fingerprints"]["model"].keys() >= {"lm_head.weight", "model.norm.weight"}
    blocks = parquet(made.run / "tables" / "blocks")
    for row in blocks.to_pylist():
        with safe_open(made.run / "corrected" / f"{row['block']}.safetensors", "pt") as file:
            lam = file.get_tensor("lam")
            assert set(file.keys()) == {"lam", "examples"}
            assert lam.shape == (row["d_out"], row["d_in"]) and lam.dtype == torch.float32
            assert abs(float(lam.double().sum()) - row["trace"]) < 1e-5 * row["trace"]
        with safe_open(made.run / "eigen" / f"{row['block']}.output.safetensors", "pt") as file:
            assert set(file.keys()) == {"eigenvectors", "eigenvalues"}
            q = file.get_tensor("eigenvectors").double()
            assert (q.T @ q - torch.eye(row["d_out"])).abs().max() < 1e-5
    assert {path.name for path in made.scores.iterdir()} == {
        "run.json", "scores", "self", "tables",
    }  # fmt: skip


def test_duckdb_and_pandas_read_the_tables_as_pyarrow_does(made: Made) -> None:
    for folder in (made.run / "tables" / "blocks", made.run / "tables" / "examples",
                   made.run / "tables" / "spectrum", made.scores / "scores"):  # fmt: skip
        table = parquet(folder)
        ((count,),) = duckdb.sql(f"select count(*) from '{folder}/*.parquet'").fetchall()
        assert count == table.num_rows > 0
        frame = pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))])
        assert list(frame.columns) == table.column_names and len(frame) == table.num_rows
    best = duckdb.sql(
        f"select train_id from '{made.scores}/scores/*.parquet' where query_id = 'text 1' "
        "order by score desc limit 3"
    ).fetchall()
    top = raycurv.open_scores(made.scores).top("text 1", 3)
    assert [name for (name,) in best] == top["train_id"].to_pylist()


# Scores and what else may be asked for


def test_every_query_has_a_score_of_every_training_example(made: Made) -> None:
    scores, queries, train = raycurv.open_scores(made.scores).matrix()
    assert scores.shape == (ASKED, COUNT) and np.isfinite(scores).all() and scores.any()
    assert queries == [f"text {n}" for n in range(ASKED)]
    assert sorted(train) == sorted(f"text {n}" for n in range(COUNT))
    assert parquet(made.scores / "scores").num_rows == ASKED * COUNT


def test_scores_are_the_sums_of_their_blocks_and_of_their_tokens(made: Made) -> None:
    table = parquet(made.scores / "scores")
    lengths = {row["id"]: len(row["text"]) for row in texts(COUNT)}
    scale = max(abs(score) for score in table["score"].to_pylist())
    for row in table.to_pylist():
        assert len(row["block_scores"]) == 14
        assert len(row["token_scores"]) == lengths[row["train_id"]]
        assert abs(sum(row["block_scores"]) - row["score"]) < CLOSE_32 * scale
        assert abs(sum(row["token_scores"]) - row["score"]) < CLOSE_32 * scale


def test_block_scores_stand_in_the_order_of_the_footer(made: Made) -> None:
    names = json.loads(
        pq.read_schema(next((made.scores / "scores").glob("*.parquet"))).metadata[b"raycurv.blocks"]
    )
    products = made.influence("products", ihvp=True, train=None)
    with safe_open(products / "ihvp" / f"{names[9]}.safetensors", "pt") as file:
        (query,) = file.get_tensor("full")[:1].double()
    # One block's score is its IHVP times its gradient: only the right one gives the fit's own.
    only = made.fit("one-block", blocks=[names[9]])
    alone = made.influence("one-block-scores", run=only.path)
    with safe_open(
        made.influence("one-product", run=only.path, ihvp=True, train=None)
        / "ihvp" / f"{names[9]}.safetensors", "pt",
    ) as file:  # fmt: skip
        (same,) = file.get_tensor("full")[:1].double()
    assert relative(query, same) < 1e-3
    table = parquet(made.scores / "scores")
    listed = {(row["query_id"], row["train_id"]): row["block_scores"] for row in table.to_pylist()}
    rows = parquet(alone / "scores").to_pylist()
    expected = [row["score"] for row in rows]
    got = [listed[row["query_id"], row["train_id"]] for row in rows]
    assert relative([blocks[9] for blocks in got], expected) < 1e-3
    assert relative([blocks[8] for blocks in got], expected) > 1e-2


def test_an_example_scores_itself_as_a_query_would(made: Made) -> None:
    own = parquet(made.scores / "self").to_pydict()
    folder = made.influence("train-on-train", queries=made.train)
    scores, queries, train = raycurv.open_scores(folder).matrix()
    expected = {q: scores[i, train.index(q)] for i, q in enumerate(queries)}
    assert sorted(own["id"]) == sorted(expected)
    assert relative(own["score"], [expected[name] for name in own["id"]]) < CLOSE_32
    assert min(own["score"]) > 0


@pytest.mark.parametrize("memory", [1, "100KB"])
def test_queries_in_several_passes_score_as_in_one(
    memory: Any, made: Made, double: raycurv.Run
) -> None:
    one = made.influence(f"one-pass-{memory}", run=double.path, self=True, ihvp=True)
    more = made.influence(
        f"passes-{memory}", run=double.path, query_memory=memory, self=True, ihvp=True
    )
    passes = {file.name.rpartition("-")[0] for file in (more / "scores").iterdir()}
    assert len(passes) == (ASKED if memory == 1 else 2), passes
    assert raycurv.open_scores(more).matrix()[1:] == raycurv.open_scores(one).matrix()[1:]
    assert relative(matrix(more), matrix(one)) < CLOSE_64
    assert parquet(more / "self").num_rows == COUNT
    for file in (one / "ihvp").iterdir():
        with safe_open(file, "pt") as a, safe_open(more / "ihvp" / file.name, "pt") as b:
            assert a.metadata()["queries"] == b.metadata()["queries"]
            assert relative(b.get_tensor("full"), a.get_tensor("full")) < CLOSE_64


def test_only_the_extremes_are_kept_of_each_query(made: Made) -> None:
    kept = parquet(made.influence("top", top_k=3, query_memory=1) / "scores").to_pandas()
    scores, queries, train = raycurv.open_scores(made.scores).matrix()
    assert len(kept) == ASKED * 6
    for i, query in enumerate(queries):
        order = np.argsort(-scores[i], kind="stable")
        expected = [train[n] for n in (*order[:3], *order[-3:])]
        assert list(kept[kept["query_id"] == query]["train_id"]) == expected
    everything = parquet(made.influence("top-all", top_k=COUNT) / "scores")
    assert everything.num_rows == ASKED * COUNT


def test_products_are_files_with_their_queries_and_shapes(made: Made) -> None:
    folder = made.influence("ranked", ihvp=True, rank=2)
    assert not (folder / "work").exists()
    full = made.influence("unranked", ihvp=True)
    for row in parquet(made.run / "tables" / "blocks").to_pylist():
        out, width = row["d_out"], row["d_in"]
        with safe_open(folder / "ihvp" / f"{row['block']}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["queries"]) == [f"text {n}" for n in range(ASKED)]
            assert set(file.keys()) == {"left", "right"}
            left, right = file.get_tensor("left"), file.get_tensor("right")
        assert left.shape == (ASKED, 2, out) and right.shape == (ASKED, 2, width)
        with safe_open(full / "ihvp" / f"{row['block']}.safetensors", "pt") as file:
            assert set(file.keys()) == {"full"}
            whole = file.get_tensor("full").double()
        assert whole.shape == (ASKED, out, width)
        # The best that rank 2 can do, but for what the randomised SVD loses.
        best = torch.linalg.svdvals(whole)[:, 2:].square().sum(dim=1).sqrt()
        lost = (left.double().transpose(1, 2) @ right.double() - whole).flatten(1).norm(dim=1)
        assert (lost <= 1.01 * best + 1e-6 * whole.flatten(1).norm(dim=1)).all()


def test_curvature_of_a_block_makes_the_products_that_the_job_writes(
    made: Made, double: raycurv.Run
) -> None:
    name = "model.layers.1.mlp.down_proj"
    products = double.ihvp(
        made.queries, made.folder / "by-python", rank="full", address="none", quiet=True
    )
    got, queries = products.block(name)
    assert queries == [f"text {n}" for n in range(ASKED)]
    flat = double.ihvp(
        made.queries, made.folder / "flat", rank="full", damping="abs:1e12", address="none",
        quiet=True,
    )  # fmt: skip
    # Under an overwhelming damping the product is the gradient over that damping.
    gradients = flat.block(name)[0] * 1e12
    block = double.curvature(name)
    lam = 0.1 * block.eigenvalues.mean()
    expected = torch.stack([block.apply(g, lambda e: 1 / (e + lam)) for g in gradients])
    assert relative(got, expected) < 1e-6
    dense = block.dense()
    assert dense.shape == (16 * 24, 16 * 24)
    assert relative(dense, dense.T) < CLOSE_64
    torch.testing.assert_close(torch.trace(dense), block.eigenvalues.sum())


def test_a_sample_is_the_same_for_a_seed_and_another_for_another(made: Made) -> None:
    def ids(name: str, **settings: Any) -> list[str]:
        found: list[str] = made.fit(name, max_examples=6, **settings).examples()["id"].to_pylist()
        return found

    first = ids("sample")
    assert len(set(first)) == 6 and first == ids("sample-again", batch_tokens=20)
    assert first != ids("sample-other", seed=1)
    assert set(first) != {row["id"] for row in texts(COUNT)[:6]}


def test_a_sample_of_training_examples_is_seeded_and_not_the_first(made: Made) -> None:
    def scored(name: str, **settings: Any) -> tuple[np.ndarray[Any, Any], list[str]]:
        found, _, ids = raycurv.open_scores(
            made.influence(name, max_examples=7, **settings)
        ).matrix()
        return found, ids

    (scores, ids), (again, others) = scored("some"), scored("again", batch_tokens=20)
    assert scores.shape == (ASKED, 7) and len(set(ids)) == 7
    assert set(ids) == set(others) != {row["id"] for row in texts(COUNT)[:7]}
    assert relative(again[:, [others.index(id) for id in ids]], scores) < CLOSE_32
    assert set(scored("other", seed=1)[1]) != set(ids)
    # Scores are those that the same examples have among all.
    whole, _, every = raycurv.open_scores(made.scores).matrix()
    assert relative(scores, whole[:, [every.index(id) for id in ids]]) < CLOSE_32


@pytest.mark.parametrize("long", ["truncate", "split"])
def test_long_examples_are_cut_as_asked(long: str, made: Made) -> None:
    fitted = made.fit(f"long-{long}", max_length=10, long=long)
    found = dict(
        zip(*(fitted.examples()[name].to_pylist() for name in ("id", "tokens")), strict=True)
    )
    for row in texts(COUNT):
        length = len(row["text"])
        if length <= 10:
            assert found.pop(row["id"]) == length
        elif long == "truncate":
            assert found.pop(row["id"]) == 10
        else:
            for k, begin in enumerate(range(0, length, 10)):
                assert found.pop(f"{row['id']}#{k}") == min(10, length - begin)
    assert not found


METHODS = {
    "kfac": {"eigen"},
    "diagonal": {"corrected"},
    "identity": set(),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_end_to_end(method: str, made: Made) -> None:
    fitted = made.fit(method, method=method)
    there = {path.name for path in Path(fitted.path).iterdir()}
    assert there & {"eigen", "corrected", "factors"} == METHODS[method]
    blocks = fitted.blocks()
    assert columns(blocks) == BLOCKS and blocks.num_rows == 14
    assert bool(fitted.spectrum().num_rows) == (method == "kfac")
    norms = fitted.examples()["gradient_sq_norm"]
    assert norms.null_count == (0 if method == "diagonal" else COUNT)
    assert fitted.examples()["loss"].null_count == 0
    scores = matrix(made.influence(f"{method}-scores", run=fitted.path, self=True))
    assert np.isfinite(scores).all()
    assert relative(scores, matrix(made.scores)) > 1e-2
    if method == "identity":
        assert blocks["trace"].null_count == 14
        other = made.influence("identity-damped", run=fitted.path, damping="0.7")
        assert relative(matrix(other), scores) < CLOSE_32
    else:
        assert blocks["trace"].null_count == 0 and min(blocks["trace"].to_pylist()) > 0


def test_kfac_and_ekfac_speak_one_scale(made: Made) -> None:
    ekfac, kfac = (
        sum(raycurv.open(made.folder / name).blocks()["trace"].to_pylist())
        for name in ("run", "kfac-scale")
        if name == "run" or made.fit(name, method="kfac")
    )
    assert 0.2 < kfac / ekfac < 5


def test_sums_are_kept_when_asked_for(made: Made) -> None:
    kept = Path(made.fit("sums", keep_sums=True).path)
    for file in (kept / "eigen").iterdir():
        with safe_open(kept / "factors" / file.name, "pt") as sums, safe_open(file, "pt") as eigen:
            mean = sums.get_tensor("sum").double() / sums.get_tensor("count")
            trace, values = torch.trace(mean), eigen.get_tensor("eigenvalues").double()
            assert abs(trace - values.sum()) < 1e-5 * trace
    assert len(list((kept / "factors").iterdir())) == len(list((kept / "eigen").iterdir()))


def test_what_python_opens_is_what_the_job_made(made: Made) -> None:
    fitted = raycurv.open(made.run)
    assert fitted.blocks().equals(parquet(made.run / "tables" / "blocks"))
    assert fitted.block_names() == fitted.blocks()["block"].to_pylist()
    assert "ekfac" in repr(fitted) and str(COUNT) in repr(fitted)
    scores = raycurv.open_scores(made.scores)
    values, queries, train = scores.matrix()
    top = scores.top("text 2", 4)
    place = queries.index("text 2")
    order = np.argsort(-values[place])[:4]
    assert top["train_id"].to_pylist() == [train[n] for n in order]
    assert scores.self_influence().num_rows == COUNT


def test_a_directory_and_its_model_may_be_read_from_another_place(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(made.folder)
    fitted = made.fit("relative", model="model", data="data", out="relative")
    assert fitted.path == str(made.folder / "relative")
    monkeypatch.chdir(tmp_path)
    made.influence("relative-scores", run=fitted.path)


def test_a_uri_holds_a_run_as_a_path_does(made: Made) -> None:
    flags = made.fit_flags | {"out": f"file://{made.folder}/uri"}
    assert run_here("fit.py", flags_of(flags)).code == 0
    blocks = raycurv.open(f"file://{made.folder}/uri").blocks().drop(["eigh_seconds"])
    assert blocks.equals(raycurv.open(made.run).blocks().drop(["eigh_seconds"]))


def test_blocks_chosen_by_globs_are_the_ones_fitted(made: Made) -> None:
    fitted = made.fit("globs", blocks=["*.mlp.*", "!*.1.*"])
    assert fitted.block_names() == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]


def test_wide_factors_are_cut_into_tiles_that_the_tables_show(made: Made) -> None:
    fitted = made.fit("tiles", max_factor_dim=10)
    for row in fitted.blocks().to_pylist():
        assert sum(row["input_tiles"]) == row["d_in"] and max(row["input_tiles"]) <= 10
        assert sum(row["output_tiles"]) == row["d_out"] and max(row["output_tiles"]) <= 10
    rows = fitted.spectrum().to_pylist()
    held = {(row["tile"], row["tile_start"], row["tile_stop"]) for row in rows}
    # Axes of 24, 16 and 8.
    assert held == {(0, 0, 8), (1, 8, 16), (2, 16, 24)}
    block = fitted.curvature("model.layers.1.mlp.down_proj")
    assert block.input_tiles == (range(0, 8), range(8, 16), range(16, 24))
    assert block.output_tiles == (range(0, 8), range(8, 16))
    assert made.fit("whole-diagonal", method="diagonal").curvature(
        block.block.name
    ).input_tiles == (range(0, 24),)
    assert np.isfinite(matrix(made.influence("tiles-scores", run=fitted.path))).all()


def test_prompts_and_completions_are_scored_on_the_completion(made: Made, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "the cat ", "completion": "sat on"}]
    prompts = write_rows(tmp_path / "prompts.parquet", rows)
    text = write_rows(tmp_path / "text.parquet", [{"id": "a", "text": "the cat sat on"}])
    by_prompt = matrix(made.influence("by-prompt", queries=prompts))
    by_text = matrix(made.influence("by-text", queries=text))
    assert relative(by_prompt, by_text) > 1e-2
    masked = write_rows(
        tmp_path / "masked.parquet",
        [{"id": "a", "text": "the cat sat on", "loss_mask": [False] * 8 + [True] * 6}],
    )
    assert relative(by_prompt, matrix(made.influence("by-mask", queries=masked))) < CLOSE_32


def test_a_network_of_ones_own_goes_through_both_jobs(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", classified(30))
    fitted = run_here(
        "fit.py",
        flags_of(
            {
                "model": "commands:classifier",
                "data": data,
                "objective": "classification",
                "out": tmp_path / "run",
                "address": "none",
                "stages": 3,
                "fisher": "empirical",
            }
        ),
    )
    assert fitted.code == 0, fitted.err
    assert not (tmp_path / "run" / "labels").exists()
    flags = {"run": tmp_path / "run", "queries": data, "train": data, "out": tmp_path / "scores"}
    flags |= {"model": "commands:classifier"}
    assert run_here("influence.py", flags_of(flags | {"address": "none"})).code == 0
    assert matrix(tmp_path / "scores").shape == (30, 30)
