"""What is named on the hub is what lies there, at the commit on record, and nothing else of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import failure_in, run_here, save_llama, texts
from hub_server import TOKEN, Hub, Repository, files_of, hub

import raycurv
from raycurv.data.sources import open_parts
from raycurv.errors import UserError
from raycurv.hub import find, hub_name
from raycurv.jobs.fitted import fit_command

pytestmark = pytest.mark.usefixtures("quiet_transformers")
ALONE: dict[str, Any] = {"address": "none", "quiet": True, "method": "identity"}
# What lies beside a model on the hub, and is none of raycurv's business.
BESIDE = {
    "pytorch_model.bin": b"a pickle", "modeling_own.py": b"raise SystemExit", "onnx/a.onnx": b"",
    "onnx/config.json": b"{}", ".gitattributes": b"", "consolidated.safetensors": b"twice",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with its tokenizer."""
    from transformers import LlamaForCausalLM

    single = save_llama(tmp_path_factory.mktemp("single"))
    split = tmp_path_factory.mktemp("split")
    LlamaForCausalLM.from_pretrained(single).save_pretrained(split, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(single / name, split)
    assert len(list(split.glob("*.safetensors"))) > 1
    return split


@pytest.fixture
def here(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with the model ``org/tiny``; this process stands in an empty directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub(tmp_path) as found:
        found.models["org/tiny"] = Repository()
        found.models["org/tiny"].push(files_of(folder) | BESIDE)
        yield found


def offline() -> Any:
    from huggingface_hub import constants

    return mock.patch.object(constants, "HF_HUB_OFFLINE", True)


def test_a_model_by_name_is_the_one_in_its_directory(
    here: Hub, folder: Path, tmp_path: Path
) -> None:
    commit = here.models["org/tiny"].branches["main"]
    data = texts(4)
    settings = ALONE | {"method": "ekfac"}
    named = raycurv.fit("org/tiny", data, tmp_path / "named", **settings)
    local = raycurv.fit(folder, data, tmp_path / "local", **settings)
    assert named.spectrum().equals(local.spectrum()) and named.examples().equals(local.examples())
    assert named.manifest.fingerprints["model"] == local.manifest.fingerprints["model"]
    assert named.manifest.facts["model"] == f"org/tiny@{commit}"
    # Only what is read was fetched; from there on nothing is asked for.
    (snapshot,) = (tmp_path / "hub").glob("models--org--tiny/snapshots/*")
    assert snapshot.name == commit
    assert {p.name for p in snapshot.rglob("*")} == {p.name for p in folder.iterdir()}
    here.asked.clear()
    scores = [
        run.influence(data, data, tmp_path / f"{n}", address="none", quiet=True).matrix()[0]
        for n, run in enumerate((named, raycurv.open(tmp_path / "named"), local))
    ]
    assert (scores[0] == scores[2]).all() and (scores[1] == scores[2]).all()
    more = named.extend(texts(6)[4:], tmp_path / "more", address="none", quiet=True)
    assert more.manifest.facts["model"] == f"org/tiny@{commit}"
    assert here.asked == []


def test_a_moved_branch_is_refused_and_its_old_commit_goes_on(here: Hub, tmp_path: Path) -> None:
    repository, out = here.models["org/tiny"], tmp_path / "run"
    old = repository.branches["main"]
    raycurv.fit("org/tiny", texts(2), out, **ALONE)
    raycurv.fit("org/tiny", texts(2), out, **ALONE)
    # The same weights with another card are another commit, too.
    new = repository.push(repository.commits[old] | {"README.md": b"a card"})
    with pytest.raises(UserError, match="--model org/tiny was the commit") as caught:
        raycurv.fit("org/tiny", texts(2), out, **ALONE)
    assert old in caught.value.got and new in caught.value.got
    raycurv.fit(f"org/tiny@{old}", texts(2), out, **ALONE)
    # With other weights the tensors tell, whatever it is called.
    other = repository.commits[old] | files_of(save_llama(tmp_path / "other", layers=3))
    repository.push(other, "branch/of-mine")
    with pytest.raises(UserError, match="the model is another one"):
        raycurv.fit("org/tiny@branch/of-mine", texts(2), out, **ALONE)


NO_SUCH = "none of that name"
# What is named, with or without a token: what of the message names the mistake.
WRONG: dict[str, tuple[str, bool, str, str]] = {
    "a typo": ("org/tinny", False, NO_SUCH, "HTTP 401"),
    "a typo, with a token": ("org/tinny", True, NO_SUCH, "HTTP 404"),
    "private": ("org/private", False, NO_SUCH, "HF_TOKEN"),
    "another's": ("org/forbidden", True, "this token may not read", "HTTP 403"),
    "gated": ("org/gated", False, "a gated one", "Accept its terms"),
    "no such branch": ("org/tiny@v9", False, "no branch, tag or commit v9", "HTTP 404"),
    "no such commit": (f"org/tiny@{'0' * 40}", False, "no branch, tag or commit", "HTTP 404"),
    "a hub that is down": ("org/down", False, "HTTP 503", "HF_ENDPOINT"),
    "pickles alone": ("org/pickles", False, "pytorch_model.bin", "save_pretrained"),
    "an adapter": ("org/adapter", False, "an adapter", "--adapter"),
    "a directory": ("no/such/model", False, "no such directory", "Check the path"),
    "a name without a slash": ("gpt2", False, "no such directory", "Check the path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_had_is_an_error_in_seconds_that_says_why(
    here: Hub, folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, known, got, advice = WRONG[case]
    files = files_of(folder)
    for access in ("private", "gated", "forbidden", "down"):
        here.models[f"org/{access}"] = Repository(access=access)
        here.models[f"org/{access}"].push(files)
    config = {"config.json": files["config.json"]}
    here.models["org/pickles"] = Repository()
    here.models["org/pickles"].push(config | {"pytorch_model.bin": b"a pickle"})
    here.models["org/adapter"] = Repository()
    here.models["org/adapter"].push({"adapter_config.json": b"{}"})
    if known:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    started = time.monotonic()
    flags = ["--model", name, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out"]
    outcome = run_here("fit.py", [*flags, "--address", "none"])
    said = failure_in(outcome)["message"]
    assert time.monotonic() - started < 5
    assert outcome.code == 2 and got in said and advice in said, said
    assert name in said or "tiny" in said
    assert TOKEN not in outcome.err + outcome.out and "Signed" not in outcome.err
    assert "pytorch_model.bin" not in here.fetched()


def test_without_a_network_the_cache_is_taken_only_when_that_is_said(
    here: Hub, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    commit = here.models["org/tiny"].branches["main"]
    with offline(), pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        raycurv.fit("org/tiny", texts(2), tmp_path / "a", **ALONE)
    assert run_here("plan.py", ["--model", "org/tiny"]).code == 0
    assert not [name for name in here.fetched() if name.endswith(".safetensors")]
    with offline(), pytest.raises(UserError, match=r"model-00001-of-.*HF_HUB_OFFLINE is set"):
        raycurv.fit("org/tiny", texts(2), tmp_path / "a", **ALONE)
    raycurv.fit("org/tiny", texts(2), tmp_path / "a", **ALONE)
    with mock.patch.object(constants, "ENDPOINT", "http://127.0.0.1:9"):
        with pytest.raises(UserError, match="ConnectError") as caught:
            raycurv.fit("org/tiny", texts(2), tmp_path / "b", **ALONE)
        assert f"HF_HUB_OFFLINE=1 takes the commit {commit}" in caught.value.remedy
        with offline():
            run = raycurv.fit("org/tiny", texts(2), tmp_path / "b", **ALONE)
        assert run.manifest.facts["model"] == f"org/tiny@{commit}"


def test_texts_go_through_a_tokenizer_by_name(here: Hub, folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    here.models["org/bare"] = Repository()
    here.models["org/bare"].push({n: f for n, f in files.items() if "tokenizer" not in n})
    with pytest.raises(UserError, match="tokenizer"):
        raycurv.fit("org/bare", texts(2), tmp_path / "none", **ALONE)
    run = raycurv.fit("org/bare", texts(2), tmp_path / "a", tokenizer="org/tiny", **ALONE)
    whole = raycurv.fit(folder, texts(2), tmp_path / "b", **ALONE)
    assert run.examples().equals(whole.examples())
    here.asked.clear()
    run.influence(texts(1), texts(2), tmp_path / "s", address="none", quiet=True)
    assert here.asked == []


def test_a_cache_that_cannot_be_written_is_named(here: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache should be")
    with pytest.raises(UserError, match=r"to fetch org/tiny.* into, got .*HF_HOME names"):
        raycurv.fit("org/tiny", texts(2), tmp_path / "run", **ALONE)


def test_a_hub_that_never_answers_is_not_waited_for(here: Hub, tmp_path: Path) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            mock.patch.object(constants, "ENDPOINT", endpoint),
            mock.patch("raycurv.hub._SECONDS", 0.3),
            pytest.raises(UserError, match=r"of the hub none \(ReadTimeout\)"),
        ):
            raycurv.fit("org/tiny", texts(2), tmp_path / "run", **ALONE)


def test_what_a_run_names_is_not_fetched(here: Hub, tmp_path: Path) -> None:
    run = raycurv.fit("org/tiny", texts(2), tmp_path / "run", **ALONE)
    shutil.rmtree(tmp_path / "hub")
    here.asked.clear()
    scoring = {"queries": texts(2), "train": texts(2), "address": "none", "quiet": True}
    with pytest.raises(UserError, match="a run directory names is not fetched") as caught:
        raycurv.open(tmp_path / "run").influence(out=tmp_path / "s", **scoring)
    assert here.asked == []
    named = run.manifest.facts["model"]
    assert f"--model {named}" in caught.value.remedy
    raycurv.open(tmp_path / "run", model=named).influence(out=tmp_path / "s", **scoring)
    assert here.asked


def test_a_model_brings_its_files_to_a_machine_that_lacks_them(here: Hub, tmp_path: Path) -> None:
    from raycurv.jobs.fit.fit_settings import FitSettings
    from raycurv.jobs.inputs import Inputs
    from raycurv.jobs.on_hub import brought

    settings = FitSettings(model="org/tiny", data="none", out=str(tmp_path / "out"))
    settings, inputs = brought(settings, Inputs(), lambda text: None)
    model = inputs.open_model(settings.model, False)
    travelling = pickle.dumps(model)
    double, cpu = torch.float64, torch.device("cpu")
    here.asked.clear()
    wanted = pickle.loads(travelling).build(range(1), double, cpu).module.state_dict()
    assert here.asked == []
    shutil.rmtree(tmp_path / "hub")
    arrived = pickle.loads(travelling)
    found = arrived.build(range(1), double, cpu).module.state_dict()
    assert [
        name for name in here.fetched() if name == "config.json"
    ] and wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_adapter_by_name_is_put_in_and_its_base_is_not_looked_for(
    here: Hub, folder: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    torch.manual_seed(0)
    base = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    base.save_pretrained(tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(place.read_text().replace(str(folder), "org/other"))
    here.models["org/adapter"] = Repository()
    files = files_of(tmp_path / "adapter")
    commit = here.models["org/adapter"].push(files | {"adapter_model.bin": b"a pickle"})
    run = raycurv.fit("org/tiny", texts(2), tmp_path / "a", adapter=["org/adapter"], **ALONE)
    local = raycurv.fit(folder, texts(2), tmp_path / "b", adapter=[tmp_path / "adapter"], **ALONE)
    assert run.examples().equals(local.examples()) and run.block_names() == local.block_names()
    assert run.manifest.facts["adapter"] == [f"org/adapter@{commit}"]
    assert "adapter_model.bin" not in here.fetched()
    assert not [path for _, path in here.asked if "other" in path]
    here.asked.clear()
    opened = raycurv.open(tmp_path / "a")
    opened.influence(texts(1), texts(2), tmp_path / "s", address="none", quiet=True)
    assert here.asked == []


def test_code_is_fetched_only_where_it_is_trusted(here: Hub, tmp_path: Path) -> None:
    raycurv.fit("org/tiny", texts(2), tmp_path / "a", **ALONE)
    assert not [name for name in here.fetched() if name.endswith(".py")]
    raycurv.fit("org/tiny", texts(2), tmp_path / "b", trust_remote_code=True, **ALONE)
    assert "modeling_own.py" in here.fetched()


def test_a_private_model_is_read_with_a_token_which_nothing_records(
    here: Hub, folder: Path, tmp_path: Path
) -> None:
    here.models["org/private"] = Repository(access="private")
    here.models["org/private"].push(files_of(folder))
    flags = ["--model", "org/private", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run"]
    rows = "".join(json.dumps(row) + "\n" for row in texts(2))
    (tmp_path / "data.jsonl").write_text(rows)
    with mock.patch.dict(os.environ, HF_TOKEN=TOKEN):
        outcome = run_here("fit.py", [*flags, "--address", "none", "--method", "identity"])
    assert outcome.code == 0 and TOKEN not in outcome.err + outcome.out
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert TOKEN.encode() not in written and b"org/private@" in written


def test_a_path_that_exists_is_no_name(here: Hub, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, Path("org/tiny"))
    here.asked.clear()
    run = raycurv.fit("org/tiny", texts(2), tmp_path / "run", **ALONE)
    assert here.asked == [] and run.manifest.facts["model"] == str(Path("org/tiny").absolute())


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def card(configurations: str) -> bytes:
    return f"---\nhomepage: https://a.b/c\nconfigs:\n{configurations}\n---\n# A card".encode()


ROWS = [{"text": row["text"]} for row in texts(8)]
SPLITS = {
    "data/train-00000-of-00002.parquet": parquet(ROWS[:3]),
    "data/train-00001-of-00002.parquet": parquet(ROWS[3:6]),
    "data/test-00000-of-00001.parquet": parquet(ROWS[6:]),
    "README.md": b"no card at all", "texts.py": b"raise SystemExit",
}  # fmt: skip


def test_data_by_name_is_the_files_of_its_split(here: Hub, folder: Path, tmp_path: Path) -> None:
    repository = here.datasets["org/texts"] = Repository()
    commit = repository.push(SPLITS)
    for name, data in SPLITS.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(data)
    named = raycurv.fit(folder, "org/texts", tmp_path / "a", split="train[1:5]", **ALONE)
    local = raycurv.fit(folder, tmp_path / "clone", tmp_path / "b", split="train[1:5]", **ALONE)
    assert len(named.examples()) == 4 and named.examples().equals(local.examples())
    assert named.manifest.facts["data"] == f"org/texts@{commit}"
    assert {n for n in here.fetched() if n != "README.md"} == {
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    }  # fmt: skip
    _, _, *typed = shlex.split(fit_command(named.manifest, str(tmp_path / "again")))
    assert run_here("fit.py", [*typed, "--address", "none"]).code == 0
    assert raycurv.open(tmp_path / "again").examples().equals(named.examples())
    settings = {"split": "train", "queries_split": "test", "address": "none", "quiet": True}
    scores = named.influence("org/texts", "org/texts", tmp_path / "s", **settings)
    here.asked.clear()
    matrix, queries, train = scores.matrix()
    assert matrix.shape == (2, 6) and all("test" in id for id in queries)
    assert scores.data("train").rows(train)["text"].to_pylist() == [r["text"] for r in ROWS[:6]]
    again = raycurv.open_scores(tmp_path / "s")
    assert again.data("queries").rows(queries)["text"].to_pylist() == [r["text"] for r in ROWS[6:]]
    assert here.asked == []
    repository.push(SPLITS | {"README.md": b"another card"})
    with pytest.raises(UserError, match=f"--data org/texts was the commit {commit}"):
        raycurv.fit(folder, "org/texts", tmp_path / "a", split="train[1:5]", **ALONE)


PLAIN, BOTH = {"a.jsonl": b""}, {"train.jsonl": b"", "test.jsonl": b""}
LANGUAGES = {
    "README.md": card(
        "- config_name: en\n  data_files:\n  - split: train\n    path: en/*.jsonl\n"
        "- config_name: de\n  data_files: de/**"
    ),
    "en/a.jsonl": b"", "de/b.jsonl": b"",
}  # fmt: skip


def one(said: str) -> dict[str, bytes]:
    return PLAIN | {"README.md": card(f"- config_name: default\n  {said}")}


def read_me(text: str) -> dict[str, bytes]:
    return PLAIN | {"README.md": f"---\n{text}\n---\n".encode()}


ITS_OWN = "names of files of its repository"
# What a repository holds; configuration and split; its files, or what says why there are none.
CARDS: dict[str, tuple[dict[str, bytes], str, str, list[str] | str]] = {
    "no split said": ({"a/all.jsonl": b""}, "", "", ["a/all.jsonl"]),
    "by name": (BOTH, "", "test", ["test.jsonl"]),
    "several splits": (BOTH, "", "", "several, and none named: train, test"),
    "no such split": (BOTH, "", "dev", "--split dev: expected a split of"),
    "a configuration": (LANGUAGES, "de", "", ["de/b.jsonl"]),
    "files in an order": (
        one("data_files: [b.jsonl, a.jsonl]") | {"b.jsonl": b""},
        "",
        "",
        ["b.jsonl", "a.jsonl"],
    ),
    "none of several": (LANGUAGES, "", "", r"\['en', 'de'\]"),
    "no such configuration": (LANGUAGES, "fr", "", "'fr' not found"),
    "no data": ({"README.md": b"", "a.pkl": b"a pickle"}, "", "", "No .*data files"),
    "images": ({"train/a.jpg": b"", "train/b.jpg": b""}, "", "", "a.jpg, for example"),
    "how to read": (one("data_files: a.jsonl\n  field: x"), "", "", "field: 'x'"),
    "another's files": (one("data_files: http://127.0.0.1:9/a.jsonl"), "", "", ITS_OWN),
    "files above": (one("data_files: ../../../etc/passwd"), "", "", ITS_OWN),
    "a root": (one("data_dir: /etc"), "", "", ITS_OWN),
    "references": (read_me("a: &a [1]\nb: *a"), "", "", "YAML without references"),
    "no list": (read_me("configs: {a: b}"), "", "", "a list of configurations"),
    "nested": (read_me("configs: " + "[" * 9999 + "]" * 9999), "", "", "README.md of org/texts"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_says_which_files_are_of_a_split_and_nothing_else(here: Hub, case: str) -> None:
    from raycurv.data.hub_data import bring_split

    files, configuration, split, wanted = CARDS[case]
    here.datasets["org/texts"] = Repository()
    here.datasets["org/texts"].push(files)
    name = hub_name("org/texts" + f":{configuration}" * bool(configuration), "dataset")
    assert name is not None
    commit = find(name, "--data")
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            bring_split(commit, split, "--split")
    else:
        snapshot = bring_split(commit, split, "--split")
        assert list(snapshot.files) == wanted == [part.name for part in open_parts(snapshot)]
    assert set(here.fetched()) <= {
        "README.md",
        *([] if isinstance(wanted, str) else map(os.path.basename, wanted)),
    }


def test_without_datasets_the_message_says_what_to_install(
    here: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    here.datasets["org/texts"] = Repository()
    here.datasets["org/texts"].push(PLAIN)
    with pytest.raises(UserError, match=r"pip install 'raycurv\[hub\]'"):
        raycurv.fit(folder, "org/texts", tmp_path / "run", **ALONE)


def test_names_of_the_hub_have_its_shape() -> None:
    def parts(text: str, kind: str = "model") -> tuple[str, ...] | None:
        found = hub_name(text, kind)
        return None if found is None else (found.repo, found.revision, found.config)

    assert parts("a-b/c.d_e") == ("a-b/c.d_e", "", "")
    assert parts("a/b@refs/pr/3") == ("a/b", "refs/pr/3", "")
    assert parts("a/b@v1:part-2", "dataset") == ("a/b", "v1", "part-2")
    others = (
        "a a/b/c ./a/b ../a /a/b a/ a/b.git a--b/c ~/a a/b:c s3://a/b s3:/a a/*.parquet a/b@ à/b"
    )
    for text in [*others.split(), "a b/c", "pack.age:factory"]:
        assert parts(text) is None, text
