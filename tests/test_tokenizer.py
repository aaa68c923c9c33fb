from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from byte_tokenizer import BOS, EOS, VOCAB, byte_ids, save_byte_tokenizer

from raycurv.data.tokenizer import FILES, LazyTokenizer, affixes
from raycurv.driver.corpus import described_alike
from raycurv.errors import UserError

TEMPLATES = {
    "$A": ([], []),
    "<s> $A": ([BOS], []),
    "$A </s>": ([], [EOS]),
    "<s> $A </s>": ([BOS], [EOS]),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_are_the_tokenizers_own(tmp_path: Path, template: str) -> None:
    tokenizer = LazyTokenizer(save_byte_tokenizer(tmp_path, template))
    before, after = TEMPLATES[template]
    assert affixes(tokenizer) == (before, after)
    texts = ["one two", "", "né\n"]
    assert tokenizer.encode(texts, special=False) == [byte_ids(text) for text in texts]
    assert tokenizer.encode(texts, special=True) == [
        [*before, *byte_ids(text), *after] for text in texts
    ]


def test_what_is_recorded_is_json(tmp_path: Path) -> None:
    tokenizer = LazyTokenizer(save_byte_tokenizer(tmp_path, "<s> $A"))
    assert tokenizer.describe() == {}, "no text was met"
    tokenizer.encode(["a"], special=False)
    record = tokenizer.describe()
    assert json.loads(json.dumps(record)) == record
    assert (record["tokens"], record["before"], record["after"]) == (VOCAB, [BOS], [])


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError) as caught:
        LazyTokenizer(tmp_path).encode(["a"], special=True)
    error = caught.value
    assert error.where == str(tmp_path)
    assert "tokenizer.json" in error.expected
    assert "none of its files" in error.got
    assert "input_ids" in error.remedy


def test_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        LazyTokenizer(tmp_path / "missing").encode(["a"], special=True)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="that transformers can load"):
        LazyTokenizer(tmp_path).encode(["a"], special=True)


def test_special_tokens_that_cannot_be_told_apart_are_a_mistake() -> None:
    class Mixing:
        def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
            return [[9, 9] if special else [1] for _ in texts]

        def describe(self) -> dict[str, str]:
            return {}

    with pytest.raises(UserError, match="before and after a text"):
        affixes(Mixing())  # type: ignore[arg-type]


def _changed(directory: Path, change: Callable[[dict[str, Any]], object]) -> LazyTokenizer:
    file = save_byte_tokenizer(directory) / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return LazyTokenizer(directory)


def _replacing(times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    return {"normalizer": {"type": "Sequence", "normalizers": [one] * times}}


def test_a_normalizer_that_makes_a_text_huge_is_refused_before_it_does(tmp_path: Path) -> None:
    tokenizer = _changed(tmp_path, lambda c: c.update(_replacing(8)))
    with pytest.raises(UserError, match=f"normalizer makes of one, got {16**8:,}"):
        tokenizer.encode(["a"], special=False)
    fair = _changed(tmp_path, lambda c: c.update(_replacing(2)))
    assert len(fair.encode(["a"], special=False)[0]) == 256


def test_special_tokens_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 1,024 special tokens around a text, got 2,000"):
        LazyTokenizer(save_byte_tokenizer(tmp_path, "<s> " * 2000 + "$A")).encode([], special=True)


def test_a_pattern_that_gives_up_on_a_text_is_a_mistake(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
               "invert": False}  # fmt: skip
    tokenizer = _changed(tmp_path, lambda c: c.update(pre_tokenizer=pattern))
    tokenizer.encode(["aa"], special=False)
    with pytest.raises(RuntimeError, match="retry-limit"):
        tokenizer.encode(["a" * 40 + "b"], special=False)


@pytest.mark.parametrize("case", ["a link", "a pipe", "larger"])
def test_files_of_a_tokenizer_are_files_of_its_directory(tmp_path: Path, case: str) -> None:
    file = save_byte_tokenizer(tmp_path / "model") / "tokenizer.json"
    if case == "larger":
        os.truncate(file, 65 << 20)
    else:
        file.rename(tmp_path / "moved.json")
        file.symlink_to("../moved.json") if case == "a link" else os.mkfifo(file)
    says = {"a link": "a link to", "a pipe": "a pipe", "larger": "68,157,440"}
    with pytest.raises(UserError, match=says[case]):
        LazyTokenizer(file.parent).encode(["a"], special=False)


def test_further_chat_templates_are_files_of_its_directory(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path / "model", chat="{{ messages }}")
    (tmp_path / "elsewhere.jinja").write_text("{{ tools }}")
    (folder / "additional_chat_templates").mkdir()
    place = folder / "additional_chat_templates" / "tool_use.jinja"
    place.symlink_to("../../elsewhere.jinja")
    with pytest.raises(UserError, match="a link to"):
        LazyTokenizer(folder).encode(["a"], special=False)
    place.unlink()
    shutil.copy(tmp_path / "elsewhere.jinja", place)
    assert (
        LazyTokenizer(folder).chat.render([{"role": "user"}], [{"name": "t"}]).text
        == "[{'name': 't'}]"
    )


def test_a_tokenizer_that_knows_few_words_is_recorded_all_the_same(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0}))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = LazyTokenizer(tmp_path)
    assert tokenizer.encode(["one"], special=True) == [[0]]
    assert tokenizer.describe()["before"] is None
    with pytest.raises(UserError, match="takes the text 'a'"):
        affixes(tokenizer)


@pytest.mark.parametrize("option", ["do_lower_case", "strip_accents"])
def test_options_beside_the_words_tell_a_tokenizer_from_another(
    tmp_path: Path, option: str
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "One", "né", "ne"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)

    def read(**options: bool) -> tuple[list[list[int]], dict[str, Any]]:
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))
        tokenizer = LazyTokenizer(tmp_path)
        return tokenizer.encode(["One né"], special=False), tokenizer.describe()

    before, said = read(do_lower_case=True, strip_accents=True)
    after, other = read(**{option: False})
    assert before != after and not described_alike(said, other)
    beside = ("words", FILES)
    assert {k: v for k, v in said.items() if k not in beside} == {
        k: v for k, v in other.items() if k not in beside
    }
    # Runs of before have none on record.
    assert described_alike({k: v for k, v in said.items() if k != "words"}, other)
    again, same = read(**{option: True}, model_max_length=7)
    assert again == before and same == said | {FILES: same[FILES]} and same[FILES] != said[FILES]


def test_what_is_recorded_of_a_tokenizer_warns_of_nothing(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = LazyTokenizer(tmp_path)
        assert tokenizer.encode(["one"], special=True) and tokenizer.describe()["words"]
