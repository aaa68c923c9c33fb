"""Claims about a job's standard streams: results alone on stdout, and no job lost for progress."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from commands import ROOT, Outcome, classified, environment, failure_in, run_here, write_rows

import raycurv
from raycurv.onray.address import keep_apart
from raycurv.progress import streams
from raycurv.progress.reporter import Reporter
from raycurv.progress.streams import Forgiving

# What a factory of somebody's may do, and what jobs make of it: (exit code, kind of error).
NOISY = """
import ctypes, os, sys
from commands import classifier
print("as it was imported")
def noisy():
    print("by print")
    sys.__stdout__.write("by the original\\n")
    sys.stdout.write("by write\\n")
    os.write(1, b"by its descriptor\\n")
    ctypes.CDLL(None).puts(b"by C")
    ctypes.CDLL(None).fflush(None)
    os.system("echo by a child")
    return classifier()
def talks():
    print("by print")
    return classifier()
def leaves(): sys.exit(0)
def interrupts(): raise GeneratorExit("gone")
def unprintable():
    class Strange(BaseException):
        def __str__(self): raise ValueError
    raise Strange
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data and factories."""
    made = tmp_path_factory.mktemp("streams")
    write_rows(made / "rows.parquet", classified(6))
    (made / "noisy.py").write_text(NOISY)
    return made


def flags(folder: Path, factory: str, out: str) -> list[str]:
    return [
        "--model", factory, "--data", str(folder / "rows.parquet"), "--objective",
        "classification", "--address", "none", "--out", str(folder / out),
    ]  # fmt: skip


def process(folder: Path, words: Sequence[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    """A job in a process of its own, with these standard streams."""
    return subprocess.run(
        [sys.executable, "-m", "raycurv", *words], cwd=folder, text=True, timeout=120,
        env=imports(folder), **streams,
    )  # fmt: skip


def imports(folder: Path) -> dict[str, str]:
    """An environment in which the factories are found."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), str(ROOT)])
    return environment(PYTHONPATH=path)


def closed() -> IO[bytes]:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "wb")


def test_whatever_else_prints_does_so_on_stderr(folder: Path) -> None:
    words = ["fit", *flags(folder, "noisy:noisy", "noisy")]
    ended = process(folder, words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["status"] == "complete"
    said = "as it was imported|by print|by the original|by write|by its descriptor|by C|by a child"
    assert set(said.split("|")) <= set(ended.stderr.splitlines())


@pytest.mark.parametrize("out", ["full", "closed"])
def test_streams_that_cannot_be_written_cost_no_job(folder: Path, out: str) -> None:
    """A full disk and a pipe that nobody reads; and descriptors that are closed: a file that is
    opened later must not get their numbers."""
    words = ["fit", *flags(folder, "noisy:talks", f"run-{out}")]
    if out == "closed":
        line = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "raycurv", *words]
        ended: Any = subprocess.run(line, cwd=folder, timeout=120, env=imports(folder))
    else:
        with open("/dev/full", "wb") as full, closed() as pipe:
            ended = process(folder, words, stdout=full, stderr=pipe)
            # The negative control: what does not forgive fails.
            for nowhere in (full, pipe):
                plain = [sys.executable, "-c", "print('x', flush=True)"]
                assert subprocess.run(plain, stdout=nowhere, stderr=nowhere).returncode
    assert ended.returncode == 0
    run = raycurv.open(folder / f"run-{out}")
    assert run.blocks().num_rows == 3
    for path in (folder / f"run-{out}").rglob("*"):
        if path.is_file():
            assert b"by print" not in path.read_bytes()


class Broken(io.StringIO):
    """A stream that fails from its second line on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.tried = error, 0

    def write(self, text: str) -> int:
        self.tried += 1
        if self.tried > 1:
            raise self.error
        return super().write(text)


def test_results_wait_for_a_slow_reader_of_a_pipe_that_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "a line of results\n" * 20_000
    read: list[bytes] = []
    with os.fdopen(reading, "rb") as pipe:
        reader = threading.Thread(target=lambda: read.append(pipe.read()))
        # The negative control: a stream of Python's gives up where the pipe is full.
        with pytest.raises(BlockingIOError), open(os.dup(writing), "wb", buffering=0) as plain:
            while plain.write(b"x" * 4096) is not None:
                pass
            raise BlockingIOError
        stream = streams.on_descriptor(writing, "utf-8")
        later = threading.Timer(0.2, reader.start)
        later.start()
        stream.write(text)
        stream.close()
        later.join()
        reader.join()
    assert read[0].lstrip(b"x").decode() == text
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    monkeypatch.setattr(streams, "_PATIENCE_SECONDS", 0.1)
    stream = streams.on_descriptor(writing, "utf-8")
    with pytest.raises(TimeoutError):
        stream.write(text)
    os.close(reading)
    with contextlib.suppress(OSError):
        stream.close()


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "gone"), ValueError("x")],
)
@pytest.mark.parametrize("log", ["text", "json"])
def test_progress_that_cannot_be_shown_is_not_shown_any_more(
    error: Exception, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Broken(error)
    monkeypatch.setattr(sys, "stderr", stream)
    reporter = Reporter(log=log)
    with reporter.phase("a phase", 2, "steps") as phase:
        for _ in range(2):
            reporter.say("a word")
            phase.advance(1)
    assert reporter.seconds.keys() == {"a phase"}
    assert stream.tried == 2


def test_a_stream_of_few_letters_takes_all_of_them_and_hides_secrets() -> None:
    below = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Forgiving(below)
    before = list(streams._secrets)
    try:
        streams.hide(["SESAME", "OPENSESAME"])
        print("Λ and \udcff of OPENSESAME", file=stream, flush=True)
    finally:
        streams._secrets[:] = before
    print("then", file=stream, flush=True)
    assert below.buffer.getvalue() == b"\\u039b and \\udcff of ***\nthen\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("factory", "kind"),
    [("leaves", "SystemExit"), ("interrupts", "GeneratorExit"), ("unprintable", "Strange")],
)
def test_the_last_line_is_json_whatever_a_factory_raises(
    folder: Path, factory: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    outcome = run_here("fit.py", flags(folder, f"noisy:{factory}", factory))
    assert outcome.code == 1 and "Traceback" in outcome.err
    assert failure_in(outcome)["error"]["kind"] == kind


def test_what_cannot_be_imported_ends_in_a_last_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "raycurv.jobs.timeline.watching", None)
    outcome = run_here("timeline.py", ["--run", "/nowhere"])
    assert outcome.code == 1 and failure_in(outcome)["error"]["kind"] == "ModuleNotFoundError"


def test_a_working_directory_that_is_gone_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    outcome = run_here("timeline.py", ["--run", "/nowhere"])
    assert outcome.code == 2 and failure_in(outcome)["error"]["where"] == "the working directory"


def test_a_mode_of_authentication_that_ray_would_ignore_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        # Also so that they are put back.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "tokn")
    with pytest.raises(raycurv.UserError, match="RAY_AUTH_MODE: expected token or disabled"):
        keep_apart(own_process=True)
    monkeypatch.delenv("RAY_AUTH_MODE")
    # A caller's token is a file of its own, one for all that the process connects to.
    keep_apart(own_process=False)
    (token,) = (tmp_path / ".ray").iterdir()
    assert token.name == "auth_token" and token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64 and "RAY_AUTH_TOKEN" not in os.environ
    token.write_text("somebody's")
    keep_apart(own_process=False)
    assert token.read_text() == "somebody's"
    keep_apart(own_process=True)
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    keep_apart(own_process=True)
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"


def test_python_callers_keep_their_streams(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    sys.path.insert(0, str(folder))
    try:
        raycurv.fit(
            "noisy:talks", str(folder / "rows.parquet"), folder / "python", address="none",
            objective="classification", quiet=True,
        )  # fmt: skip
    finally:
        sys.path.remove(str(folder))
    assert (sys.stdout, sys.stderr) == before
    assert "by print" in capfd.readouterr().out


def test_numbers_that_json_has_not_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    from raycurv.jobs.last_line import LastLine

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    LastLine("job").say({"status": "complete", "found": [float("nan"), {"x": float("inf")}, 1.5]})
    assert json.loads(out.getvalue(), parse_constant=pytest.fail)["found"] == [
        None,
        {"x": None},
        1.5,
    ]


def test_names_from_files_do_not_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    Reporter().say("a block \x1b]0;title\x07\x1b[2J of\x9bsome\rbody")
    assert err.getvalue() == "a block \\x1b]0;title\\x07\\x1b[2J of\\x9bsome\\rbody\n"


# Command lines

REFUSED: dict[str, tuple[list[str], str]] = {
    "a slash too few": (["--out", "s3:/KEY:SESAME@bucket/run"], "--out"),
    "in capitals": (["--out", "S3:/KEY:SESAME@bucket"], "--out"),
    "no slash": (["--out", "s3:SESAME"], "--out"),
    "a blank": (["--out", " /tmp/x"], "--out"),
    "no colon": (["--out", "s3//KEY:SESAME@bucket"], "--out"),
    "three slashes": (["--out", "s3:///KEY:SESAME@bucket"], "s3:///bucket"),
    "another scheme": (["--out", "gs:/SESAME@bucket"], "--out"),
    "a file": (["--out", "file:/tmp/x"], "--out"),
    "data": (["--data", "hdfs:/u:SESAME@host/x"], "--data"),
    "a model": (["--model", "s3:/KEY:SESAME@bucket/m"], "--model"),
    "a spool": (["--spool-dir", "abfs:/c:SESAME@host/x"], "--spool-dir"),
    "a parent": (["--extend", "s3:/KEY:SESAME@bucket/x"], "--extend"),
    "runs": (["--merge", "/a", "s3:/KEY:SESAME@bucket/x"], "--merge"),
    "a NUL": (["--out", "/tmp/a\0SESAM"], "--out"),
    "no UTF-8": (["--data", "/tmp/\udcff"], "--data"),
    "a long name": (["--out", "/tmp/" + 300 * "x"], "--out"),
    "a long path": (["--out", 3000 * "/x"], "--out"),
    "a typo": (["--ouut", "s3://KEY:SESAME@b"], "the command line"),
    "a typo with =": (["--ouut=s3://KEY:SESAME@b?secret_key=SESAME"], "the command line"),
    "a typo, no scheme": (["--ouut", "KEY:SESAME@bucket"], "the command line"),
    "a value": (["--stages", "s3://KEY:SESAME@b"], "the command line"),
    "a word too many": (["s3://KEY:SESAME@b/a-long-name" * 5], "the command line"),
    "a signature": (["--data", "https://h/x?X-Amz-Signature=SESAME&sig=SESAME"], "https://h/x"),
    "a token": (["--token", "hf_SESAME"], "the command line"),
    "a token with =": (["--hf_token=hf_SESAME"], "the command line"),
    "a variable": (["AWS_SECRET_ACCESS_KEY=SESAME"], "the command line"),
    "a repository of no owner": (["--data", "hf://datasets/a"], "hf://datasets/a"),
    "a repository to write to": (["--out", "hf://datasets/a"], "--out"),
    "a command to the terminal": (["--schedule", "\x1b[2J"], "the command line"),
    "twice": (["--seed", "1", "--seed", "2"], "--seed"),
    "no stage": (["--stages", "0"], "--stages"),
    "a float": (["--batch-tokens", "1e9"], "the command line"),
    "huge": (["--seed", "9" * 5000], "the command line"),
    "beyond 64 bits": (["--seed", "9" * 30], "--seed"),
    "infinite": (["--hang-seconds", "inf"], "--hang-seconds"),
    "NaN seconds": (["--commit-seconds", "nan"], "--commit-seconds"),
    "empty": (["--out", ""], "--out"),
    "an empty place": (["--spool-dir", ""], "--spool-dir"),
    "a space": (["--out= "], "--out"),
}  # fmt: skip


def test_a_flag_whose_value_speaks_of_tokens_hides_nothing(folder: Path) -> None:
    outcome = refused(folder, ["--blocks", "!model.embed_tokens", "--blocks", "!secret.head"])
    assert outcome.code == 2 and "***" not in outcome.err + outcome.out
    assert "--blocks 'model.embed_tokens'" in outcome.err


def refused(folder: Path, words: Sequence[str]) -> Outcome:
    mine = dict(zip(*[iter(flags(folder, "commands:classifier", "refused"))] * 2, strict=True))
    for word in words:
        mine.pop(word.partition("=")[0], None)
    if "--merge" in words:
        del mine["--data"]
    return run_here("fit.py", [*(w for pair in mine.items() for w in pair), *words])


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_flag_cannot_mean_is_refused_without_its_secrets(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = set(os.listdir(folder))
    words, where = REFUSED[name]
    outcome = refused(folder, words)
    assert outcome.code == 2, outcome.err
    said = failure_in(outcome)["error"]
    assert said["kind"] == "UserError" and where in said["where"]
    assert "Traceback" not in outcome.err
    squeezed = "".join((outcome.err + outcome.out).split()).replace("│", "")
    assert "SESAME" not in squeezed and "\x1b" not in squeezed
    assert set(os.listdir(folder)) == before


def test_a_directory_that_looks_like_a_uri_can_be_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The remedy of the refusals above.
    monkeypatch.chdir(folder)
    outcome = refused(folder, ["--out", "./s3:run"])
    assert outcome.code == 0 and (folder / "s3:run" / "run.json").exists()


def test_secrets_reach_their_settings_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from raycurv.jobs.fit.fit_settings import FitSettings
    from raycurv.jobs.last_line import LastLine

    words = [
        "--model", "m", "--out", "s3://KEY:SESAME@b/x", "--data", "s3://KEY:OTHERS@b/x",
        "--extend=s3://b/x", "--blocks", "*.q", "--blocks", "!*.k",
    ]  # fmt: skip
    seen: list[Any] = []
    from raycurv.jobs import command

    def job(settings: Any, reporter: Any) -> dict[str, Any]:
        seen.append(settings)
        raise RuntimeError(f"cannot open {settings.out}, with SESAME")

    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(command, "_root", lambda out: None)
    with streams.kept_for_results(), pytest.raises(SystemExit, match="1"):
        command.run_job(FitSettings, job, LastLine("fit.py"), words, "fit.py")
    (settings,) = seen
    assert (settings.out, settings.data, settings.extend) == (
        "s3://KEY:SESAME@b/x", "s3://KEY:OTHERS@b/x", "s3://b/x"
    )  # fmt: skip
    assert settings.blocks == ("*.q", "!*.k")
    assert "RuntimeError" in err.getvalue() and "s3://b/x" in err.getvalue()
    assert "SESAME" not in err.getvalue() + out.getvalue()
