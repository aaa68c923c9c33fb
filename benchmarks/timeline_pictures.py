"""Makes the pictures of docs/: a run of three stages, and one of two replicas that loses an actor.

    python benchmarks/timeline_pictures.py --work DIR

Two to three minutes on 2 cores that had much else to do (2026-11-25). The runs stay in DIR; the
pictures are made from them by

    raycurv timeline --run DIR/stages --picture docs/timeline.png --trace DIR/stages.json.gz
    raycurv timeline --run DIR/lost --picture docs/timeline-lost.png --trace DIR/lost.json.gz

and the traces, which ui.perfetto.dev opens, beside them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import llama_checkpoint
import ray
import tyro

from raycurv.jobs.fit.fit_settings import FitSettings
from raycurv.jobs.fit.fitting import fit
from raycurv.progress.reporter import Reporter
from raycurv.stages.spans import Span

ROOT = Path(__file__).resolve().parent.parent
TOKENS, EXAMPLES = 128, 80


@dataclass(frozen=True)
class Settings:
    """The pictures of docs/."""

    work: Path
    """Where the model and the runs go."""
    docs: Path = ROOT / "docs"
    """Where the pictures go."""


class Killer(Reporter):
    """Kills an actor once it has answered something.

    Args:
        actor, operation, microbatch: what.
    """

    def __init__(self, actor: str, operation: str, microbatch: int) -> None:
        super().__init__()
        self._moment = (actor, operation, microbatch)
        self._done = False

    def watch(self, span: Span) -> None:
        super().watch(span)
        moment = (span.actor, span.operation, span.microbatch)
        if not self._done and moment == self._moment:
            self._done = True
            os.kill(span.pid, signal.SIGKILL)


def main(settings: Settings) -> None:
    model = settings.work / "model"
    llama_checkpoint.main(
        llama_checkpoint.Settings(
            out=model, width=256, ff=704, heads=4, kv_heads=2, layers=6, vocab=512,
            examples=EXAMPLES, tokens=TOKENS, queries=1, dtype="float32",
        )
    )  # fmt: skip
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    ray.init(
        address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
        logging_level="warning",
    )  # fmt: skip
    runs = {
        "stages": ({"stages": 3}, Reporter()),
        "lost": ({"stages": 2, "replicas": 2}, Killer("replica 1, stage 0", "backward", 5)),
    }
    for name, (how, reporter) in runs.items():
        fit(
            FitSettings(
                model=str(model), data=str(model / "train.jsonl"), out=str(settings.work / name),
                batch_tokens=8 * TOKENS, **how,
            ),
            reporter=reporter,
        )  # fmt: skip
    ray.shutdown()
    settings.docs.mkdir(exist_ok=True)
    for name, picture in (("stages", "timeline.png"), ("lost", "timeline-lost.png")):
        command = [sys.executable, str(ROOT / "jobs" / "timeline.py"), "--run"]
        command += [str(settings.work / name), "--picture", str(settings.docs / picture)]
        command += ["--trace", str(settings.work / f"{name}.json.gz")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
