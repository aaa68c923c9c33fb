"""Proof that a model may be given a next-token loss: its outputs do not change with later tokens.

Two examples with the same first tokens and other last ones go through the stages once, when these
are built: outputs where all tokens so far are the same must be equal. A network that attends both
ways sees the token that it is to predict, and its loss is a number that means nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raycurv.batch import Batch, Hidden
from raycurv.driver.corpus import Corpus
from raycurv.driver.workers import Workers
from raycurv.errors import UserError
from raycurv.files.manifest import Manifest
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.models.model import Model
from raycurv.stages.pool import StageLost

# Tokens of the two examples, where the model takes a sequence of any length.
TOKENS = 8
# Differences of equal prefixes, relative to the largest output. Rows of one product may be rounded
# differently, and layers amplify that; what an attention to later tokens changes is larger by far.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
_FACT = "causality"


class CausalityCheck:
    """Takes two examples through the groups of stages, each when it is loaded for the first time.

    The result stands in ``run.json`` as ``causality``: the largest difference, and what is borne.

    Args:
        corpus: gives the tokens.
        manifest: of the run; a check that is recorded there is not made again.
    """

    def __init__(self, workers: Workers, corpus: Corpus, manifest: Manifest) -> None:
        self._workers, self._model, self._manifest = workers, workers.model, manifest
        self._corpus, self._store = corpus, workers.store

    def __call__(self, group: int) -> None:
        """Take the examples through a group whose stages are resident.

        Raises:
            UserError: outputs change with tokens that come later.
        """
        if _FACT in self._manifest.facts:
            return
        pair = two_examples(self._corpus, self._model, self._workers.dtype)
        if pair is None:
            return
        batch, shared = pair
        entering: Hidden | None = None
        if group > 0:
            # A run that was begun elsewhere in the model: the next one starts from its beginning.
            if not self._store.exists(self._between(group)):
                return
            file = open_tensors(self._store, self._between(group))
            entering = tuple(file.read(str(n)) for n in range(len(file.names)))
        leaving, difference = self._through(batch, shared, entering)
        if group + 1 < len(self._workers.groups):
            tensors = {str(n): tensor.cpu() for n, tensor in enumerate(leaving)}
            write_tensors(self._store, self._between(group + 1), tensors, {})
        elif difference is not None:
            self._judge(difference)

    def _through(
        self, batch: Batch, shared: int, entering: Hidden | None
    ) -> tuple[Hidden, float | None]:
        pool = self._workers.pool
        while True:
            try:
                given = pool.put(batch)
                hidden = None if entering is None else pool.put(entering)
                for stage in range(pool.stages):
                    hidden, difference = pool.at(stage).compare(given, hidden, shared)
                assert hidden is not None
                return pool.get(hidden), pool.get(difference)
            except StageLost as lost:
                pool.repair(0, lost)

    def _judge(self, difference: float) -> None:
        dtype = self._workers.dtype
        borne = TOLERANCE[dtype]
        if difference > borne:
            raise UserError(
                f"model {self._model.name}",
                "outputs that do not change with later tokens, as a next-token loss needs",
                f"outputs that change by {difference:.2g} of the largest (at most {borne:g} would "
                f"be rounding in {str(dtype).removeprefix('torch.')}): the loss sees its target",
                "Choose a model that attends to earlier tokens alone; the config.json of an "
                'encoder that was trained as a decoder has to say "is_decoder": true. Where '
                "looking ahead is meant, as behind a prefix, --no-check-causality allows it.",
            )
        self._manifest.facts[_FACT] = {"difference": difference, "tolerance": borne}
        self._manifest.write(self._store)

    def _between(self, group: int) -> str:
        # Groups may be cut anew before all have been seen.
        unit = self._workers.cuts[self._workers.groups[group].start].start
        return f"work/causality/before-{unit:04d}.safetensors"


def two_examples(corpus: Corpus, model: Model, dtype: torch.dtype) -> tuple[Batch, int] | None:
    """Two examples, the second with other tokens at its end, and how many they share.

    Tokens are the data's own. What is not an HF model may take sequences of one length alone: it
    gets a whole example, the shortest that is long enough.

    Returns:
        a microbatch of both; ``None`` for data without tokens, or without a second one.
    """
    lengths = corpus.lengths
    enough = np.flatnonzero(lengths >= TOKENS)
    chosen = enough[np.argmin(lengths[enough])] if len(enough) else np.argmax(lengths)
    one = corpus.reader(dtype)(0, [int(chosen)])
    if one.mask is None:
        return None
    ids = one.inputs[:, :TOKENS] if model.vocab_size is not None else one.inputs
    length = ids.shape[1]
    if length < 2:
        return None
    shared = length - min(TOKENS, length) // 2
    inputs = torch.cat([ids, torch.cat([ids[:, :shared], _others(ids, ids[:, shared:])], dim=1)])
    mask = torch.ones_like(inputs, dtype=torch.bool)
    return Batch(0, one.ids * 2, inputs, mask), shared


def _others(ids: Tensor, tail: Tensor) -> Tensor:
    """Tokens that differ from those of ``tail``, each another one among ``ids`` if there is one."""
    known = ids.unique()
    if len(known) == 1:
        return torch.where(tail > 0, tail - 1, tail + 1)
    other: Tensor = known[(torch.searchsorted(known, tail) + 1) % len(known)]
    return other
