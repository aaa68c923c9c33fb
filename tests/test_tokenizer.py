from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer import BOS, EOS, VOCAB, byte_ids, save_byte_tokenizer

from raycurv.data.tokenizer import LazyTokenizer, affixes
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
