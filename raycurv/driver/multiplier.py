"""Drive a pass of products through all groups of stages, forward and back.

The products themselves stay with the stages, whose gatherer writes them; what comes here is a
number a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.driver.feed import Feed
from raycurv.driver.sinks import Sink
from raycurv.driver.sweep import Sweep, Task
from raycurv.driver.workers import Workers
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.mathematics.exact.head import QUADRATIC
from raycurv.mathematics.sums import Results
from raycurv.stages.passes import Pass


@dataclass(frozen=True)
class Multiplier:
    """Multiplies a curvature matrix of some examples by vectors that lie with the stages.

    Attributes:
        feed: the examples' microbatches.
        stream: tells them from other examples, for what waits in the spool.
    """

    workers: Workers
    manifest: Manifest
    feed: Feed
    stream: str = "data"

    def multiply(self, work: Pass, label: str) -> Tensor | None:
        """Run a pass of products to its end; its gatherer has written all of them then.

        A pass that came to its end before does nothing again, and one that was interrupted goes on
        from its last commit; the caller deletes ``work/NAME`` when nobody needs it any more.

        Args:
            work: its name tells these directions from all others of the run.
            label: of the phase, for a person.

        Returns:
            ``v_qᵀ C v_q``, a mean over examples, ``[Q]`` float64; ``None`` of the Hessian.
        """
        assert work.directions is not None, "products have directions"
        store, last = self.workers.store, len(self.workers.groups) - 1
        streams = {self.stream: self.feed}
        sweep = Sweep(self.workers, self.manifest, streams, work.target, work.forwards())
        sink, names = _Quadratics(store, work.directions.count), list[str]()
        sweep.forward()
        for group in range(last, -1, -1):
            own = sink if group == last else Sink()
            task = Task(self.stream, self.feed, work, work.replay(), carries=False, sink=own)
            if group <= sweep.level or group == last:
                found = sweep.run(group, task, label, lowest=0)
                names = found if group == last else names
            sweep.descend(group)
        sweep.end()
        return sink.mean(names) if work.matrix != "hessian" else None


class _Quadratics(Sink):
    """Adds up ``u_qᵀ R u_q`` over examples."""

    def __init__(self, store: Store, count: int) -> None:
        self._store, self._count = store, count
        self.forget()

    def forget(self) -> None:
        self._sum, self._examples = torch.zeros(self._count, dtype=torch.float64), 0

    def take(self, members: Sequence[int], results: Results) -> None:
        self._examples += len(members)
        if QUADRATIC in results:
            self._sum += results[QUADRATIC].sum(dim=0)

    def commit(self, name: str) -> list[str]:
        if not self._examples:
            return []
        file = f"{name}-{QUADRATIC}.safetensors"
        examples = torch.tensor(self._examples)
        write_tensors(self._store, file, {"sum": self._sum, "examples": examples}, {})
        self.forget()
        return [file]

    def mean(self, names: Sequence[str]) -> Tensor:
        """Over the examples of all files."""
        files = [open_tensors(self._store, name) for name in names]
        total = torch.stack([file.read("sum") for file in files]).sum(dim=0)
        return total / sum(int(file.read("examples")) for file in files)
