"""Claims about conversations: their text is the chat template's, their loss the assistant's."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pytest
import torch
from byte_tokenizer import VOCAB, save_byte_tokenizer
from chat_templates import (
    AGAIN,
    FAMILIES,
    GEMMA_3,
    MARKED,
    MISTRAL,
    ONCE,
    QWEN3,
    TWICE,
    Piece,
)
from commands import rewritten, run_here, save_llama, write_rows

import raycurv
from raycurv.data.examples import Example
from raycurv.data.findings import sentences
from raycurv.data.reading import ExampleReader
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import UserError

HERE: dict[str, Any] = {"address": "none", "quiet": True}


def tokenizer_of(folder: Path, family: Any, **changed: Any) -> Path:
    given = {"special": family.special, "chat": family.template} | changed
    return save_byte_tokenizer(folder, **given)


def reader(source: Any, folder: Path, **more: Any) -> ExampleReader:
    settings: dict[str, Any] = {"vocab_size": VOCAB + 8, "token_inputs": True, "per_token": True}
    settings |= {"max_positions": None, "tokenizer": LazyTokenizer(folder)}
    return ExampleReader(source, **(settings | more))


def read(source: Any, folder: Path, **more: Any) -> list[Example]:
    return list(reader(source, folder, **more).examples())


def encoded(folder: Path, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    """Tokens of pieces, each tokenised by itself: the tokenizer merges nothing."""
    tokenizer = LazyTokenizer(folder)
    found = tokenizer.encode([text for text, _ in pieces], special=False)
    carries = [c for ids, (_, c) in zip(found, pieces, strict=True) for _ in ids]
    return [token for ids in found for token in ids], carries


def mask_of(example: Example) -> list[bool]:
    assert example.loss_mask is not None
    return example.loss_mask.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_where_a_hand_made_mask_has_it(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    folder = tokenizer_of(tmp_path, family)
    cases = [(ONCE, family.once, "assistant"), (ONCE, family.once, "last-assistant"),
             (TWICE, family.last, "last-assistant")]  # fmt: skip
    if family.twice:
        cases.append((TWICE, family.twice, "assistant"))
    for messages, pieces, on in cases:
        ids, carries = encoded(folder, pieces)
        (example,) = read([{"messages": messages}], folder, loss_on=on)
        assert example.input_ids is not None and example.input_ids.tolist() == ids
        assert mask_of(example) == carries
        assert mask_of(example) != [False, *carries[:-1]], "a mask that is shifted by one"
        (whole,) = read([{"messages": messages}], folder, loss_on="all")
        assert whole.input_ids is not None and whole.input_ids.tolist() == ids
        assert whole.loss_mask is None


SHAREGPT = [{"from": "human", "value": "How tall?"}, {"from": "gpt", "value": "Two metres."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "How "},
                                 {"type": "text", "text": "tall?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two metres.", "image": None}]},
]  # fmt: skip
# What data sets write: each is the conversation `ONCE`.
SPELT: dict[str, dict[str, Any]] = {
    "messages": {"messages": ONCE},
    "text": {"text": ONCE},
    "other names": {"conversations": SHAREGPT},
    "parts of text": {"messages": PARTS},
    "JSON": {"chat": json.dumps(ONCE)},
    "nulls": {"messages": [ONCE[0] | {"tool_calls": None}, ONCE[1] | {"name": None}]},
    "prompt and completion": {"prompt": ONCE[:1], "completion": ONCE[1:]},
}


@pytest.mark.parametrize("name", SPELT)
def test_a_conversation_is_one_however_it_is_spelt_and_stored(tmp_path: Path, name: str) -> None:
    folder = tokenizer_of(tmp_path / "tokenizer", QWEN3)
    ids, carries = encoded(folder, QWEN3.once)
    # With a row whose messages have other keys, so that structs in Arrow have nulls.
    more = name in ("messages", "nulls")
    rows = [SPELT[name], *([{"messages": CALLED}] if more else [])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = polars.from_arrow(pa.Table.from_pylist(rows))
    for source in (rows, tmp_path / "a.jsonl", write_rows(tmp_path / "a.parquet", rows), frame):
        example = read(source, folder)[0]
        assert example.input_ids is not None
        assert (example.input_ids.tolist(), mask_of(example)) == (ids, carries)


TOOLS = [
    {"type": "function", "function": {"name": "width", "parameters": {"b": {"type": "x"}, "a": 1}}}
]
# Arguments of other types than in another row, and in an order of their own.
CALLED = [
    {"role": "user", "content": "And wide?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "width", "arguments": {"of": 1}}}]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "One."},
]
CALLS: tuple[Piece, ...] = (
    ("<|im_start|>user\nAnd wide?<|im_end|>\n<|im_start|>assistant\n", False),
    ('\n<tool_call>\n{"name": "width", "arguments": {"of": 1}}\n</tool_call><|im_end|>', True),
    ("\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    ("<think>\n\n</think>\n\nOne.<|im_end|>", True),
    ("\n", False),
)


@pytest.mark.parametrize("stored", ["rows", "jsonl", "parquet", "json"])
def test_tools_and_calls_go_through_the_template(tmp_path: Path, stored: str) -> None:
    folder = tokenizer_of(tmp_path / "tokenizer", QWEN3)
    header = "<|im_start|>system\n" + json.dumps(TOOLS) + "<|im_end|>\n"
    ids, carries = encoded(folder, [(header, False), *CALLS])
    other = [*CALLED[:1], {"role": "assistant", "content": "No."}]
    rows: list[dict[str, Any]] = [{"messages": CALLED, "tools": TOOLS}, {"messages": other}]
    source: Any = rows
    if stored == "json":
        rows[0]["tools"] = json.dumps(TOOLS)
        rows[1]["tools"] = None
    if stored == "jsonl":
        odd = [*CALLED[:1], json.loads(json.dumps(CALLED[1]).replace("1", '"x"')), *CALLED[2:]]
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"messages": odd}]))
    if stored == "parquet":
        source = write_rows(tmp_path / "a.parquet", rows)
    first, second, *_ = read(source, folder)
    assert first.input_ids is not None and second.input_ids is not None
    assert (first.input_ids.tolist(), mask_of(first)) == (ids, carries)
    assert "tools" not in str(bytes(i for i in second.input_ids.tolist() if i < 256))


def test_a_prompt_asks_and_what_completes_it_answers(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, QWEN3)
    row = {"prompt": TWICE[:-1], "completion": TWICE[-1:]}
    (example,) = read([row], folder)
    ids, carries = encoded(folder, QWEN3.last)
    assert example.input_ids is not None and example.input_ids.tolist() == ids
    assert mask_of(example) == carries
    # All of what completes it, the end of the line as well.
    (example,) = read([row], folder, loss_on="all")
    begin = carries.index(True)
    assert mask_of(example) == [t >= begin for t in range(len(ids))]


def test_turns_that_the_data_leaves_out_of_the_loss_carry_none(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, QWEN3)
    rows = [{"messages": [*TWICE[:2], TWICE[2] | {"weight": 0}, *TWICE[3:]]}]
    (example,) = read(rows, folder)
    assert mask_of(example) == encoded(folder, QWEN3.last)[1]
    (none,) = read([{"messages": [ONCE[0], ONCE[1] | {"train": False}]}], folder)
    assert not any(mask_of(none))
    with pytest.raises(UserError, match=r"message 2.*that all count in the loss"):
        read(rows, folder, loss_on="all")


# As of QwQ and of Qwen3's thinking models: the prompt for an answer opens its thought.
THOUGHTFUL = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_a_thought_that_the_template_opens_is_what_the_data_says(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, QWEN3, chat=THOUGHTFUL)
    said = {"role": "assistant", "content": "<think>\nLook.\n</think>\n\nTwo metres."}
    (example,) = read([{"messages": [ONCE[0], said]}], folder)
    begin = "<|im_start|>user\nHow tall?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    own = "Look.\n</think>\n\nTwo metres.<|im_end|>"
    ids, carries = encoded(folder, [(begin, False), (own, True), ("\n", False)])
    assert example.input_ids is not None
    assert (example.input_ids.tolist(), mask_of(example)) == (ids, carries)


def test_what_tools_say_may_be_written_as_json(tmp_path: Path) -> None:
    quoted = [CALLED[0], CALLED[2] | {"content": '{"of": "1"}'}]
    template = PLAIN.replace("m.content }}\n", "m.content | tojson }}<|im_end|>")
    folder = tokenizer_of(tmp_path, QWEN3, chat=template)
    (example,) = read([{"messages": quoted}], folder, loss_on="all")
    assert example.length > len('{"of": "1"}')


def test_tools_of_texts_are_read_though_the_first_text_is_empty(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, QWEN3)
    rows: list[dict[str, Any]] = [{"text": []}, {"text": CALLED, "tools": TOOLS}]
    (example,) = read(rows, folder, empty="skip")
    (same,) = read([{"messages": CALLED, "tools": TOOLS}], folder)
    assert example.input_ids is not None and same.input_ids is not None
    assert example.input_ids.tolist() == same.input_ids.tolist()


def test_pairs_that_are_alike_once_they_are_cut_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "ten letters", "chosen": "a", "rejected": "b"},
            {"prompt": "two", "chosen": "a", "rejected": "b"}]  # fmt: skip
    settings: dict[str, Any] = {"reads": "pairs", "per_token": False, "long": "truncate"}
    found = reader(rows, tokenizer_of(tmp_path, QWEN3), max_length=8, **settings)
    assert len(list(found.examples())) == 2
    assert (found.findings.truncated_examples, found.findings.pairs_alike) == (1, 1)
    assert any(
        "1 pairs have the same text" in s for s in sentences(found.findings.recorded(), 2, 0)
    )


def test_pairs_of_conversations_are_compared_as_the_template_writes_them(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, GEMMA_3)
    better, worse = ONCE[1:], [{"role": "assistant", "content": "No."}]
    ids = [encoded(folder, GEMMA_3.once)[0]]
    pieces = [(text.replace("Two metres", "No"), c) for text, c in GEMMA_3.once]
    ids.append(encoded(folder, pieces)[0])
    for row in (
        {"prompt": ONCE[:1], "chosen": better, "rejected": worse},
        {"chosen": ONCE, "rejected": [*ONCE[:1], *worse]},
    ):
        (example,) = read([row], folder, reads="pairs", per_token=False)
        assert example.input_ids is not None and example.input_ids.tolist() == ids[0] + ids[1]
        assert example.sequences == (len(ids[0]), len(ids[1])) and example.loss_mask is None
    # A prompt that both conversations begin with would be asked twice.
    asked = [ONCE[0] | {"name": None}]
    row = {"prompt": asked, "chosen": ONCE, "rejected": [*ONCE[:1], *worse]}
    with pytest.raises(UserError, match=r"would stand there twice. Leave the column `prompt` out"):
        read([row], folder, reads="pairs", per_token=False)
    with pytest.raises(UserError, match="message 0"):
        read([row | {"prompt": [None, *asked]}], folder, reads="pairs", per_token=False)
    row = {"prompt": "How tall?", "chosen": better, "rejected": worse}
    with pytest.raises(UserError, match="conversations in `chosen`"):
        read([row], folder, reads="pairs", per_token=False)


def test_a_text_with_a_label_may_be_a_conversation(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, QWEN3, template="<s> $A </s>")
    settings: dict[str, Any] = {"per_token": False, "whole_texts": True, "labels_of": "text"}
    (example,) = read([{"messages": ONCE, "labels": 1}], folder, **settings)
    assert example.input_ids is not None and example.loss_mask is None
    # No special token but those that the template writes.
    assert example.input_ids.tolist() == encoded(folder, QWEN3.once)[0]


# Bad input


def test_a_template_that_comes_to_no_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sandbox bounds one loop, and not loops in loops.
    loops = "{% for i in range(99999) %}{% for j in range(N) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("raycurv.data.chat_template.MOST_SECONDS", 0.3)
    for n, ends in ((2, True), (99999, False)):
        template = loops.replace("N", str(n)) + QWEN3.template
        folder = tokenizer_of(tmp_path / str(n), QWEN3, chat=template)
        if ends:
            assert len(read([{"messages": ONCE}], folder)) == 1
            continue
        with pytest.raises(UserError, match=r"chat template of .*in 0\.3 seconds.*its loops"):
            read([{"messages": ONCE}], folder)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


THINKING = [TWICE[0], TWICE[1], TWICE[2] | {"reasoning_content": "Look."}, *TWICE[3:]]
IMAGE = [{"role": "user", "content": [{"type": "image", "image": "x"}]}, ONCE[1]]
GAP = [ONCE[0], {"role": "assistant", "content": "\n\nTwo metres."}]
MACRO = """
{%- macro said(m) %}<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
{% endmacro %}
{%- for m in messages %}{{ said(m) if m.role == 'assistant' else m.content }}{% endfor %}
"""
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DAY = "{% set form = '%Y' %}{{ strftime_now(form) }}" + PLAIN
BAD: dict[str, tuple[Any, Any, str]] = {
    "a template that fails": (
        {"messages": [ONCE[1], ONCE[0]]}, GEMMA_3, r"row 0.*Roles must alternate user/assistant"),
    "turns that are written otherwise later": (
        {"messages": TWICE}, MISTRAL, r"row 0.*tells the assistant's turns.*before message 2"),
    "thoughts that are left out": ({"messages": THINKING}, QWEN3, "message 2.*without 'Look.'"),
    "no beginning of a turn": (
        {"messages": ONCE}, replace(QWEN3, template=PLAIN), "row 0.*beginning of a turn"),
    "marks in another place": (
        {"messages": ONCE}, replace(MARKED, template=MACRO), "message 1.*without 'Two metres.'"),
    "a turn that is not marked": (
        {"messages": ONCE},
        replace(MARKED, template=PLAIN + "{% if 0 %}{% generation %}x{% endgeneration %}"
                        "{% endif %}"),
        "message 1.*without 'Two metres.'"),
    "a message that is not written": (
        {"messages": TWICE}, replace(QWEN3, template=QWEN3.template.replace(
            "{%- elif m.role != 'assistant' %}", "{%- elif m.role == 'user' %}").replace(
            "{%- else %}\n{%- set thought", "{%- elif m.role == 'assistant' %}\n{%- set thought")),
        "message 0.*without what the system says"),
    "a tool that is not heard": (
        {"messages": CALLED}, replace(QWEN3, template=PLAIN.replace(
            "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")),
        "message 2.*without what the tool says"),
    "JSON of messages as a text": (
        {"text": json.dumps(ONCE)}, QWEN3, "row 0.*text in `text`, got messages as JSON"),
    "JSON of messages as a prompt": (
        {"prompt": json.dumps(ONCE[:1]), "completion": "x"}, QWEN3, "`prompt`, got messages as"),
    "no template": ({"messages": ONCE}, replace(QWEN3, template=None), "chat_template.jinja"),
    "a day in other words": (
        {"messages": ONCE}, replace(QWEN3, template=DAY), "format that is not written out"),
    "an image": ({"messages": IMAGE}, QWEN3, "message 0.*a part of the type 'image'"),
    "no role": ({"messages": [{"content": "Hi"}]}, QWEN3, "message 0.*a `role`.*the keys content"),
    "an unknown speaker": (
        {"messages": [{"from": "bing", "value": "Hi"}]}, QWEN3, "`from` one of human, gpt.*'bing'"),
    "no messages": ({"messages": "Hi"}, QWEN3, "JSON in `messages`, where it is a text"),
    "a weight": (
        {"messages": [ONCE[0], ONCE[1] | {"weight": 0.5}]}, QWEN3, "`weight`.*0 or 1.*0.5"),
    "a prompt that answers": (
        {"prompt": ONCE, "completion": ONCE[1:]}, QWEN3, "ends with a message of the assistant"),
    "a prompt twice": (
        {"prompt": ONCE[:1], "completion": ONCE}, QWEN3, "goes on behind its `prompt`"),
    "text and messages": ({"prompt": "Hi", "completion": ONCE[1:]}, QWEN3, "conversations in `com"),
    "a system beside": ({"messages": ONCE, "system": "x"}, QWEN3, "`system` beside"),
    "tools that are none": ({"messages": ONCE, "tools": [1]}, QWEN3, "JSON schemas in `tools`"),
    "nothing said": ({"messages": []}, QWEN3, "at least one token"),
    "too many messages": ({"messages": ONCE * 513}, QWEN3, "at most 1,024 messages"),
    "another class": (
        {"messages": ONCE}, replace(QWEN3, template="{{ messages.__class__.__mro__ }}"),
        "row 0.*SecurityError|row 0.*undefined"),
    "another file": (
        {"messages": ONCE}, replace(QWEN3, template="{% include '/etc/hostname' %}"),
        "row 0.*no loader for this environment"),
    "a loop without end": (
        {"messages": ONCE}, replace(QWEN3, template="{% for i in range(10 ** 9) %}x{% endfor %}"),
        "row 0.*Range too big"),
    "a long text": (
        {"messages": ONCE}, replace(QWEN3, template="{{ 'x' * (2 ** 21 + 1) }}"),
        "row 0.*at most 2 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_told_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    row, family, says = BAD[name]
    folder = tokenizer_of(tmp_path, family)
    with pytest.raises(UserError) as caught:
        read([row], folder)
    assert re.search(says, str(caught.value), re.DOTALL), caught.value


def test_a_token_that_reaches_over_the_edge_of_a_turn_is_refused(tmp_path: Path) -> None:
    merging = tokenizer_of(tmp_path / "merging", QWEN3, merges=[("\n", "\n")])
    plain = tokenizer_of(tmp_path / "plain", QWEN3)
    rows = [{"messages": [*GAP, *AGAIN]}]
    with pytest.raises(UserError, match=r"row 0.*tokens up to a turn's edge that depend on"):
        read(rows, merging)
    # Control: without that token, and with the remedy.
    assert any(mask_of(read(rows, plain)[0]))
    assert any(mask_of(read([{"messages": [*ONCE, *AGAIN]}], merging)[0]))
    assert any(mask_of(read(rows, merging, loss_on="last-assistant")[0]))


def test_the_day_is_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is that of transformers on one day, whatever the day is."""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Then:
            return cls(2024, 7, 26)

    for name in ("Llama 3", "gpt-oss"):
        folder = tokenizer_of(tmp_path / name, FAMILIES[name])
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        today = tokenizer.apply_chat_template(TWICE, return_dict=False)
        with monkeypatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", Then)
            then = tokenizer.apply_chat_template(TWICE, return_dict=False)
        found = reader([{"messages": TWICE}], folder)
        (example,) = found.examples()
        assert example.input_ids is not None
        assert example.input_ids.tolist() == then != today
        assert found.findings.conversations["date"] == "2024-07-26"


# Jobs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_llama(folder, tokenizer=False, vocab_size=VOCAB + 8, max_position_embeddings=512)
    return tokenizer_of(folder, QWEN3)


ROWS = [{"id": f"t{n}", "messages": TWICE[: 3 + 2 * (n % 2)], "source": "x"} for n in range(4)]


def test_the_loss_is_that_of_transformers_without_the_other_tokens(
    model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(str(model))
    found = raycurv.evaluate(model, ROWS, tmp_path / "loss", loss_on="last-assistant", **HERE)
    table = found.examples().to_pylist()
    for row, messages in zip(table, [one["messages"] for one in ROWS], strict=True):
        pieces = QWEN3.last if messages == TWICE else ((QWEN3.twice[0], *QWEN3.once))
        ids, carries = encoded(model, pieces)
        labels = torch.tensor([[i if c else -100 for i, c in zip(ids, carries, strict=True)]])
        with torch.no_grad():
            mean = network(torch.tensor([ids]), labels=labels).loss.item()
        assert row["targets"] == sum(carries)
        # float32, summed in another order
        assert row["loss"] == pytest.approx(mean * sum(carries), rel=1e-5)
    everywhere = raycurv.evaluate(model, ROWS, tmp_path / "all", loss_on="all", **HERE)
    assert everywhere.targets > found.targets


def test_what_follows_a_fit_has_its_turns_and_its_template(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    settings: dict[str, Any] = {"loss_on": "last-assistant", **HERE}
    run = raycurv.fit(folder, ROWS, tmp_path / "run", method="identity", **settings)
    said = run.manifest.facts
    assert run.manifest.settings["loss_on"] == "last-assistant"
    assert said["reading"]["data"]["conversations"] == {
        "count": 4, "loss_on": "last-assistant", "turns_by": "prefixes",
    }  # fmt: skip
    first = said["first_examples"]["data"]
    assert first["id"] == "t0" and first["text"][-2] == [QWEN3.once[1][0], True]
    assert first["targets"] == sum(encoded(folder, QWEN3.once)[1])
    asked = [{"messages": TWICE}]
    scores = run.influence(asked, ROWS, tmp_path / "scores", rank="full", **HERE)
    first = scores.manifest.facts["first_examples"]["queries"]
    assert [text for text, carries in first["text"] if carries] == [QWEN3.last[-2][0]]
    with pytest.raises(UserError, match="--loss-on"):
        raycurv.fit(folder, ROWS, tmp_path / "run", method="identity", **HERE)
    # A template that writes something else is another one, until it is the fit's again.
    shutil.copytree(folder, tmp_path / "before")
    changed = QWEN3.template.replace("{{- m.content", "{{- '!' + m.content")
    (folder / "chat_template.jinja").write_text(changed)
    with pytest.raises(UserError, match=r"the tokenizer of the fit.*got another one"):
        run.influence(asked, ROWS, tmp_path / "changed", rank="full", **HERE)
    own: dict[str, Any] = {"rank": "full", "tokenizer": tmp_path / "before", **HERE}
    again = run.influence(asked, ROWS, tmp_path / "again", **own)
    assert again.table().equals(scores.table())


def _edit(file: Path, was: str, now: str) -> None:
    text = file.read_text()
    assert was in text
    file.write_text(text.replace(was, now, 1))


# A file, what is changed in it, and whether that makes other tokens.
EDITS = {
    "a template": ("chat_template.jinja", "{{- m.content", "{{- '!' + m.content", True),
    "a tokenizer": ("tokenizer.json", 'prefix_space": false', 'prefix_space": true', True),
    "nothing": ("tokenizer_config.json", "{", '{"note": "no token is another one",', False),
}


def test_what_is_finished_is_held_to_the_tokenizer_that_it_was_read_with(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, how = tmp_path / "model", HERE | {"quiet": False}
    shutil.copytree(model, folder)
    data = write_rows(tmp_path / "rows.parquet", ROWS)

    def fit(out: str = "run") -> raycurv.Run:
        return raycurv.fit(folder, data, tmp_path / out, method="identity", **how)

    run = fit()
    jobs = [
        fit,
        lambda: run.influence([{"messages": TWICE}], data, tmp_path / "scores", **how),
        lambda: raycurv.evaluate(folder, data, tmp_path / "numbers", **how),
    ]
    for job in jobs[1:]:
        job()
    for name, was, now, matters in EDITS.values():
        original = (folder / name).read_text()
        _edit(folder / name, was, now)
        for job in jobs:
            if not matters:
                job()
                continue
            with pytest.raises(UserError, match=rf"the tokenizer is another one \({name} changed"):
                job()
        if matters:
            # The fit's examples are not those of another tokenizer in new scores either.
            with pytest.raises(UserError, match=rf"another one \({name} .* fit's by --tokenizer"):
                run.influence(data, data, tmp_path / "more", **how)
            shutil.rmtree(tmp_path / "more")
        (folder / name).write_text(original)
    capfd.readouterr()
    for job in jobs:
        job()
    assert capfd.readouterr().err.count("complete: ") == 2
    # What an earlier version has on record tells as much; where nothing was computed, what is read
    # by now is the run.
    _edit(folder / EDITS["a template"][0], *EDITS["a template"][1:3])
    with rewritten(tmp_path / "run", "run.json") as said:
        del said["facts"]["tokenizer"]["directory_files"]
    with pytest.raises(UserError, match=r"the tokenizer is another one \(chat_template changed"):
        fit()
    with rewritten(tmp_path / "run", "run.json") as said:
        said["complete"] = []
    before = (tmp_path / "run" / "data" / "corpus.json").read_bytes()
    fit()
    assert (tmp_path / "run" / "data" / "corpus.json").read_bytes() != before


def test_turns_of_what_has_none_are_refused(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "How tall? Two metres."}]
    with pytest.raises(UserError, match="--loss-on last-assistant: expected conversations"):
        raycurv.evaluate(model, rows, tmp_path / "out", loss_on="last-assistant", **HERE)
    raycurv.evaluate(model, rows, tmp_path / "out2", **HERE)
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    flags = ["--model", model, "--data", tmp_path / "a.jsonl", "--loss-on", "all"]
    outcome = run_here("show-data.py", flags)
    assert outcome.code == 2 and "expected conversations (`messages`)" in outcome.err


def test_answers_that_are_cut_off_are_counted(model: Path) -> None:
    begin = encoded(model, QWEN3.twice)[1].index(True)
    for length, cut in ((begin, 4), (begin + 1, 0)):
        found = reader(ROWS, model, max_length=length, long="truncate")
        assert {example.length for example in found.examples()} == {length}
        assert (found.findings.truncated_examples, found.findings.targets_cut_off) == (4, cut)


# What a person looks at


def test_data_is_shown_as_it_goes_into_a_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model", model, "--data", tmp_path / "a.jsonl", "--rows", 1]
    outcome = run_here("show-data.py", flags)
    assert outcome.code == 0, outcome.err
    last = json.loads(outcome.out.splitlines()[-1])
    carries = encoded(model, (QWEN3.twice[0], *QWEN3.once))[1]
    assert last["examples"] == [{"id": "t0", "tokens": len(carries), "targets": sum(carries)}]
    assert (last["columns"], last["unused_columns"]) == (["id", "messages"], ["source"])
    marked = [line[4:] for line in outcome.out.splitlines() if line.startswith("  > ")]
    assert "".join(marked).replace("\\n", "\n") == QWEN3.once[1][0]
    assert "columns that were not read: source" in outcome.out


def test_what_is_shown_cannot_steer_a_terminal(model: Path, tmp_path: Path) -> None:
    rows = [{"id": "a\x1b[2J", "text": "b\x1b[31m\rc " + "long " * 999}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    flags = ["--model", model, "--data", tmp_path / "a.jsonl", "--max-length", 500]
    outcome = run_here("show-data.py", [*flags, "--long", "truncate", "--characters", 50])
    assert outcome.code == 0 and "\x1b" not in outcome.out and "\r" not in outcome.out
    assert "cut to the longest length" in outcome.out and "characters …" in outcome.out


def test_other_examples_are_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"inputs": [1.0, 2.0], "labels": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    flags = ["--model", "commands:classifier", "--data", tmp_path / "a.jsonl"]
    outcome = run_here("show-data.py", [*flags, "--objective", "classification"])
    assert outcome.code == 0 and "numbers of shape [2], label 1" in outcome.out, outcome.err
