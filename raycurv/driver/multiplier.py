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
from raycurv.mathematics.exact.head import QUADRATIC, REACH
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
        return self.found(work, label).get(QUADRATIC)

    def found(self, work: Pass, label: str) -> Results:
        """As :meth:`multiply`; gives the means over examples of all that it finds of them, and of
        :data:`~raycurv.mathematics.exact.head.REACH` the largest."""
        store, last = self.workers.store, len(self.workers.groups) - 1
        streams = {self.stream: self.feed}
        sweep = Sweep(self.workers, self.manifest, streams, work.target, work.forwards())
        sink, names = _Means(store), list[str]()
        sweep.forward()
        for group in range(last, -1, -1):
            own = sink if group == last else Sink()
            task = Task(self.stream, self.feed, work, work.replay(), carries=False, sink=own)
            if group <= sweep.level or group == last:
                found = sweep.run(group, task, label, lowest=0)
                names = found if group == last else names
            sweep.descend(group)
        sweep.end()
        return sink.of(names)


class _Means(Sink):
    """Adds up numbers of the examples, by their names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.forget()

    def forget(self) -> None:
        self._sums, self._examples = dict[str, Tensor](), 0

    def take(self, members: Sequence[int], results: Results) -> None:
        self._examples += len(members)
        self._join({
            name: values.amax(dim=0) if name == REACH else values.sum(dim=0, dtype=torch.float64)
            for name, values in results.items()
        })  # fmt: skip

    def commit(self, name: str) -> list[str]:
        if not self._examples:
            return []
        file = f"{name}-means.safetensors"
        examples = torch.tensor(self._examples)
        write_tensors(self._store, file, self._sums | {"examples": examples}, {})
        self.forget()
        return [file]

    def of(self, names: Sequence[str]) -> Results:
        """Of the examples of all files."""
        for name in names:
            file = open_tensors(self._store, name).read_all()
            self._examples += int(file.pop("examples"))
            self._join(file)
        means = {n: s if n == REACH else s / self._examples for n, s in self._sums.items()}
        self.forget()
        return means

    def _join(self, more: Results) -> None:
        for name, value in more.items():
            mine = self._sums.get(name, torch.zeros_like(value))
            self._sums[name] = value.maximum(mine) if name == REACH else mine + value
