"""Claims about the report: what a page says, as a browser shows it, and what is refused."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from commands import classified, classifier, rewritten, run_here, save_llama, write_rows

import raycurv
from raycurv.data.tokenizer import LazyTokenizer
from raycurv.errors import DamagedFile, UserError
from raycurv.jobs.scored_data import ScoredData
from raycurv.reporting import wording
from raycurv.reporting.charts import Curve, Pictures
from raycurv.reporting.fit_sections import ExampleNumbers
from raycurv.reporting.page import Cell, Page, Passage, Query, Renderer, Section, Table
from raycurv.reporting.passages import Excerpt, coloured, looks_like_code, plain
from raycurv.reporting.ranking import rank
from raycurv.reporting.spectra import layer_of, roles

HERE: dict[str, Any] = {"address": "none", "quiet": True}
# What a page would obey if it were not text: markup, ends of attributes and scripts, an entity, a
# character that is two units of UTF-16, one that no byte is, and a control character.
HOSTILE = "</script><script>window.evil = 1</script> <img src=x onerror='window.evil = 2'>"
QUOTES = "\"'& &lt; é 😀 \x07 {{ 7 * 7 }}"
TRAIN = [
    {"id": f"row {n}", "text": text}
    for n, text in enumerate(
        ["the cat sat", "the dog ran", HOSTILE, QUOTES, "a mat\n\tand a sea\r\n", "the cat ran"]
    )
] + [{"id": '"><script>window.evil = 3</script>', "text": "the sea and the cat"}]
QUERIES = [
    {"id": "cats", "text": "the cat and the dog"},
    {"id": "</script>'\"", "text": f"a mat {HOSTILE}"},
    {"id": "sea", "text": "sea, sea"},
]


class Made:
    """A fit, its scores with all that may be written, and the page of these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = save_llama(folder / "model", max_position_embeddings=128)
        self.train = write_rows(folder / "train.parquet", TRAIN)
        self.queries = write_rows(folder / "queries.parquet", QUERIES)
        self.fitted = raycurv.fit(model, self.train, folder / "run", **HERE)
        self.scores = self.score("scores", per_block=True, per_token=True, self_influence=True)
        self.page = Path(raycurv.report(self.scores, folder / "page.html", passages=3))

    def score(self, name: str, **settings: Any) -> raycurv.Scores:
        place = self.folder / name
        return self.fitted.influence(self.queries, self.train, place, **HERE, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("report"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose pictures are empty: drawing them takes most of a page's time."""

    @contextmanager
    def empty(self: Pictures, width: float, height: float, label: str, made: list[str]) -> Any:
        yield mock.MagicMock()
        made.append("<svg></svg>")

    monkeypatch.setattr(Pictures, "_drawn", empty)


# In a browser


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        pytest.skip("no chromium with its chromedriver (apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1400,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, Service(driver))
    yield found
    found.quit()


@pytest.fixture
def browser(started: Any, made: Made) -> Any:
    """A browser that has just opened the page."""
    started.get(made.page.as_uri())
    return started


def shown(browser: Any, selector: str) -> list[str]:
    """The texts of elements, as they stand in the page."""
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return list(browser.execute_script(script, selector))


def test_the_browser_has_nothing_to_complain_of_and_fetches_nothing(browser: Any) -> None:
    browser.execute_script("for (const e of document.querySelectorAll('button')) e.click()")
    browser.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    # The policy holds: what it forbids is refused, and that is told.
    for forbidden, directive in (
        ("document.body.setAttribute('style', 'color: red')", "style-src"),
        ("document.body.append(Object.assign(new Image(), {src: 'data:,'}))", "default-src 'none'"),
    ):
        browser.execute_script(forbidden)
        deadline, told = time.monotonic() + 10, ""
        while directive not in told and time.monotonic() < deadline:
            told += "".join(entry["message"] for entry in browser.get_log("browser"))
        assert directive in told


def test_the_passages_of_a_query_are_those_of_its_highest_and_lowest_scores(
    browser: Any, made: Made
) -> None:
    table = made.scores.table()
    for place, query in enumerate(QUERIES, start=1):
        rows = [row for row in table.to_pylist() if row["query_id"] == query["id"]]
        falling = sorted(rows, key=lambda row: -row["score"])
        highest = [row for row in falling[:3] if row["score"] > 0]
        lowest = [row for row in falling[:-4:-1] if row["score"] < 0]
        for n, wanted in ((1, highest), (2, lowest)):
            at = f"#q{place} .columns > :nth-child({n}) .ranked > li"
            assert shown(browser, f"{at} .id") == [row["train_id"] for row in wanted]
            said = [wording.number(row["score"], signed=True) for row in wanted]
            assert shown(browser, f"{at} .score b") == said
        (text,) = shown(browser, f"#q{place} .text.query")
        assert text.strip() == query["text"]


def test_hostile_texts_and_ids_stay_texts(browser: Any, made: Made) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    assert browser.execute_script("return window.evil") is None
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.scripts.length") == 1
    texts = "".join(shown(browser, ".ranked .text"))
    assert HOSTILE in texts and "{{ 7 * 7 }}" in texts and "é 😀 \u2407" in texts
    # A control: the same characters, were they markup, would be obeyed.
    body = made.page.read_text()
    assert "<img" not in body and "&lt;img" in body
    assert TRAIN[-1]["id"] in shown(browser, ".ranked .id")


def test_tokens_have_the_colours_of_their_scores_and_texts_stay_whole(
    browser: Any, made: Made
) -> None:
    browser.execute_script("document.querySelector('#q1 details').open = true")
    rows = {
        row["train_id"]: row for row in made.scores.table().to_pylist() if row["query_id"] == "cats"
    }
    texts = {row["id"]: wording.visible(row["text"]) for row in TRAIN}
    script = """return [...document.querySelectorAll('#q1 .ranked > li')].map((li) => [
        li.querySelector('.id').textContent,
        [...li.querySelector('.text > span').childNodes].map((n) => [n.className, n.textContent]),
    ])"""
    found = browser.execute_script(script)
    assert len(found) > 2
    for id, runs in found:
        assert "".join(text for _, text in runs) == texts[id]
        looks = [look for look, text in runs for _ in text]
        scores = np.array(rows[id]["token_scores"])
        if texts[id].isascii():  # a byte is a token
            strongest = int(np.abs(scores).argmax())
            assert looks[strongest] == ("p4" if scores[strongest] > 0 else "n4")
            faint = np.abs(scores) < np.abs(scores).max() / 8 - 1e-9
            assert {looks[n] for n in np.flatnonzero(faint)} <= {""}


def test_queries_are_sorted_and_searched(browser: Any, made: Made) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    table = made.scores.table().to_pylist()
    best = {q["id"]: max(r["score"] for r in table if r["query_id"] == q["id"]) for q in QUERIES}
    falling = sorted(best, key=lambda id: -best[id])
    assert falling != list(best)
    head = browser.find_element(By.CSS_SELECTOR, ".sort [data-key=best]")
    ids = ".queries > li:not([hidden]) summary .id"
    for wanted in (falling, falling[::-1], falling):
        head.click()
        assert shown(browser, ids) == wanted
    browser.find_element(By.CSS_SELECTOR, ".sort [data-key=place]").click()
    assert shown(browser, ids) == list(best)
    search = browser.find_element(By.ID, "search")
    search.send_keys("CAT dog")
    found = shown(browser, ids)
    assert "cats" in found and shown(browser, "#found") == [f"{len(found)} of 3 queries"]
    search.send_keys(" nowhere at all")
    assert shown(browser, ids) == [] and shown(browser, "#found") == ["0 of 3 queries"]
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys(Keys.DELETE)
    assert shown(browser, ids) == list(best)


def test_tables_are_sorted_by_number(browser: Any, made: Made) -> None:
    column = "#blocks tbody tr td:nth-child(7)"
    traces = dict(
        zip(*(made.fitted.blocks()[n].to_pylist() for n in ("block", "trace")), strict=True)
    )
    head = "document.querySelector('#blocks thead th:nth-child(7)')"
    assert browser.execute_script(f"return {head}.textContent") == "Trace"
    for reverse in (True, False):
        browser.execute_script(f"{head}.querySelector('button').click()")
        wanted = sorted(traces, key=lambda name: traces[name], reverse=reverse)
        assert shown(browser, "#blocks tbody th") == wanted
        assert shown(browser, column) == [wording.number(traces[name]) for name in wanted]
        way = browser.execute_script(f"return {head}.getAttribute('aria-sort')")
        assert way == ("descending" if reverse else "ascending")


def test_the_keyboard_reaches_a_query_and_opens_it(browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.find_element(By.TAG_NAME, "body").send_keys("jj")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    opened = "return [...document.querySelectorAll('details')].map((e) => e.open)"
    assert browser.execute_script(opened) == [False, True, False]
    browser.get(browser.current_url.partition("#")[0] + "#q3")
    browser.refresh()
    assert browser.execute_script(opened) == [False, False, True]


def test_light_and_dark_are_told_apart_and_texts_are_readable_in_both(browser: Any) -> None:
    script = """const it = getComputedStyle(document.querySelector(arguments[0]));
        const bare = document.createElement('canvas').getContext('2d');
        const fill = (c) => { bare.fillStyle = c; bare.fillRect(0, 0, 1, 1); };
        const seen = () => [...bare.getImageData(0, 0, 1, 1).data].slice(0, 3);
        fill(getComputedStyle(document.querySelector('.queries')).backgroundColor);
        fill(getComputedStyle(document.querySelector(arguments[1])).backgroundColor);
        const ground = seen();
        fill(it.color);
        return [ground, seen()]"""
    browser.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")

    def contrast(text: str, ground: str) -> float:
        levels = []
        for colour in browser.execute_script(script, text, ground):
            c = np.array(colour) / 255
            linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
            levels.append(float(linear @ [0.2126, 0.7152, 0.0722]))
        return (max(levels) + 0.05) / (min(levels) + 0.05)

    grounds = []
    for _ in range(2):
        grounds.append(
            browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        for text, ground in (
            ("h1", "body"), ("dd span", "body"), (".score.plus b", ".queries"),
            (".score.minus b", ".queries"), ("thead th", "thead th"), ("footer", "body"),
            (".text .p4", ".text .p4"), (".text .n4", ".text .n4"), ("#layers .h5", "#layers .h5"),
        ):  # fmt: skip
            assert contrast(text, ground) >= 4.5, (text, grounds)
        browser.execute_script("document.querySelector('#mode').click()")
    assert grounds[0] != grounds[1]


# What a page says


def test_the_strongest_rows_are_found_a_part_of_the_scores_at_a_time() -> None:
    rng = np.random.default_rng(0)
    queries, blocks = [f"q{n}" for n in range(4)], ["layers.0.a", "layers.1.a", "layers.1.b"]
    scores = rng.normal(size=(4, 50))
    by_block = rng.normal(size=(4, 50, 3))
    rows = [
        {"query_id": q, "train_id": f"t{n}", "score": scores[i, n], "block_scores": by_block[i, n]}
        for n in range(50)
        for i, q in enumerate(queries)
    ]
    notes = {"raycurv.blocks": json.dumps(blocks)}
    table = pa.Table.from_pylist([r | {"block_scores": r["block_scores"].tolist()} for r in rows])
    table = table.replace_schema_metadata(notes)
    for size in (200, 37, 1):
        parts = [table.slice(start, size) for start in range(0, 200, size)]
        found = rank(parts, 3, 4, "here")
        assert [query.id for query in found.queries] == queries[:3] and found.blocks == blocks
        for i, query in enumerate(found.queries):
            order = np.argsort(-scores[i], kind="stable")
            kept = [f"t{n}" for n in [*order[:4], *order[-4:]]]
            assert query.rows["train_id"].to_pylist() == kept
            assert (query.scored, query.positive) == (50, (scores[i] > 0).sum())
            assert query.gain == pytest.approx(scores[i][scores[i] > 0].sum())
            sums = np.abs(by_block[i]).sum(axis=0)
            assert query.block_shares == pytest.approx(sums / sums.sum())
    ragged = pa.table(table.to_pydict() | {"block_scores": [[1.0]] * 200})
    with pytest.raises(DamagedFile, match="block scores"):
        rank([ragged.replace_schema_metadata(notes)], 3, 4, "here")


def test_examples_that_recur_are_counted() -> None:
    table = pa.table(
        {"query_id": ["a", "b", "a", "b", "a", "b"], "train_id": ["x", "x", "y", "y", "z", "z"],
         "score": [3.0, 5.0, 2.0, -1.0, 1.0, 4.0]}
    )  # fmt: skip
    found = rank([table], 10, 2, "here")
    assert found.frequent(2) == [("x", 2)] and found.frequent(3) == [("x", 2), ("z", 2)]


def test_long_texts_are_cut_where_their_tokens_matter_most() -> None:
    tokens = [f"{n:03d} " for n in range(100)]
    scores = np.zeros(100)
    scores[70:75] = [1.0, -4.0, 2.0, 0.1, -0.6]
    cut = coloured(tokens, scores.tolist(), 40)
    assert len(cut.text) == 40 and all(f"{n:03d}" in cut.text for n in range(70, 75))
    assert (cut.before + cut.after, len("".join(tokens))) == (360, 400)
    # By quarters of the strongest, from an eighth on: 1, -4, 2, 0.1, -0.6.
    assert re.search("b4i4c4a4f4", cut.looks)
    whole = coloured(tokens, scores.tolist(), 4000)
    assert whole.text == "".join(tokens) and (whole.before, whole.after) == (0, 0)
    assert coloured([], [], 10) == Excerpt("") and coloured(["a"], [0.0], 10) == Excerpt("a", "a")
    assert coloured(["a", "😀"], [1.0, 1.0], 10).looks == "e3", "units of UTF-16"
    assert plain("abc", 2) == Excerpt("ab", after=1)


def test_tokens_that_are_parts_of_a_character_add_up_to_the_text(made: Made) -> None:
    tokenizer = LazyTokenizer(made.folder / "model")
    text = "né 😀 &"
    (ids,) = tokenizer.encode([text], special=False)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) == len(text.encode()) and "".join(pieces) == text
    assert pieces[:4] == ["n", "", "é", " "]
    assert tokenizer.pieces(ids[:2])[-1] == "\ufffd", "a character that was cut"


def test_blocks_are_put_into_layers_and_roles() -> None:
    names = ["model.layers.0.mlp.up", "model.layers.11.mlp.up", "model.layers.11.experts.3.up"]
    assert [layer_of(name) for name in names] == [0, 11, 11]
    assert list(roles(names).values()) == ["mlp.up", "mlp.up", "experts.*.up"]
    assert roles(["head", *names])["head"] == "head" and layer_of("head") is None
    both = ["encoder.0.fc", "decoder.0.fc"]
    assert list(roles(both).values()) == ["encoder.*.fc", "decoder.*.fc"]
    assert roles(["0", "2"]) == {"0": "weight", "2": "weight"}


SAID = {
    0.0: "0", 1.0: "1.00", 12.0: "12.0", 123.4: "123", 1234.5: "1,230", 9999.0: "1.00\u00d710⁴",
    286_123.0: "2.86\u00d710⁵", 0.00123456: "0.00123", 1e-9: "1.00\u00d710⁻⁹",
}  # fmt: skip


def test_numbers_have_three_digits_and_their_sign() -> None:
    for value, text in SAID.items():
        assert wording.number(value) == text
        assert wording.number(value, signed=True) == ("+" + text if value else text)
        assert wording.number(-value) == ("\u2212" + text if value else text)
    assert [wording.short(x) for x in (1e-6, 0.001, 5.0, 1e5)] == ["10⁻⁶", "0.001", "5", "10⁵"]
    assert wording.number(None) == "\u2013"
    assert [wording.duration(s) for s in (0, 0.001, 3.14159, 61, 3725)] == [
        "0 s", "< 0.01 s", "3.14 s", "1 min 01 s", "1 h 02 min"
    ]  # fmt: skip


def test_settings_and_outcomes_are_said_in_words() -> None:
    assert (
        wording.damping("0.1")[0] == "0.1 \u00d7 mean Λ"
        and wording.damping("abs:1e-6")[0] == "10⁻⁶"
    )
    assert wording.damping("0")[0] == "none" and wording.rank("full")[1] == "nothing is truncated"
    assert "empirical" in wording.labels({"fisher": "empirical"})[1]
    assert "3 times" in wording.labels({"fisher": "sampled", "draws": 3})[1]
    both = wording.outcome("jittered+clamped 3")
    assert "multiple of the identity" in both and "3 eigenvalues" in both
    assert "no gradient" in wording.outcome("zero") and wording.outcome("new") == "new"


def test_code_is_told_from_prose() -> None:
    assert looks_like_code(["def f(x):\n    return x\n"])
    assert not looks_like_code(["It was the best of times,\nit was the worst of times."])


def test_pictures_have_no_inline_styles_and_names_of_their_own() -> None:
    pictures = Pictures()
    curve = Curve("<b>", np.array([1, 2, 30]), np.array([3.0, 2.0, 1e-9]))
    made = [pictures.curves([curve], {"<b>": n}, 'A "label" <b>', "eigenvalue") for n in (0, 1)]
    made.append(pictures.spans({"<i>phase</i>": [(0.0, 2.0)]}, "phases"))
    for picture in made:
        assert "style=" not in picture and "<style" not in picture and "<b>" not in picture
        assert "http" not in picture and "mathdefault" not in picture
    assert "&lt;i&gt;phase" in made[2]
    names = [set(re.findall(r' id="([^"]+)"', picture)) for picture in made]
    assert names[0] and not names[0] & names[1]
    for picture, own in zip(made, names, strict=True):
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', picture))
        assert used and used <= own


def test_a_hundred_queries_take_less_than_five_megabytes() -> None:
    # Tokens of a few letters, each of another colour than the one before it.
    tokens = [f"tok{n % 7} " for n in range(400)]
    excerpt = coloured(tokens, [(-1.0) ** n for n in range(400)], 1200)
    passages = [Passage(f"books/chapter.txt#{n}", 1.0, 1.0, excerpt) for n in range(5)]
    queries = [
        Query(n, f"q{n}", "line", plain("x" * 5000, 2400), 1.0, -1.0, 1.0, 1.0, "", "", [],
              passages, passages)
        for n in range(100)
    ]  # fmt: skip
    page = Page("t", "k", [], [], [], [], queries=queries)
    assert 2e6 < len(Renderer().html(page)) < 4.5e6


def test_the_same_results_make_the_same_page(made: Made) -> None:
    again = raycurv.report(made.scores.path, made.folder / "again.html", passages=3)
    assert Path(again).read_bytes() == made.page.read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_page_says_what_was_not_written_and_which_flag_writes_it(made: Made) -> None:
    bare = Path(raycurv.report(made.score("bare"), made.folder / "bare.html")).read_text()
    assert "--per-block" in bare and "--per-token" in bare and 'data-looks="' not in bare
    full = made.page.read_text()
    assert "--per-block" not in full and 'data-looks="' in full and "Self-influence" in full


@pytest.mark.usefixtures("undrawn")
def test_scores_that_were_cut_to_the_top_say_so(made: Made) -> None:
    top = Path(raycurv.report(made.score("top", top_k=2), made.folder / "top.html")).read_text()
    assert "4 kept: " in top and "the 2 highest and lowest are kept" in top
    assert "concentration" not in top and "concentration" in made.page.read_text()
    # What lies between the ends that were kept is not taken for the next of either.
    for one in re.findall(r'<ol class="ranked">.*?</ol>', top, re.DOTALL):
        assert 1 <= one.count("<li>") <= 2


@pytest.mark.usefixtures("undrawn")
def test_conversations_have_a_page(tmp_path: Path) -> None:
    place = save_llama(tmp_path / "model", max_position_embeddings=64)
    (place / "chat_template.jinja").write_text(
        "{% for turn in messages %}{{ turn.role }}: {% generation %}{{ turn.content }}"
        "{% endgeneration %};{% endfor %}"
    )
    turns = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "it <b> sat"}]
    data = write_rows(
        tmp_path / "t.parquet", [{"id": f"r{n}", "messages": turns} for n in range(3)]
    )
    scores = raycurv.fit(place, data, tmp_path / "run", **HERE).influence(
        data, data, tmp_path / "scores", per_token=True, **HERE
    )
    page = Path(raycurv.report(scores, tmp_path / "page.html")).read_text()
    assert "through the chat template" in page
    assert re.search('data-looks="[a-i0-9]+">user: a cat\\?;assistant: it &lt;b&gt; sat;<', page)


@pytest.mark.usefixtures("undrawn")
def test_scores_of_candidates_say_so(made: Made) -> None:
    pairs = pa.table({"query_id": ["cats", "sea"], "train_id": ["row 0", "row 4"]})
    asked = [QUERIES[0], QUERIES[2]]
    scores = made.fitted.influence(
        asked, made.train, made.folder / "some", candidates=pairs, **HERE
    )
    page = Path(raycurv.report(scores, made.folder / "some.html")).read_text()
    assert "on candidates alone, 2 pairs" in page and "--candidates-check" in page
    assert "alone" not in made.page.read_text()


@pytest.mark.usefixtures("undrawn")
def test_tokens_that_are_not_those_that_were_scored_have_no_colours(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ScoredData.tokens
    monkeypatch.setattr(ScoredData, "tokens", lambda self, ids: [t[1:] for t in tokens(self, ids)])
    page = Path(raycurv.report(made.scores, made.folder / "other.html")).read_text()
    assert "Tokens are not coloured" in page and 'data-looks="' not in page


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "facts",
    [
        {"coverage": {"covered": "<b>", "trainable": 1}},
        {"coverage": {"frozen": 3}},
        {"reading": {"data": {"truncated_examples": "many"}}},
        {"reading": {"data": {"masking": {}}}},
        {"model_notes": [1]},
    ],
)
def test_facts_that_no_job_writes_are_damage(
    facts: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(made.fitted.path, copy)
    with rewritten(copy) as said:
        said["facts"] |= facts
    assert "run.json" in refused([copy, "--out", tmp_path / "page.html"])


def test_a_fit_has_a_page_of_its_own(made: Made) -> None:
    done = run_here("report.py", [made.fitted.path, "--out", made.folder / "fit.html"])
    said = json.loads(done.out.splitlines()[-1])
    assert done.code == 0 and said["page"] == str(made.folder / "fit.html") and said["queries"] == 0
    assert f"page: {said['page']}" in done.out
    page = Path(said["page"]).read_text()
    assert "EK-FAC" in page and "model.layers.0.mlp.up_proj" in page and 'id="queries"' not in page
    # Examples have their texts, and not those that another tokenizer would make of their tokens.
    assert "the dog ran" in page and "a mat and a sea" in page and HOSTILE not in page
    file = made.folder / "model" / "tokenizer.json"
    original = file.read_text()
    file.write_text(original.replace('prefix_space": false', 'prefix_space": true', 1))
    try:
        page = Path(raycurv.report(made.fitted, made.folder / "fit.html")).read_text()
    finally:
        file.write_text(original)
    assert "Texts of the examples are not shown" in page and "the dog ran" not in page


@pytest.mark.usefixtures("undrawn")
def test_a_fit_of_other_runs_names_them(made: Made, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.parquet", [{"id": "new", "text": "a dog and a mat"}])
    longer = made.fitted.extend(more, tmp_path / "longer", **HERE)
    page = Path(raycurv.report(longer, tmp_path / "page.html")).read_text()
    assert f"{more} and what went into {made.fitted.path}<span>8 examples" in page


@pytest.mark.parametrize("method", ["kfac", "diagonal", "identity", "mfac"])
@pytest.mark.usefixtures("undrawn")
def test_every_method_has_a_page(method: str, tmp_path: Path) -> None:
    fitted = raycurv.fit(
        classifier, classified(12), tmp_path / "run", objective="classification", method=method,
        rows=6 if method == "mfac" else None, **HERE,
    )  # fmt: skip
    scores = fitted.influence(classified(2, 1), classified(12), tmp_path / "scores", **HERE)
    page = Path(raycurv.report(scores, tmp_path / "page.html")).read_text()
    assert 'id="queries"' in page and wording.method({"method": method, "rows": 6})[0] in page
    assert ("Eigenvalues" in page) == (method != "identity")
    page = Path(raycurv.report(fitted, tmp_path / "fit.html")).read_text()
    assert "not shown" not in page  # numbers have no texts to miss


# What is refused, or told


def refused(flags: list[Any]) -> str:
    """The message of a job that ends by the mistake of a user."""
    done = run_here("report.py", flags)
    said = json.loads(done.out.splitlines()[-1])
    assert done.code == 2 and "Traceback" not in done.err, done.err
    return str(said["message"])


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_finished_is_refused(made: Made, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "page.html"]
    for place, phase in ((made.fitted.path, "tables"), (made.scores.path, "scores")):
        copy = tmp_path / phase
        shutil.copytree(place, copy)
        with rewritten(copy) as said:
            said["complete"].remove(phase)
        message = refused([copy, *out])
        assert "finished" in message and "same" in message
    assert "no run.json" in refused([tmp_path, *out])
    assert "the directory of a fit or of scores, got nothing" in refused(out)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_other_results_are_refused(made: Made, tmp_path: Path) -> None:
    products = made.fitted.ihvp(made.queries, tmp_path / "ihvp", **HERE)
    assert "IHVPs alone" in refused([products.path, "--out", tmp_path / "page.html"])
    with rewritten(Path(made.fitted.path)) as said:
        before = dict(said)
        said["job"] = "evaluate"
    try:
        assert refused([made.fitted.path, "--out", tmp_path / "page.html"])
    finally:
        with rewritten(Path(made.fitted.path)) as said:
            said.update(before)


def test_a_page_goes_into_a_file_of_html_that_can_be_made(made: Made, tmp_path: Path) -> None:
    assert "ends in .html" in refused([made.scores.path, "--out", tmp_path / "run.json"])
    assert "directory that exists" in refused(
        [made.scores.path, "--out", tmp_path / "a" / "b.html"]
    )
    (tmp_path / "c.html").mkdir()
    assert "the directory" in refused([made.scores.path, "--out", tmp_path / "c.html"])


@pytest.mark.parametrize("library", ["matplotlib.figure", "jinja2"])
def test_a_library_that_is_not_there_is_named_with_what_installs_it(
    library: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = builtins.__import__

    def without(name: str, *more: Any, **others: Any) -> Any:
        if name == library:
            raise ImportError(f"No module named {name!r}")
        return before(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refused([made.scores.path, "--out", tmp_path / "page.html"])
    assert "pip install 'raycurv[report]'" in message and library.partition(".")[0] in message


@pytest.mark.usefixtures("undrawn")
def test_data_that_has_moved_is_told_and_may_be_given_again(made: Made, tmp_path: Path) -> None:
    there = tmp_path / made.train.name
    made.train.rename(there)
    try:
        page = Path(raycurv.report(made.scores.path, tmp_path / "page.html")).read_text()
        assert "Texts of the training examples are not shown" in page and "row 0" in page
        again = ["--out", tmp_path / "page.html", "--train", there]
        assert run_here("report.py", [made.scores.path, *again]).code == 0
        page = (tmp_path / "page.html").read_text()
        assert "not shown" not in page and "the cat sat" in page
        raycurv.report(made.scores, tmp_path / "page.html", train=str(there))
        assert (tmp_path / "page.html").read_text() == page
        # Another file in its place is not taken for it.
        write_rows(made.train, TRAIN[:-1])
        page = Path(raycurv.report(made.scores.path, tmp_path / "page.html")).read_text()
        assert "Texts of the training examples are not shown" in page and "other data" in page
    finally:
        there.rename(made.train)


@pytest.mark.usefixtures("undrawn")
def test_examples_of_other_data_are_not_taken_for_the_fits(made: Made, tmp_path: Path) -> None:
    """They may have the same ids."""
    others = [{"id": row["id"], "text": "another"} for row in TRAIN]
    other = write_rows(tmp_path / "other.parquet", others)
    scores = made.fitted.influence(
        made.queries, other, tmp_path / "scores", self_influence=True, **HERE
    )
    for found, alike in ((made.scores, True), (scores, False)):
        page = Path(raycurv.report(found, tmp_path / "page.html")).read_text()
        (queries, examples) = page.split('<section id="examples">')
        assert ("Self-influence" in examples, "<th>Text" in examples) == (alike, False)
        assert ("another" in queries) != alike and "another" not in examples
        assert ("the dog ran" in examples) == alike


@pytest.mark.usefixtures("undrawn")
def test_a_fit_that_cut_its_rows_another_way_costs_no_passage_its_text(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its examples, its pieces, are none of those that were scored."""
    examples = ExampleNumbers.of

    def pieces(run: raycurv.Run, own: Any) -> ExampleNumbers:
        found = examples(run, own)
        return ExampleNumbers([f"{id}#1" for id in found.ids], found.columns)

    monkeypatch.setattr(ExampleNumbers, "of", pieces)
    page = Path(raycurv.report(made.scores, tmp_path / "page.html")).read_text()
    assert "not shown" not in page and "the dog ran" in page and "row 0#1" in page


@pytest.mark.usefixtures("undrawn")
def test_names_that_are_no_text_are_shown(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(made.fitted.path, copy)
    with rewritten(copy) as said:
        said["facts"]["data"] = "/of/byte/\udcff"
    assert "/of/byte/\\udcff" in Path(raycurv.report(copy, tmp_path / "page.html")).read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_fit_that_is_not_the_one_of_the_scores_is_not_shown(made: Made, tmp_path: Path) -> None:
    other = raycurv.fit(
        made.folder / "model", made.train, tmp_path / "other", fisher="empirical", **HERE
    )
    with pytest.raises(UserError, match="the fit that the scores came from, got another one"):
        raycurv.report(made.scores, tmp_path / "page.html", run=other.path)
    copy = tmp_path / "scores"
    shutil.copytree(made.scores.path, copy)
    for place, why in (
        (other.path, "holds another one by now"),
        ("s3://x/run", "Give it by --run"),
    ):
        with rewritten(copy) as said:
            said["facts"]["run"] = place
        page = Path(raycurv.report(copy, tmp_path / "page.html")).read_text()
        assert why in page and 'id="curvature"' not in page and 'id="queries"' in page


def test_tables_are_text_whatever_they_hold() -> None:
    table = Table("<t>", ["<h>"], [[Cell("<c>"), Cell.of(None), Cell("x", 1.0, 0.5)]], "<s>", True)
    section = Section("a", "<n>", "<x>", ["<p>"], tables=[table])
    html = Renderer().html(Page("<title>", "<k>", [("<f>", "<g>", "<m>")], ["<o>"], [section], []))
    for text in ("t", "h", "c", "s", "n", "x>", "k", "f", "g", "m", "o"):
        assert f"<{text.rstrip('>')}>" not in html and f"&lt;{text.rstrip('>')}&gt;" in html
