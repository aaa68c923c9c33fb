"""A stage: consecutive layers of a model and all that belongs to their blocks. No Ray in it.

A stage holds its part of the model, runs microbatches through it, and hands what its hooks capture
to the gatherers of the pass that is under way. Between stages a tuple of tensors travels: hidden
states, and what goes with them; gradients come back for those of floating point.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.batch import Batch, Hidden
from raycurv.errors import not_finite
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.files.together import together
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.capture import Capture, Record, check_finite
from raycurv.mathematics.capture_check import (
    EXAMPLES,
    POSITIONS,
    TOLERANCE,
    Agreement,
    chosen_examples,
    disagreements,
    refuse,
)
from raycurv.mathematics.checkpointing import PlainCheckpoints
from raycurv.mathematics.frozen_linear import FrozenLinear
from raycurv.mathematics.loss.differentiation import LossGradients, differentiate
from raycurv.mathematics.loss.objective import Objective
from raycurv.mathematics.loss.shipped import is_ours, open_measurement, open_objective
from raycurv.mathematics.sums import Results, is_finite
from raycurv.models.model import Model
from raycurv.models.patched import repatch
from raycurv.stages.heap import RESIDENT, give_back, give_back_at_once
from raycurv.stages.independence import Again, check_independence, check_objective
from raycurv.stages.passes import Gathered, Pass
from raycurv.stages.product_stage import Products
from raycurv.stages.seen import Seen


@dataclass(frozen=True)
class Commit:
    """Where the last commit of a pass lies.

    Attributes:
        files: names of the files of all stages, for each replica whose sums are wanted.
    """

    store: Store
    files: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class StageSpec:
    """What a stage is made from.

    Attributes:
        objective: name, or the objective itself.
        measurement: whose measurement queries have, if not the objective's: the name of another
            objective, or itself.
        folder: directory in which named objectives are looked for, too.
        seed: of drawn labels.
        logits_chunk: logits formed at once.
        threads: for CPU kernels; ``None`` leaves them alone.
        gives_back: bytes from which a freed tensor goes back to the system at once.
        check_capture: whether captured gradients are held against autograd's, see
            :mod:`raycurv.mathematics.capture_check`.
    """

    index: int
    model: Model
    units: range
    blocks: tuple[Block, ...]
    objective: Any
    dtype: torch.dtype
    seed: int
    logits_chunk: int
    device: str = "cpu"
    threads: int | None = None
    gives_back: int = RESIDENT
    measurement: Any = None
    folder: str | None = None
    check_capture: bool = False


@dataclass(frozen=True)
class Proof:
    """What a stage says of its captured gradients, and of its layers.

    Attributes:
        agreement: with autograd; ``None`` where nothing was checked.
        plain_checkpoints: whether checkpoints of the model (``use_reentrant=True``) are called
            plainly.
        random: whether a forward takes random numbers (of torch's, on the CPU).
        apart: of a product, why its directions go forward one after the other; empty otherwise.
    """

    agreement: Agreement | None
    plain_checkpoints: bool
    random: bool
    apart: str = ""


# Among a commit's tensors: the microbatches that its sums contain.
_SEEN = "seen"


@dataclass
class _Open:
    """A microbatch between its forward and its backward."""

    record: Record
    entered: Hidden | None
    left: Hidden


class Stage:
    """One stage of the chain.

    ``forward`` and ``backward`` of one microbatch belong together; the last stage does both in
    ``turn``. Microbatches come back in the order in which they went.

    A stage knows which microbatches its sums contain. One that comes again after a failure goes
    through as any other, for the sake of the other stages, but is not added again.
    """

    def __init__(self, spec: StageSpec) -> None:
        give_back_at_once(spec.gives_back)
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.blocks = spec.blocks
        self._device = torch.device(spec.device)
        self._segment = spec.model.build(spec.units, spec.dtype, self._device)
        self._objective = self._measured = open_objective(spec.objective, spec.folder)
        if spec.measurement is not None:
            self._measured = open_measurement(spec.measurement, spec.folder)
        self._capture = Capture(self._segment.module, spec.blocks)
        self._checkpoints = PlainCheckpoints()
        self._agreement: Agreement | None = None
        # What is differentiated -> how many examples of it have been looked at.
        self._checked: dict[str, int] = {}
        # Whether examples of a microbatch without padding, and of one with it, have been held
        # against themselves alone.
        self._alone: set[bool] = set()
        # The same of what the objective makes of them, by what is differentiated.
        self._judged: set[tuple[str, bool]] = set()
        self._random = False
        self._open: dict[int, _Open] = {}
        self._pass: Pass | None = None
        self._products: Products | None = None
        self._gathered: Gathered | None = None
        self._seen = Seen()
        self._last = -1

    @property
    def module(self) -> nn.Module:
        """Its part of the model."""
        return self._segment.module

    def discover(self, batch: Batch, hidden: Hidden | None) -> tuple[Hidden, tuple[Block, ...]]:
        """Run one microbatch forward and see which blocks read the same tensor.

        Gives the hidden states for the next stage, and this stage's blocks with their factors.
        """
        record = Record(batch.to(self._device))
        with self._graph(False, record):
            out = self._segment.forward(record.batch, _own(self._entering(hidden, False)))
            if self._segment.last:
                some = out[0].ndim > 2 and not self._segment.pooled
                self._head(self._objective, record, out[0][:, :1] if some else out[0], 0)
        return out, self._capture.discover(record)

    def compare(
        self, batch: Batch, hidden: Hidden | None, shared: int
    ) -> tuple[Hidden, float | None]:
        """Run two examples forward, and see at the model's end whether outputs are equal at their
        first ``shared`` positions.

        Gives the hidden states for the next stage; and at the end the largest difference, relative
        to the largest output, or ``None`` where outputs are not finite or not of positions. What is
        infinite in both is equal: a word that no token can be, say.
        """
        record = Record(batch.to(self._device))
        with self._graph(False, record):
            out = self._segment.forward(record.batch, _own(self._entering(hidden, False)))
            if not self._segment.last or out[0].shape[:2] != batch.inputs.shape[:2]:
                return out, None
            first, second = self._head(self._objective, record, out[0][:, :shared], 0).double()
        apart = torch.where(first == second, 0.0, first - second).abs().max()
        difference = apart / first.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1e-300)
        return out, float(difference) if difference.isfinite() else None

    def assign(self, blocks: tuple[Block, ...]) -> None:
        """Take the factors' names as all stages agreed on them."""
        self.blocks = blocks
        self._capture.blocks = {block.name: block for block in blocks}

    def become(self, model: Model) -> None:
        """Take the weights of a model that differs from the stage's own in patches alone.

        Raises:
            UserError: a patch that does not fit its block, or is not finite.
        """
        assert not self._open, "the weights of microbatches under way"
        repatch(self._segment.module, self.spec.units, self.spec.model, model)
        self.spec = replace(self.spec, model=model)

    def begin(self, work: Pass, commit: Commit | None = None) -> None:
        """Start a pass, or go on with it from a commit."""
        self._open.clear()
        self._pass = work
        # What the pass before gathered is written by now: the two need not be held at once.
        self._gathered = self._products = None
        give_back(collect=False)
        if work.directions is not None:
            # Hooks would see other tensors than those of the model's forward.
            self._capture.close()
            self._products = Products(
                work, self._segment, self.blocks, self._objective, self.spec.seed,
                self.spec.dtype, self._device, self._slice_positions,
            )  # fmt: skip
        self._gathered = Gathered(work, self.blocks, self.spec.dtype, self._device)
        self._seen, self._last = Seen(), -1
        # A commit may be of other stages: each takes what is its own from the files of all.
        keys = self._gathered.keys()
        for number, names in enumerate(() if commit is None else commit.files):
            assert commit is not None
            state: dict[str, Tensor] = {}
            for name in names:
                file = open_tensors(commit.store, name)
                seen = file.read(_SEEN)
                if seen.dtype != torch.int64 or seen.ndim != 1:
                    raise commit.store.damaged(name, "numbers of microbatches", "other numbers")
                self._seen.update(seen.tolist())
                state |= {k: file.read(k) for k in file.names if k.rpartition("/")[0] in keys}
            try:
                (self._gathered.load if number == 0 else self._gathered.join)(state)
            except (KeyError, ValueError) as error:
                got = f"others ({error})"
                raise commit.store.damaged(names[0], "sums of this stage's blocks", got) from error

    def abort(self) -> tuple[int, ...]:
        """Drop the microbatches under way, which will come again; gives those in the sums."""
        self._open.clear()
        if self._products is not None:
            self._products.abort()
        self._last = -1
        return tuple(self._seen)

    def forward(self, batch: Batch, hidden: Hidden | None) -> Hidden:
        """Hidden states after this stage's last layer; the graph stays for ``backward``."""
        assert self._pass is not None
        if self._products is not None:
            with self._checkpoints:
                return self._products.forward(batch, hidden)
        differentiates = self._pass.differentiates
        batch = batch.to(self._device)
        if differentiates:
            self._check_capture(batch, hidden)
        entered = self._entering(hidden, differentiates)
        record = Record(batch)
        with self._graph(differentiates, record):
            state = torch.get_rng_state()
            left = self._segment.forward(batch, _own(entered))
            self._random = self._random or not torch.equal(state, torch.get_rng_state())
        self._check_independence(batch, entered, left)
        if differentiates:
            self._open[batch.index] = _Open(record, entered, left)
        return tuple(tensor.detach() for tensor in left)

    def turn(
        self, batch: Batch, hidden: Hidden | None, gradients: Hidden | None = None
    ) -> tuple[Hidden | None, Results]:
        """Forward and backward at the end of the resident stages.

        The model's last stage goes back from the loss; another one from the gradients that its
        successor left when it was resident, and without them no further than its forward.

        Args:
            hidden: what the stage before gives; ``None`` for the model's first.
            gradients: with respect to what ``forward`` gives, ``[draws, ...]`` each.

        Returns:
            the gradients for the stage before, ``[draws, ...]`` each (``None`` for nobody), or the
            hidden states of a stage that goes forward only; and what the driver shall collect.
        """
        assert self._pass is not None
        left = self.forward(batch, hidden)
        if not self._segment.last:
            if not self._pass.differentiates:
                return left, {}
            assert gradients is not None, "only the model's last stage starts from the loss"
            return self.backward(batch.index, gradients)
        if self._products is not None:
            cotangents, of_head, results = self._products.ends(batch)
            back, gathered = self._backward_products(batch.index, cotangents, of_head)
            return back, results | gathered
        opened = self._open.get(batch.index)
        batch = batch.to(self._device)
        record = Record(batch) if opened is None else opened.record
        work, objective = self._pass, self._measures()

        def differentiated(batch: Batch, hidden: Tensor, record: Record) -> LossGradients:
            def begin_draw(draw: int) -> None:
                record.draw = draw

            return differentiate(
                objective,
                lambda part, start: self._head(objective, record, part, start),
                hidden,
                batch,
                work.target,
                work.draws,
                self.spec.seed,
                self._slice_positions(batch, hidden),
                begin_draw,
                work.signs,
            )

        with self._graph(opened is not None, record):
            found = differentiated(batch, left[0], record)
        self._check_objective(
            lambda part, hidden: differentiated(part, hidden, Record(part)), batch, left[0], found
        )
        results = {name: tensor.cpu() for name, tensor in found.results.items()}
        if opened is None:
            return None, results
        of_loss = torch.stack(found.gradients)
        # The loss is a function of the hidden states alone, not of what goes with them.
        others = [t.new_zeros((len(of_loss), *t.shape)) for t in _differentiable(left[1:])]
        back, gathered = self.backward(batch.index, (of_loss, *others))
        return back, results | gathered

    def backward(self, index: int, gradients: Hidden) -> tuple[Hidden | None, Results]:
        """Take a microbatch's gradients through this stage and gather what was captured.

        Args:
            gradients: with respect to the floating-point tensors that ``forward`` gave,
                ``[draws, ...]`` each.
        """
        assert self._gathered is not None and self._pass is not None
        # Additions happen in one order, or float sums would depend on chance.
        assert index > self._last, f"microbatch {index} comes after {self._last}"
        if self._products is not None:
            return self._backward_products(index, gradients)
        opened, target = self._open.pop(index), self._pass.target
        record, draws = opened.record, []
        entered = [] if opened.entered is None else _differentiable(opened.entered)
        back: list[list[Tensor]] = [[] for _ in entered]
        left = [
            (tensor, gradient.to(self._device, tensor.dtype))
            for tensor, gradient in zip(_differentiable(opened.left), gradients, strict=True)
            if tensor.requires_grad
        ]
        count = len(gradients[0])
        for draw in range(count):
            record.draw = draw
            if left:
                with self._capture.going_back(), FrozenLinear():
                    torch.autograd.backward(
                        [tensor for tensor, _ in left],
                        [gradient[draw] for _, gradient in left],
                        retain_graph=draw + 1 < count,
                    )
            for tensor, gradients_back in zip(entered, back, strict=True):
                found, tensor.grad = tensor.grad, None
                gradients_back.append(torch.zeros_like(tensor) if found is None else found)
            own_labels = target == "labels" or (target == "both" and draw + 1 == count)
            draws.append(self._capture.captured(record, draw, own_labels))
            check_finite(draws[-1])
        results = self._gathered.add(draws, index not in self._seen)
        _check_results(results, record.batch)
        self._seen.add(index)
        self._last = index
        leaving = tuple(map(torch.stack, back)) if opened.entered is not None else None
        return leaving, {name: tensor.cpu() for name, tensor in results.items()}

    def _backward_products(
        self, index: int, cotangents: Hidden, of_head: Sequence[Mapping[str, Tensor]] = ()
    ) -> tuple[Hidden | None, Results]:
        assert self._gathered is not None and self._products is not None
        with self._checkpoints:
            products, leaving = self._products.backward(index, cotangents, of_head)
            self._gathered.add_products(products, index not in self._seen)
        self._seen.add(index)
        self._last = index
        return leaving(), {}

    def commit(self, store: Store, name: str) -> None:
        """Write all sums so far, and which microbatches they contain, into one file, atomically."""
        assert self._gathered is not None and not self._open
        seen = torch.tensor(list(self._seen), dtype=torch.int64)
        write_tensors(store, name, self._gathered.state() | {_SEEN: seen}, {})

    def names(self) -> list[tuple[str, ...]]:
        """Names of what the pass has gathered here, in runs that are written together."""
        assert self._gathered is not None and not self._open
        return self._gathered.names

    def result(self, name: str) -> Any:
        """What the pass has gathered here under a name."""
        assert self._gathered is not None
        return self._gathered.result(name)

    def joined(self, left: Any, right: Any) -> Any:
        """The sum of two replicas' results."""
        return left.plus(right)

    def write(self, names: Sequence[str], result: Any = None) -> None:
        """Write a result: that of all replicas; or those that were gathered here."""
        assert self._gathered is not None and (result is None or len(names) == 1)
        together(partial(self._gathered.write, result=result), names)

    def proof(self) -> Proof:
        """How well captured gradients agreed with autograd's so far."""
        apart = "" if self._products is None else self._products.apart
        return Proof(self._agreement, self._checkpoints.met, self._random, apart)

    def finish(self) -> None:
        """End the pass, and forget its sums."""
        self._open.clear()
        if self._products is not None:
            self._products = None
            self._capture = Capture(self._segment.module, self.blocks)
        self._pass = self._gathered = None

    @contextmanager
    def _graph(self, differentiates: bool, record: Record) -> Iterator[None]:
        recording = self._capture.recording(record)
        with torch.set_grad_enabled(differentiates), FrozenLinear(), self._checkpoints, recording:
            yield

    def _measures(self) -> Objective:
        """The objective of the pass."""
        assert self._pass is not None
        return self._measured if self._pass.target == "measurement" else self._objective

    def _check_capture(self, batch: Batch, hidden: Hidden | None) -> None:
        """Hold captured gradients against autograd's, on some examples of the first microbatch of
        each kind of pass, and of the first one of several examples.

        Raises:
            UserError: a block's gradient is not what its rows say, or not that of one example.
        """
        assert self._pass is not None
        target, some = self._pass.target, min(batch.size, EXAMPLES)
        if not self.spec.check_capture or not self.blocks or self._checked.get(target, 0) >= some:
            return
        self._checked[target] = some
        began, dtype = time.monotonic(), self.spec.dtype
        rows = chosen_examples(batch)
        errors = self._disagreements(batch, hidden, rows)
        if errors is None:
            errors = self._disagreements(batch, hidden, rows[:1])
        assert errors is not None
        worst, tolerance = max(errors, key=lambda name: errors[name]), TOLERANCE[dtype]
        if errors[worst] > tolerance:
            alone = errors
            if len(rows) > 1:
                alone = self._disagreements(batch, hidden, rows[:1]) or errors
            refuse(self._capture, errors, alone[worst] <= tolerance, tolerance)
        found = Agreement(errors[worst], worst, tolerance, time.monotonic() - began)
        self._agreement = found if self._agreement is None else self._agreement.joined(found)

    def _check_independence(self, batch: Batch, entered: Hidden | None, left: Hidden) -> None:
        """See :func:`raycurv.stages.independence.check_independence`; of a checkpoint's decoder
        the check of causality says as much, as it does wherever later tokens change nothing."""
        padded = batch.mask is not None and not bool(batch.mask.all())
        if batch.size == 1 or padded in self._alone or self._random:
            return
        task = self.spec.model.task
        if self._measures().causal or (task is not None and task.causal):
            return
        self._alone.add(padded)

        def pooled(batch: Batch, left: Hidden) -> Hidden:
            if not (self._segment.last and self._segment.pooled):
                return left
            return (*left, self._segment.head(left[0], batch))

        def forward(part: Batch, entered: Hidden | None) -> Hidden:
            with FrozenLinear(), self._checkpoints:
                return pooled(part, self._segment.forward(part, _own(entered)))

        with torch.no_grad(), FrozenLinear():
            left = pooled(batch, left)
        check_independence(forward, batch, entered, left, f"model {self.spec.model.name}")

    def _check_objective(
        self, again: Again, batch: Batch, hidden: Tensor, found: LossGradients
    ) -> None:
        """See :func:`raycurv.stages.independence.check_objective`; of the user's own, in the first
        microbatch of each kind of pass and in the first padded one."""
        assert self._pass is not None
        seen = self._pass.target, batch.mask is not None and not bool(batch.mask.all())
        if batch.size == 1 or seen in self._judged or is_ours(self._measures()):
            return
        self._judged.add(seen)
        with torch.set_grad_enabled(self._pass.differentiates), FrozenLinear():
            check_objective(again, batch, hidden.detach(), found)

    def _disagreements(
        self, batch: Batch, hidden: Hidden | None, rows: Sequence[int]
    ) -> dict[str, float] | None:
        """See :func:`raycurv.mathematics.capture_check.disagreements`; of these examples."""
        positions = None
        if self.spec.model.any_length and (hidden is None or len(hidden) == 1):
            positions = POSITIONS
        part, entered = batch.part(rows, positions), None
        if hidden is not None:
            cut = slice(None) if batch.mask is None else slice(positions)
            entered = tuple(
                tensor[batch.rows_of(rows)][:, cut]
                if tensor.ndim > 1 and len(tensor) == batch.rows
                else tensor for tensor in hidden
            )  # fmt: skip
        objective = self._measures()

        def through(record: Record) -> list[tuple[Tensor, int]]:
            with self._checkpoints:
                left = self._segment.forward(part, _own(self._entering(entered, True)))
                roots = [(tensor, 0) for tensor in left]
                if not self._segment.last:
                    return roots
                if not objective.per_token or left[0].ndim < 3:
                    return [(self._head(objective, record, left[0], 0), 0), *roots]
                end = min(left[0].shape[1], self._slice_positions(part, left[0]))
                # In two slices, as the positions of a long vocabulary are.
                middle = -(-end // 2)
                slices = [(0, middle), (middle, end)] if middle < end else [(0, end)]
                heads = [
                    (self._head(objective, record, left[0][:, start:stop], start), start)
                    for start, stop in slices
                ]
                return [*heads, *roots]

        return disagreements(self._capture, part, through, self.spec.dtype)

    def _entering(self, hidden: Hidden | None, differentiates: bool) -> Hidden | None:
        if hidden is None:
            return None
        entered = []
        for tensor in hidden:
            arrived = tensor.to(self._device)
            if arrived.is_floating_point():
                arrived = arrived.to(self.spec.dtype).detach().requires_grad_(differentiates)
            entered.append(arrived)
        return tuple(entered)

    def _head(self, objective: Objective, record: Record, part: Tensor, start: int) -> Tensor:
        # Only a per-token objective slices positions; otherwise rows are whole examples.
        if objective.per_token:
            with record.positions(start, part.shape[1]):
                return self._segment.head(part, record.batch)
        return self._segment.head(part, record.batch)

    def _slice_positions(self, batch: Batch, hidden: Tensor) -> int:
        model = self.spec.model
        classes = model.classes or model.vocab_size or (hidden.shape[-1] if hidden.ndim else 1)
        return max(1, self.spec.logits_chunk // (batch.size * max(1, classes)))


def _check_results(results: Results, batch: Batch) -> None:
    """Refuse numbers of an example that are not finite, with a NumericalError that names it."""
    for name, values in results.items():
        if not is_finite(values):
            n = next(n for n, one in enumerate(values) if not is_finite(one))
            raise not_finite(f"example {batch.ids[n]!r}", f"its {name}")


def _own(entered: Hidden | None) -> Hidden | None:
    # A layer may change its input in place, which neither a leaf of the graph nor the tensor that
    # the stage before put out would bear.
    return None if entered is None else tuple(tensor.clone() for tensor in entered)


def _differentiable(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The tensors among hidden states that have gradients."""
    return [tensor for tensor in hidden if tensor.is_floating_point()]
