"""Jobs as a person runs them, in this process or in one of their own, and what to run them on.

Every actor and every job that works on one of the models below imports this file, and the suite
starts hundreds: at its top is only what models are made of.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from raycurv.jobs.evaluate.evaluate_settings import EvaluateSettings
    from raycurv.jobs.losses import Losses

ROOT = Path(__file__).resolve().parent.parent
# A fit and scores in this process whose numbers are equal bit for bit from run to run.
EXACT_FIT: dict[str, Any] = {
    "objective": "classification",
    "address": "none",
    "dtype": "float64",
    "fisher": "sampled",  # whose labels later passes read
    "batch_tokens": 4,
    "quiet": True,
}
EXACT_INFLUENCE: dict[str, Any] = {
    "address": "none",
    "rank": "full",
    "batch_tokens": 4,
    "per_block": True,
    "self_influence": True,
    "ihvp": True,
    "quiet": True,
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_here(job: str, flags: Sequence[Any]) -> Outcome:
    """The job's ``main`` in this process, which is quick."""
    from raycurv.jobs import registry

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", [job, *map(str, flags)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            registry.start(job.removesuffix(".py"))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def environment(**more: str | None) -> dict[str, str]:
    """For a job of its own: one thread, no cluster but its own; ``None`` unsets a variable."""
    own = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": None}
    wanted = dict(os.environ) | own | more
    return {name: value for name, value in wanted.items() if value is not None}


def start(
    job: str,
    flags: Sequence[Any],
    errors: IO[str] | int = subprocess.PIPE,
    folder: Path = ROOT / "tests",
    **more: str | None,
) -> subprocess.Popen[str]:
    """The job as a process of its own; its working directory is that of the tests, or another."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / job), *map(str, flags)],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE if errors == subprocess.PIPE else subprocess.DEVNULL,
        stderr=errors,
        text=True,
        # Under nohup the tests ignore it, and so would what they start.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )


def run(
    job: str,
    flags: Sequence[Any],
    seconds: float = 120.0,
    folder: Path = ROOT / "tests",
    **more: str | None,
) -> Outcome:
    """The job as a process of its own, to its end."""
    process = start(job, flags, folder=folder, **more)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Outcome(process.returncode, out, err)


def failure_in(outcome: Outcome) -> dict[str, Any]:
    """What the last line of a job that failed says; nothing else is on its output."""
    (line,) = outcome.out.splitlines()
    said: dict[str, Any] = json.loads(line)
    assert said["status"] == "failed"
    return said


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """``{"batch_tokens": 8, "self": True}`` as ``--batch-tokens 8 --self``."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, (list, tuple)):
            flags += [text for one in value for text in (flag, str(one))]
        elif value is not False and value is not None:
            flags += [flag, str(value)]
    return flags


def open_losses(
    settings: EvaluateSettings, model: Any, objective: str, rows: Sequence[Any], folder: Path
) -> Losses:
    """The losses of models in turn, in float64, as a caller of the driver opens them."""
    from raycurv.data.sources import fingerprint
    from raycurv.driver.corpus import open_corpus
    from raycurv.driver.workers import Workers
    from raycurv.files.manifest import Manifest
    from raycurv.files.store import Store
    from raycurv.jobs.losses import Losses
    from raycurv.progress.reporter import Reporter

    store, quiet = Store(str(folder)), Reporter(quiet=True)
    corpus = open_corpus(store, "data", list(rows), "--data", model, settings, None, 0)
    workers = Workers(settings, model, objective, (), torch.float64, 0, quiet, store)
    manifest = Manifest("evaluate", {}, {"data": fingerprint(list(rows))})
    return Losses(workers, manifest, corpus)


# Models and data


def save_llama(folder: Path, tokenizer: bool = True, layers: int = 2, **config: Any) -> Path:
    """A tiny byte-level language model as Hugging Face saves it."""
    # Jobs that need no language model find their factories here, and need not wait for these.
    from byte_tokenizer import VOCAB, save_byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    chosen = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    LlamaForCausalLM(LlamaConfig(**(chosen | config))).save_pretrained(folder)
    if tokenizer:
        save_byte_tokenizer(folder)
    return folder


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "to", "sea"]


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short texts with ids, of two to five words."""
    rng = np.random.default_rng(seed)
    return [
        {"id": f"text {n}", "text": " ".join(rng.choice(WORDS, rng.integers(2, 6)))[:30]}
        for n in range(count)
    ]


def classified(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of five numbers with one of three classes."""
    rng = np.random.default_rng(seed)
    return [
        {"id": f"row {n}", "inputs": rng.normal(size=5).tolist(), "labels": int(rng.integers(3))}
        for n in range(count)
    ]


def classifier() -> nn.Module:
    """A network of three layers, which three stages may hold; the middle one has no bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Linear(7, 6, bias=False),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


def wide() -> nn.Module:
    """A layer whose input factor nothing can decompose whole, the bias' column with it."""
    return nn.Sequential(nn.Linear(32_768, 2))


class Dead(nn.Module):
    """A network with a branch whose output is multiplied by zero, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.silenced = nn.Linear(5, 6)
        self.unused = nn.Linear(5, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        hidden: Tensor = self.last(torch.tanh(self.first(x) + 0.0 * self.silenced(x)))
        return hidden


def dead() -> nn.Module:
    """A :class:`Dead` network, always the same."""
    torch.manual_seed(1)
    return Dead()


class Infinite(Dead):
    """A network with a branch that sees infinities, and that nothing uses."""

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x + float("inf"))
        hidden: Tensor = self.last(torch.tanh(self.first(x) + self.silenced(x)))
        return hidden


def infinite() -> nn.Module:
    """An :class:`Infinite` network, always the same."""
    torch.manual_seed(1)
    return Infinite()


def overflowing() -> nn.Module:
    """Weights that float64 holds and float32 does not."""
    network = classifier().double()
    with torch.no_grad():
        network[0].weight[0, 0] = 1e300
    return network


class Deadly(nn.Linear):
    """A layer that ends its process."""

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


def deadly() -> nn.Module:
    """A network whose second layer ends its process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), Deadly(4, 3))


class Greedy(nn.Linear):
    """Takes memory until its process is ended for it, the first time that gradients are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        mark = Path(os.environ["GREEDY_MARK"])
        if torch.is_grad_enabled() and not mark.exists():
            mark.touch()
            held = []
            while sum(map(len, held)) < int(os.environ["GREEDY_BYTES"]):
                held.append(bytearray(b"x") * 2**26)
                time.sleep(0.05)
            # Ended late rather than never: what looks after memory looks now and then.
            time.sleep(20)
        return super().forward(x)


def greedy() -> nn.Module:
    """A network whose second layer takes too much memory, once."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), Greedy(4, 3))


class Paced(nn.Linear):
    """A layer that takes its time, and leaves a byte in a file for every example that it sees, but
    for one alone, as what proves that examples do not mix has it."""

    def forward(self, x: Tensor) -> Tensor:
        trace = os.environ.get("PACED_TRACE")
        if trace and len(x) > 1:
            with open(trace, "ab") as file:
                file.write(b"." * len(x))
            time.sleep(0.02)
        return super().forward(x)


def paced() -> nn.Module:
    """A network whose microbatches can be counted, and whose factors take time to decompose."""
    torch.manual_seed(0)
    return nn.Sequential(
        Paced(5, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 3)
    )


def waiting() -> nn.Module:
    """A network that is not there for a while, once."""
    trace = Path(os.environ["WAITING_TRACE"])
    if not trace.exists():
        trace.touch()
        time.sleep(30)
    return classifier()


class Squares:
    """An objective of one's own: half the squared distance to the class, one-hot."""

    per_token = False

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        wanted = nn.functional.one_hot(batch.labels, outputs.shape[1]).to(outputs.dtype)
        return 0.5 * (outputs - wanted).square().sum(dim=1)

    def measurement(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return (uniform(1)[:, 0] * outputs.shape[1]).long()


class Raising(Squares):
    """An objective with a mistake of its own."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.sum(dim=1) / (0 // len(outputs) // 0)


class NotFinite:
    """An objective whose loss of one class is infinite."""

    per_token = False

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        values = outputs.square().sum(dim=1)
        return torch.where(batch.labels == 1, values * float("inf"), values)

    def measurement(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch)

    def sample(self, outputs: Tensor, batch: Any, uniform: Any) -> Tensor:
        return torch.zeros(len(outputs), dtype=torch.int64)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written, and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def rewritten(folder: Path, name: str = "run.json") -> Iterator[dict[str, Any]]:
    """What a JSON file of a directory says, to be changed in the body, and then sealed again as if
    a job had written it."""
    from raycurv.files.store import Store

    store = Store(str(folder))
    said = store.read_json(name)
    assert said is not None
    yield said
    store.write_json(name, said)


class Holder:
    """A process that holds the lock of a directory (``holder.py``), killed at the latest at the end
    of the ``with``.

    Attributes:
        pid: of the process.
    """

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "holder.py"), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Holder:
        assert self.read() == "held"
        return self

    def __exit__(self, *error: object) -> None:
        self.signal(signal.SIGKILL)
        self._process.communicate()

    def read(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        """Tell it to do something; gives what it then says."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.read()

    def signal(self, number: int) -> None:
        """Send it a signal; after SIGKILL it is gone when this returns."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()
