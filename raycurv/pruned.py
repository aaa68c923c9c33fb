"""Reading what a pruning left: the checkpoint's place, saliencies and masks, what it cost."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa

from raycurv.errors import UserError
from raycurv.files.store import Store, open_store
from raycurv.files.tables import SALIENCY, read_directory, read_table
from raycurv.jobs.prune.pruning import PRUNED_FILE
from raycurv.jobs.recorded import finished
from raycurv.summary_html import summary_html


class Pruned:
    """A pruned model in a directory (``raycurv.open_pruned``).

    Attributes:
        manifest: what ``run.json`` says.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.manifest = finished(store, "prune", "tables", "a finished pruning")

    def __repr__(self) -> str:
        return f"<raycurv pruned {self.path}: {self.sparsity:.1%} of the weights gone>"

    def _repr_html_(self) -> str:
        named = {"predicted rise of the loss": self.predicted, "measured": self.measured}
        rises = {name: "" if rise is None else f"{rise:.6g}" for name, rise in named.items()}
        return summary_html("pruned", self.path, {"weights gone": f"{self.sparsity:.1%}"} | rises)

    @property
    def path(self) -> str:
        """The directory of the pruned checkpoint and its tables, as an absolute path or a URI."""
        return self._store.root

    @property
    def model(self) -> str:
        """Where the checkpoint lies: ``from_pretrained`` loads it."""
        return self._store.path("model")

    @property
    def sparsity(self) -> float:
        """Share of the blocks' weights that is gone, biases left out: what was zero before, too."""
        return float(self.manifest.facts["sparsity"])

    @property
    def predicted(self) -> float | None:
        """Rise of the mean loss per example that the quadratic model predicts."""
        found: Any = self.manifest.facts.get("predicted")
        return None if found is None else float(found)

    @property
    def measured(self) -> float | None:
        """The rise that was measured on some of the fit's examples; ``None`` without."""
        found: Any = self.manifest.facts.get("measured")
        return None if found is None else float(found)

    def blocks(self) -> pa.Table:
        """A row for each block: what was removed, predicted and measured rises of the loss."""
        return read_table(self._store, PRUNED_FILE)

    def heads(self) -> pa.Table:
        """A row for each head, where heads went: its columns, its saliency, whether it stays."""
        return read_directory(self._store, "tables/heads")

    def saliency(self, block: str | None = None) -> pa.Table:
        """A row for each output: ``saliency`` and ``keep``, lists over its inputs.

        Args:
            block: of which; of all blocks by default.

        Raises:
            UserError: no such block.
        """
        if block is None:
            return read_directory(self._store, "saliency", SALIENCY)
        name = f"saliency/{block}.parquet"
        if not self._store.exists(name):
            raise UserError(f"block {block!r}", "a block that was pruned", "no such file", "")
        return read_table(self._store, name)


def open_pruned(out: str | os.PathLike[str]) -> Pruned:
    """The pruned model that prune.py left in a directory.

    Raises:
        UserError: none there.
    """
    return Pruned(open_store(out, "--out"))
