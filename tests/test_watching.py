"""Claims about watching a job: its timeline, the trace and the picture of it, its progress, its
metrics."""

from __future__ import annotations

import gzip
import io
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from commands import classified, classifier, run_here
from endpoint import scraped, settled
from failures import Strike, lost, striking, timeline
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from raycurv.batch import Batch
from raycurv.driver.settings import IN_MEMORY
from raycurv.driver.timeline_table import write_timeline
from raycurv.files.store import Store
from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.fitting import fit
from raycurv.jobs.inputs import Inputs
from raycurv.jobs.timeline.lanes import Lanes, read_lanes
from raycurv.jobs.timeline.picture import BACKWARD, FORWARD, TURN, draw, save_picture
from raycurv.jobs.timeline.trace_events import trace_events
from raycurv.onray.metrics import ActorMetrics, DriverMetrics
from raycurv.progress import displays
from raycurv.progress.activity import MOST_LINES, Activity
from raycurv.progress.phase import PhaseProgress
from raycurv.progress.reporter import Reporter
from raycurv.stages.pool import InProcess
from raycurv.stages.spans import Span, timed
from raycurv.stages.transport import pack, unpack

torch.set_num_threads(1)

EXAMPLES, MICROBATCHES, PASSES = 19, 5, 2
ACTORS = [f"replica 0, stage {stage}" for stage in range(2)]
PHASES = ["loading", "layout", "first pass: A and G", "eigendecompositions", "second pass: Λ"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the whole file, whose metrics are a second old at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 500},
        )
        yield
        ray.shutdown()


@dataclass(frozen=True)
class Watched:
    """A run, what was said of it, and what the endpoint showed after it."""

    folder: str
    log: list[dict[str, Any]]
    left: list[int]
    metrics: dict[tuple[str, str], float]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return timeline(self.folder)

    def lanes(self, *phases: str) -> Lanes:
        return read_lanes(Store(self.folder), phases)


def watched(folder: Path, strikes: Sequence[Strike]) -> Watched:
    """A fit in two stages, with a JSON log; and the metrics once they have settled."""
    settings = FitSettings(
        model=IN_MEMORY, data=IN_MEMORY, out=str(folder), objective="classification",
        dtype="float64", batch_tokens=4, stages=2, address="local", log="json",
    )  # fmt: skip
    left: list[int] = []
    shown = DriverMetrics.left

    def spied(metrics: DriverMetrics, task: str, count: int) -> None:
        left.append(count)
        shown(metrics, task, count)

    before = scraped()
    log = io.StringIO()
    with redirect_stderr(log), striking(*strikes), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DriverMetrics, "left", spied)
        fit(settings, Inputs(model=classifier, data=classified(EXAMPLES)))
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return Watched(str(folder), lines, left, settled(before))


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watched(tmp_path_factory.mktemp("undisturbed") / "run", [])


@pytest.fixture(scope="module")
def broken(undisturbed: Watched, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The same with an actor that is killed on its way, in one pass."""
    return watched(tmp_path_factory.mktemp("broken") / "run", [Strike("turn", 2, 0, 1)])


# The endpoint


def test_the_endpoint_counts_microbatches_and_tokens_exactly(undisturbed: Watched) -> None:
    for actor in ACTORS:
        assert undisturbed.metrics["microbatches_total", actor] == MICROBATCHES * PASSES
        assert undisturbed.metrics["tokens_total", actor] == EXAMPLES * PASSES
        assert undisturbed.metrics["memory_bytes", actor] > 1e7
    assert ("retries_total", "actor") not in undisturbed.metrics


def test_the_endpoint_s_seconds_are_those_of_the_timeline(undisturbed: Watched) -> None:
    for actor in ACTORS:
        rows = [row for row in undisturbed.rows if row["actor"] == actor]
        spent = sum((row["end"] - row["start"]).total_seconds() for row in rows)
        whole = (rows[-1]["end"] - rows[0]["start"]).total_seconds()
        seconds = {
            kind: undisturbed.metrics["seconds_total", f"{actor} | {kind}"]
            for kind in ("compute", "transport", "wait")
        }
        transport = sum(row["transport"] for row in rows)
        assert seconds["transport"] == pytest.approx(transport, abs=1e-3)
        assert seconds["compute"] == pytest.approx(spent - transport, abs=1e-3)
        assert seconds["wait"] == pytest.approx(whole - spent, abs=1e-3)


def test_eigendecompositions_count_down_to_none(undisturbed: Watched) -> None:
    factors = 6
    assert undisturbed.left[0] == factors and undisturbed.left[-1] == 0
    assert all(a >= b for a, b in pairwise(undisturbed.left))
    assert undisturbed.metrics["eigendecompositions_left", ""] == 0
    metrics = DriverMetrics()
    metrics.left("decompose_factors", 3)
    assert settled(scraped())["eigendecompositions_left", ""] == 3
    metrics.left("decompose_factors", 0)


def test_a_killed_actor_counts_as_a_retry(broken: Watched) -> None:
    assert broken.metrics["retries_total", "actor"] == 1
    # What had to go again came by again.
    first = broken.metrics["microbatches_total", ACTORS[0]]
    assert first > MICROBATCHES * PASSES


def masked(index: int = 0) -> Batch:
    """A microbatch of two examples, of three tokens and of one."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return Batch(index, ("a", "b"), torch.zeros(2, 3, dtype=torch.int64), mask)


def test_padding_is_no_token_and_looking_at_a_microbatch_does_not_count(cluster: None) -> None:
    before, metrics = scraped(), ActorMetrics("counting")
    packed = (pack(masked()), None)
    for method in ("forward", "turn", "discover"):
        metrics.passed(method, packed)
    found = settled(before)
    assert found["tokens_total", "counting"] == 8
    assert found["microbatches_total", "counting"] == 2


def test_what_is_noted_of_a_call_takes_less_than_a_third_of_a_millisecond(cluster: None) -> None:
    metrics = ActorMetrics("measured")
    args = (pack(masked()), None)

    def work(batch: Batch, hidden: None) -> int:
        return batch.index

    def noted() -> None:
        _, span = timed("measured", "forward", work, args, unpack, pack)
        metrics.note(span)
        metrics.passed("forward", args)

    def bare() -> None:
        pack(work(*(unpack(arg) for arg in args)))

    took = []
    for _ in range(400):
        times = [time.perf_counter()]
        for call in (noted, bare):
            call()
            times.append(time.perf_counter())
        took.append((times[1] - times[0]) - (times[2] - times[1]))
    print(f"{1e3 * statistics.median(took):.3f} ms a call")
    assert statistics.median(took) < 0.3e-3


# The timeline


def passes(watched: Watched) -> Counter[tuple[str, str, str, int]]:
    """How often which actor did which operation of which microbatch, in which phase."""
    return Counter(
        (row["phase"], row["actor"], row["operation"], row["microbatch"])
        for row in watched.rows
        if row["operation"] in ("forward", "turn", "backward")
    )


def test_every_microbatch_comes_by_every_actor_once(undisturbed: Watched, broken: Watched) -> None:
    expected = {
        (phase, *who, m): 1
        for phase in (PHASES[2], PHASES[4])
        for who in (("replica 0, stage 0", "forward"), ("replica 0, stage 0", "backward"),
                    ("replica 0, stage 1", "turn"))
        for m in range(MICROBATCHES)
    }  # fmt: skip
    assert passes(undisturbed) == expected
    # After a loss some come by again, in the pass that it was in.
    again = {key for key, times in passes(broken).items() if times > 1}
    assert again and {phase for phase, *_ in again} == {PHASES[2]}


def test_an_actor_does_one_thing_at_a_time(undisturbed: Watched, broken: Watched) -> None:
    for one in (undisturbed, broken):
        for lane in one.lanes().lanes:
            for bar, following in pairwise(lane.work):
                # Two readings of a clock, in whole microseconds.
                assert following.start >= bar.end - 2e-6
    tasks = [lane for lane in undisturbed.lanes().lanes if lane.task]
    assert sum(len(lane.work) for lane in tasks) == 1


def test_phases_of_the_timeline_are_those_of_the_job(undisturbed: Watched) -> None:
    phases = undisturbed.lanes().phases
    assert list(phases) == PHASES
    assert all(a[-1][1] <= b[0][0] for a, b in pairwise(phases.values()))


# Made-up timelines


def write(folder: Path, *phases: tuple[str, Sequence[Span]]) -> Store:
    """A run directory with a timeline of these spans."""
    store, pool = Store(str(folder)), InProcess()
    for phase, spans in phases:
        pool.spans.extend(spans)
        write_timeline(store, pool, phase)
    return store


def span(actor: str, operation: str, start: float, end: float, m: int = -1, **more: Any) -> Span:
    return Span(actor, operation, m, 1e9 + start, 1e9 + end, **more)


MICROSECOND = timedelta(microseconds=1)
MADE_UP: list[tuple[str, list[Span]]] = [
    ("one", [
        span("replica 0, stage 10", "forward", 0, 4, 0, transport=1.0),
        span("replica 0, stage 2", "turn", 4, 6, 0),
        span("replica 0, stage 2", "lost", 6, 6, 1, note="turn: killed"),
        span("replica 0, stage 2", "rebuild", 6, 9),
        span("replica 0, stage 2", "load", 7, 9),
    ]),
    ("two", [
        span("task", "decompose_factor", 9, 12, note="a"),
        span("task", "decompose_factor", 10, 11, note="b"),
        span("task", "decompose_factor", 11, 12, note="c"),
    ]),
]  # fmt: skip


def test_seconds_of_an_actor_add_up_to_those_of_the_window(tmp_path: Path) -> None:
    lanes = read_lanes(write(tmp_path, *MADE_UP))
    names = ["replica 0, stage 2", "replica 0, stage 10", "task 1", "task 2"]
    assert [lane.name for lane in lanes.lanes] == names
    second, tenth, tasks = lanes.shares()
    assert (second.compute, second.rebuilding, second.waiting) == pytest.approx((4, 1, 7))
    assert (tenth.compute, tenth.transport, tenth.waiting) == pytest.approx((3, 1, 8))
    assert (second.busy, tenth.busy) == pytest.approx((4 / 12, 4 / 12))
    assert (second.lost, tenth.lost) == (1, 0)
    assert (tasks.at_a_time, tasks.compute, tasks.waiting) == pytest.approx((2, 5, 19))


def test_a_phase_or_a_time_is_shown_alone(tmp_path: Path) -> None:
    store = write(tmp_path, *MADE_UP)
    one = read_lanes(store, ["one"])
    assert (one.start, one.end) == pytest.approx((0, 9))
    assert not any(lane.task for lane in one.lanes)
    some = read_lanes(store, start=5, end=8)
    (second,) = (share for share in some.shares() if share.actor == "replica 0, stage 2")
    assert (second.compute, second.rebuilding, second.waiting) == pytest.approx((2, 1, 0))


# The trace


def named(events: Sequence[dict[str, Any]], kind: str) -> dict[int, str]:
    """Number of a process or thread -> its name."""
    field = {"process_name": "pid", "thread_name": "tid"}[kind]
    return {e[field]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == kind}


def test_the_trace_has_the_operations_of_the_table(broken: Watched, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("plain.json", "packed.json.gz")]
    for path in paths:
        done = run_here("timeline.py", ["--run", broken.folder, "--trace", path])
        assert done.code == 0, done.err
        assert json.loads(done.out.splitlines()[-1])["trace"] == str(path)
    assert gzip.decompress(paths[1].read_bytes()) == paths[0].read_bytes()
    events = json.loads(paths[0].read_text())["traceEvents"]
    processes, threads = named(events, "process_name"), named(events, "thread_name")
    assert not processes.keys() & threads.keys()
    expected: Counter[tuple[str, str, str]] = Counter()
    for row in broken.rows:
        if row["operation"] not in ("lost", "rebuild"):
            actor = row["actor"]
            expected[row["node"], actor, "us"] += (row["end"] - row["start"]) // MICROSECOND
            expected[row["node"], actor, row["operation"]] += 1
    found: Counter[tuple[str, str, str]] = Counter()
    for event in events:
        if event["ph"] == "X" and event["cat"] != "phase":
            actor = "task" if event["cat"] == "task" else threads[event["tid"]]
            node = processes[event["pid"]]
            found[node, actor, "us"] += event["dur"]
            found[node, actor, event["name"]] += 1
    assert found == expected
    phases = [e["name"] for e in events if e.get("cat") == "phase"]
    assert phases == PHASES


def test_the_trace_marks_what_was_lost_and_built_again(broken: Watched) -> None:
    events = trace_events(broken.lanes())
    processes, threads = named(events, "process_name"), named(events, "thread_name")
    marks = [event for event in events if event["ph"] == "i"]
    assert [event["name"] for event in marks] == ["lost", "rebuild"]
    (died, again), (row,) = marks, lost(broken.rows)
    assert {threads[event["tid"]] for event in marks} == {ACTORS[1]}
    assert {processes[event["pid"]] for event in marks} == {row["node"]}
    assert died["args"]["note"] == row["note"] and died["args"]["microbatch"] == row["microbatch"]
    assert again["args"]["seconds"] > 0


def test_a_loss_is_where_the_actor_was_and_not_where_the_driver_is(tmp_path: Path) -> None:
    actor = ACTORS[0]
    spans = [
        span(actor, "turn", 0, 1, 0, node="far"),
        span(actor, "lost", 1, 1, 1, note="turn: killed", node="driver"),
        span(actor, "load", 2, 3, node="near"),
    ]
    events = trace_events(read_lanes(write(tmp_path, ("a phase", spans))))
    processes = named(events, "process_name")
    at = [(e["name"], processes[e["pid"]]) for e in events if e["ph"] in "Xi" and e["pid"] > 2]
    assert sorted(at) == [("load", "near"), ("lost", "far"), ("turn", "far")]


def test_viewers_find_what_they_need_in_every_event(tmp_path: Path) -> None:
    lanes = read_lanes(write(tmp_path, *MADE_UP))
    needed = {
        "X": {"name", "cat", "ts", "dur", "pid", "tid"},
        "i": {"name", "cat", "ts", "pid", "tid", "s"},
        "C": {"name", "ts", "pid", "args"},
        "M": {"name", "pid", "args"},
    }
    last: dict[tuple[int, int], int] = {}
    named = set()
    for event in trace_events(lanes):
        assert needed[event["ph"]] <= event.keys()
        assert all(isinstance(event[name], int) for name in ("pid", "tid"))
        if event["ph"] == "M":
            named.add(event["tid"])
        elif event["ph"] == "X":
            # Nothing before it has a name, and nothing on a thread lies across something else.
            assert {event["pid"], event["tid"]} <= named
            assert event["ts"] >= last.get((event["pid"], event["tid"]), 0) and event["dur"] > 0
            last[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    assert max(last.values()) == 12_000_000
    notes = [e["args"]["note"] for e in trace_events(lanes) if e.get("cat") == "task"]
    assert sorted(notes) == ["a", "b", "c"]
    (forward,) = (e["args"] for e in trace_events(lanes) if e["name"] == "forward")
    assert (forward["microbatch"], forward["transport_seconds"]) == (0, 1.0)
    assert "note" not in forward


def test_a_trace_of_a_phase_or_a_time_has_nothing_else(tmp_path: Path) -> None:
    store = write(tmp_path, *MADE_UP)
    for lanes, operations in (
        (read_lanes(store, ["two"]), {"decompose_factor"}),
        (read_lanes(store, start=6.5, end=8), {"load"}),
    ):
        kinds = {e["name"] for e in trace_events(lanes) if e.get("cat") in ("stage", "task")}
        assert kinds == operations


# The picture


def drawn(figure: Any, ending: str) -> dict[str, list[float]]:
    """Lane -> where the bars of a kind begin, as the picture has them."""
    axes = figure.axes[0]
    found = {}
    for artist in axes.collections:
        lane, _, kind = (artist.get_gid() or "").partition("/")
        if kind == ending:
            found[lane] = [float(path.vertices[:, 0].min()) for path in artist.get_paths()]
    return found


def test_the_picture_has_every_operation_where_it_was(undisturbed: Watched) -> None:
    figure = draw(undisturbed.lanes(PHASES[2]), "a run")
    rows = [row for row in undisturbed.rows if row["phase"] == PHASES[2]]
    start = min(row["start"] for row in undisturbed.rows)
    for kind, operation in ((FORWARD, "forward"), (TURN, "turn"), (BACKWARD, "backward")):
        expected: dict[str, list[float]] = {}
        for row in rows:
            if row["operation"] == operation:
                seconds = (row["start"] - start).total_seconds()
                expected.setdefault(row["actor"], []).append(seconds)
        found = drawn(figure, kind)
        assert found.keys() == expected.keys()
        for lane, times in found.items():
            assert times == pytest.approx(sorted(expected[lane]), abs=1e-5)


def test_the_picture_marks_what_was_lost_and_built_again(
    undisturbed: Watched, broken: Watched
) -> None:
    for one, failures in ((undisturbed, {}), (broken, {ACTORS[1]: 1})):
        figure = draw(one.lanes(), "a run")
        crosses = {
            line.get_gid().partition("/")[0]: len(line.get_xdata())
            for line in figure.axes[0].lines
            if (line.get_gid() or "").endswith("/lost")
        }
        assert crosses == failures
        assert {lane: len(t) for lane, t in drawn(figure, "rebuild").items()} == failures
        labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        assert {"lost", "rebuild"} <= labels if failures else not {"lost", "rebuild"} & labels


def test_the_picture_names_phases_lanes_and_shares(undisturbed: Watched) -> None:
    lanes = undisturbed.lanes()
    figure = draw(lanes, "a run")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [x.name for x in lanes.lanes]
    phases = [text.get_text().strip() for text in axes.texts if text.get_gid() == "phase"]
    assert phases == PHASES
    shares = [t.get_text().strip() for t in axes.texts if t.get_gid() == "share"]
    assert shares == [f"{100 * share.busy:.0f} %" for share in lanes.shares()[:2]]


def test_thin_bars_and_many_lanes_stay_visible(tmp_path: Path) -> None:
    spans = [
        span(f"replica {r}, stage {s}", "forward", 40.0 * m + s, 40.0 * m + s + 0.001, m)
        for r in range(8) for s in range(4) for m in range(20)
    ]  # fmt: skip
    figure = draw(read_lanes(write(tmp_path, ("a phase", spans))), "32 lanes")
    axes = figure.axes[0]
    bars = [c for c in axes.collections if (c.get_gid() or "").endswith(FORWARD)]
    assert len(bars) == 32 and all(len(c.get_paths()) == 20 for c in bars)
    for collection in bars:
        # A millisecond of 13 minutes has no width to speak of: what shows is its edge.
        assert min(collection.get_linewidths()) >= 0.8
        assert (collection.get_edgecolors() == collection.get_facecolors()[0]).all()
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    # From the top of the picture down, no label on another.
    assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))


def test_what_is_too_dense_for_hairlines_has_none(tmp_path: Path) -> None:
    """Or a lane that is mostly empty would look full."""
    spans = [
        span(ACTORS[s], "forward", m, m + 0.2 + 0.5 * s, m) for m in range(3000) for s in (0, 1)
    ]
    store = write(tmp_path / "run", ("a phase", spans))
    figure = draw(read_lanes(store), "a run")
    for collection in figure.axes[0].collections:
        if (collection.get_gid() or "").endswith(FORWARD):
            assert max(collection.get_linewidths()) == 0
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, shades = np.asarray(canvas.buffer_rgba()), []
    for y in range(2):
        column, row = figure.axes[0].transData.transform((1500, y))
        shades.append(255 - pixels[len(pixels) - int(row), int(column), 0])
    # A fifth, and seven tenths, of the time: not white, and not the same.
    assert 0 < shades[0] < shades[1] < 255
    # A burst in a long time is no reason, nor is a part that has room for bars.
    few = [span(ACTORS[0], "forward", m / 100, m / 100 + 0.001, m) for m in range(20)]
    few.append(span(ACTORS[0], "forward", 500, 1000, 100))
    burst = read_lanes(write(tmp_path / "burst", ("a phase", few)))
    for lanes in (burst, read_lanes(store, start=100, end=150)):
        for collection in draw(lanes, "a run").axes[0].collections:
            if (collection.get_gid() or "").endswith(FORWARD):
                assert min(collection.get_linewidths()) > 0


def test_the_same_timeline_gives_the_same_picture(tmp_path: Path) -> None:
    lanes = read_lanes(write(tmp_path / "run", *MADE_UP))
    for ending in ("svg", "png"):
        one, other = (tmp_path / f"{n}.{ending}" for n in range(2))
        for path in (one, other):
            save_picture(lanes, "a run", str(path))
        assert one.read_bytes() == other.read_bytes() != b""


# The job


def test_the_job_draws_and_says_who_waited(broken: Watched, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    done = run_here("timeline.py", ["--run", broken.folder, "--picture", picture])
    assert done.code == 0, done.err
    assert "waiting" in done.out and picture.read_text().startswith("<?xml")
    said = json.loads(done.out.splitlines()[-1])
    assert said["status"] == "complete" and said["picture"] == str(picture)
    by_actor = {one["actor"]: one for one in said["actors"]}
    assert list(by_actor) == [*ACTORS, "tasks"]
    assert [by_actor[actor]["lost"] for actor in ACTORS] == [0, 1]
    for actor in ACTORS:
        parts = ("compute", "transport", "waiting", "rebuilding")
        whole = sum(by_actor[actor][part] for part in parts)
        assert whole == pytest.approx(said["to"] - said["from"], abs=1e-3)
    assert set(said["phases"]) == set(PHASES)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    write(Path(run), *MADE_UP)
    for flags, text in (
        (["--run", tmp_path / "nothing"], "the timeline of a run"),
        (["--run", run, "--phase", "three"], "'one', 'two'"),
        (["--run", run, "--from", 50], "up to 12.0 s"),
        (["--run", run, "--from", 5, "--to", 4], "--from"),
        (["--run", run, "--picture", "a.pdf"], ".png or .svg"),
        (["--run", run, "--picture", tmp_path / "no" / "a.png"], "a directory that exists"),
        (["--run", run, "--trace", "a.txt"], ".json or .json.gz"),
        (["--run", run, "--trace", tmp_path / "no" / "a.json"], "a directory that exists"),
    ):  # fmt: skip
        done = run_here("timeline.py", flags)
        assert done.code == 2 and text in done.err, done.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run_here("timeline.py", ["--run", run, "--picture", tmp_path / "a.png"])
    assert done.code == 2 and "[plots]" in done.err
    assert run_here("timeline.py", ["--run", run]).code == 0


def test_a_long_pause_is_pointed_out(tmp_path: Path) -> None:
    late = [span("replica 0, stage 2", "turn", 5000, 5004)]
    run = tmp_path / "run"
    write(run, *MADE_UP, ("later", late))
    assert "--from 5000" in run_here("timeline.py", ["--run", run]).out
    assert "--from" not in run_here("timeline.py", ["--run", run, "--to", 12]).out


# Progress


def test_the_json_log_has_the_phases_and_the_failure(undisturbed: Watched, broken: Watched) -> None:
    for one in (undisturbed, broken):
        ended = [line for line in one.log if line["event"] == "end"]
        assert [line["phase"] for line in ended] == ["examples", *PHASES]
        assert all(line["done"] == line["total"] for line in ended)
        for line in one.log:
            assert datetime.fromisoformat(
                line["time"].replace("Z", "+00:00")
            ).utcoffset() == timedelta(0)
            assert {"level", "message"} <= line.keys()
        first_pass = next(line for line in ended if line["phase"] == PHASES[2])
        assert first_pass["tokens_per_second"] > 0 and 0 < first_pass["busy"] <= 1
        assert one.log[-1]["event"] == "summary"
    failures = [line for line in broken.log if line["event"] in ("lost", "rebuild")]
    died, again = failures
    (row,) = lost(broken.rows)
    # It was asked for microbatch 2 when it was killed, and may have been at one before.
    assert died["microbatch"] == row["microbatch"] <= 2
    assert (died["event"], died["actor"]) == ("lost", ACTORS[1])
    assert (died["operation"], died["phase"], died["level"]) == ("turn", PHASES[2], "warning")
    assert again["event"] == "rebuild" and again["actor"] == ACTORS[1] and again["seconds"] > 0
    assert not [line for line in undisturbed.log if line["level"] != "info"]


def test_an_error_is_json_as_well(tmp_path: Path) -> None:
    flags = ["--model", "commands:classifier", "--data", tmp_path / "none.jsonl"]
    flags += ["--out", tmp_path / "out", "--address", "none"]
    for log in ("json", "text"):
        done = run_here("fit.py", [*flags, "--log", log])
        assert done.code == 2
        last = done.err.splitlines()[-1]
        if log == "json":
            said = json.loads(last)
            assert (said["level"], said["event"], said["job"]) == ("error", "failed", "fit.py")
        else:
            assert not last.startswith("{")


def reporter_to(file: io.StringIO, terminal: bool) -> Reporter:
    console = Console(file=file, force_terminal=terminal, width=110, height=40)
    return Reporter(console=console)


def recent(actor: str, operation: str = "turn", seconds: float = 0.5, m: int = 7) -> Span:
    now = time.time()
    return Span(actor, operation, m, now - seconds, now, memory=int(1.2e9))


def test_lines_say_how_busy_the_actors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displays, "LINE_EVERY", 0.0)
    file = io.StringIO()
    reporter = reporter_to(file, terminal=False)
    with reporter.phase("a phase", 3, "microbatches") as phase:
        phase.advance(1, 100)
        reporter.watch(recent("replica 0, stage 0"))
        phase.advance(1, 100)
        reporter.watch(Span("replica 0, stage 0", "lost", 7, 0, 0, note="turn: killed"))
        phase.advance(1, 100)
    first, second, failure, last = file.getvalue().splitlines()
    assert "busy" not in first and "1/3 microbatches" in first and "left" in first
    assert "busy" in second and "tokens/s" in second
    assert failure == "replica 0, stage 0 was lost in turn of microbatch 7: killed"
    assert last.startswith("a phase 3/3 microbatches") and "left" not in last


def test_a_terminal_shows_one_display_for_phases_within_phases() -> None:
    file = io.StringIO()
    reporter = reporter_to(file, terminal=True)
    with reporter.phase("outer", 2, "microbatches") as outer:
        reporter.watch(recent("replica 0, stage 1"))
        outer.advance(1, 100)
        with reporter.phase("inner", 1, "stages") as inner:
            reporter.say("a word")
            inner.advance(1)
            # The display is drawn twice a second.
            time.sleep(0.8)
        outer.advance(1, 100)
    with pytest.raises(ValueError), reporter.phase("broken", 1, "stages"):
        raise ValueError
    with reporter.phase("after", 1, "stages") as after:
        after.advance(1)
    shown = file.getvalue()
    for text in ("outer", "inner", "a word", "broken", "after", "turn of microbatch 7", "1.20 GB"):
        assert text in shown
    # The last picture of the first display has the bars, and no actors any more.
    final = shown[: shown.index("broken")].rpartition("outer")[2]
    assert "inner" in final and "stage 1" not in final
    assert reporter.seconds.keys() == {"outer", "inner", "broken", "after"}


def test_a_dozen_actors_have_a_line_each_and_the_others_one() -> None:
    activity = Activity()
    for stage in reversed(range(MOST_LINES)):
        activity.add(recent(f"replica 0, stage {stage}"))
    assert len(activity.lines()) == MOST_LINES
    for stage in range(MOST_LINES, 32):
        activity.add(recent(f"replica 0, stage {stage}"))
    lines = activity.lines()
    assert len(lines) == MOST_LINES + 1
    assert "stage 2 " in lines[2] and "stage 10" in lines[10]
    assert "and 20 more" in lines[-1]


def test_busy_is_a_share_of_the_last_seconds() -> None:
    now = [1000.0]
    activity = Activity(lambda: now[0])
    assert activity.busy() == ""

    def work(actor: str, operation: str, start: float, end: float) -> None:
        activity.add(Span(actor, operation, -1, start, end))

    work("replica 0, stage 0", "forward", 1000, 1004)
    work("replica 0, stage 1", "turn", 1004, 1010)
    assert activity.busy() == "busy 50 %"
    # Being built again is no work.
    work("replica 0, stage 1", "rebuild", 1010, 1020)
    assert activity.busy() == "busy 50 %"
    # What is long ago does not count.
    work("replica 0, stage 1", "turn", 1090, 1100)
    assert [doing.busy for doing in activity.actors()] == pytest.approx([0, 1 / 3])
    # Nor does what comes late, from an actor whose answer had to wait.
    work("replica 1, stage 0", "forward", 1000, 1004)
    assert [doing.busy for doing in activity.actors()] == pytest.approx([0, 1 / 3, 0])
    now[0] = 1100.0
    activity.begin()
    work("task", "decompose_factor", 1100, 1110)
    work("task", "decompose_factor", 1100, 1110)
    assert activity.busy() == "2.0 tasks at a time"


def test_what_an_earlier_run_did_says_nothing_about_the_rate() -> None:
    fresh, resumed = (PhaseProgress("a phase", 100, "microbatches") for _ in range(2))
    for phase in (fresh, resumed):
        phase.started -= 10.0
    resumed.skip(80)
    fresh.advance(10)
    resumed.advance(10)
    assert fresh.seconds_left == pytest.approx(90, rel=0.01)
    assert resumed.seconds_left == pytest.approx(10, rel=0.01)
