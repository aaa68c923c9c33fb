"""A model as a chain of units, which segments hold: what every kind of model tells and builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.hub import Snapshot
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint_files import CheckpointFile
from raycurv.models.model_task import Task
from raycurv.models.stored import Patch, StoredWeight


class Segment(ABC):
    """The part of a model that one stage holds: consecutive units, frozen, in eval mode.

    The ``named_modules`` of its module have the names of the whole model; what other segments hold
    is replaced by stubs without weights, or left out.
    """

    module: nn.Module
    first: bool
    last: bool

    @property
    def pooled(self) -> bool:
        """Whether :meth:`head` takes whole texts, and gives one row of outputs for each."""
        return False

    @abstractmethod
    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What travels to the next segment: the output of the last unit held, from what the segment
        before returned (``None`` for the first segment alone).

        Returns:
            the hidden states ``[N, T, d]`` (before norm and head in the last segment) and whatever
            else the next unit takes. Differentiable in each of ``hidden``, and connected to
            whatever hooks on modules of the segment put in place of an output.
        """

    def head(self, part: Tensor, batch: Batch | None = None) -> Tensor:
        """What the objective takes, from some positions ``[N, t, d]`` of the first tensor that the
        last segment's :meth:`forward` returned (where it is ``pooled`` all of them, and their
        microbatch): logits ``[N,
        t, V]`` or ``[N S, V]`` of an HF model; ``part`` itself for other models."""
        assert self.last, "only the last segment holds the head"
        return part


@dataclass(frozen=True)
class ImageInputs:
    """What a model of images takes.

    Attributes:
        directory: that has its image processor.
        channels: of an image; ``height`` and ``width``: those that its configuration says.
        positions: tokens of as much work and memory as an image.
    """

    directory: Path
    channels: int
    height: int
    width: int
    positions: int


class Outline(ABC):
    """What is known of a model without its weights.

    Attributes:
        name: what the user gave.
        units: number of consecutive pieces that can be separated.
        unit_costs: relative cost of each unit.
        width: columns of the hidden states between units, if the model says so.
        default_scope: prefixes of the module names in which blocks are chosen by default;
            ``()`` for everywhere.
        tied_head: name of the output embedding if its weight is the input embedding's.
        idle: names of modules with weights of their own that its forward does not run.
        held: names of modules that its forward does not call, while others may use their weights.
        max_positions: longest sequence, in tokens, if the model says so.
        token_inputs: whether examples are tokens, or else numbers.
        either_inputs: whether they may as well be of the other kind.
        trust_remote_code: whether code that the model's directory brings along may run.
        notices: what a person should know of how it was opened, sentences without a full stop.
        any_length: whether its layers take sequences of every length below that.
        task: what it is for; ``None`` where nobody says.
        classes: columns of its outputs where these are no words.
        class_names: the number of each class by its name.
        images: what it takes, of a model of images.
        takes: further inputs that its forward is given, where the data has them.
        placeholders: tokens in whose place a model of images and text, say, sees an image; ``None``
            for a model of text alone.
        snapshots: of the hub, what its files are of; whoever opens them brings these first.
    """

    name: str
    units: int
    unit_costs: tuple[float, ...]
    width: int | None = None
    default_scope: tuple[str, ...] = ()
    tied_head: str | None = None
    idle: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    max_positions: int | None = None
    notices: tuple[str, ...] = ()
    any_length: bool = False
    vocab_size: int | None = None
    tokenizer_dir: str | None = None
    token_inputs: bool
    either_inputs: bool = False
    trust_remote_code: bool = False
    task: Task | None = None
    classes: int | None = None
    class_names: Mapping[str, int] = MappingProxyType({})
    images: ImageInputs | None = None
    takes: frozenset[str] = frozenset()
    placeholders: frozenset[int] | None = None
    snapshots: tuple[Snapshot, ...] = ()

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The whole model's module tree, to look at names, kinds and shapes. Not to be changed."""

    @abstractmethod
    def unit_of(self, module_name: str) -> int:
        """The unit that a module of the skeleton belongs to."""

    def check_cuts(self, blocks: Sequence[Block], cuts: Sequence[range]) -> None:
        """Refuse, with a UserError, cuts between modules that have one block's weight: each stage
        would have a part of its gradient."""
        for block in blocks:
            stages = [self._stage_of(name, cuts) for name in (block.module, *block.shared)]
            if len(set(stages)) > 1:
                names = (block.module, *block.shared)
                flags = " ".join(f"--blocks '!{name}'" for name in names)
                raise UserError(
                    f"block {block.name}",
                    f"one stage for all that have its weight ({', '.join(block.shared)} as well)",
                    f"stages {', '.join(str(stage + 1) for stage in stages)} of {len(cuts)}",
                    "Its gradient is the sum of all uses, which one stage has to add up: give "
                    f"--stages 1, or leave it out with {flags}.",
                )

    def _stage_of(self, module: str, cuts: Sequence[range]) -> int:
        unit = self.unit_of(module)
        return next(stage for stage, units in enumerate(cuts) if unit in units)

    @abstractmethod
    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        """Bytes of the tensors of the segment of ``units``, floating-point ones in ``dtype``."""

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        """Run the skeleton (or a copy in another dtype) forward, for those who watch its modules.

        Gives whether it could run: a model whose inputs are known from the data alone cannot.
        """
        return False


class Model(Outline):
    """A description of a model: picklable, without weights of its own when it is pickled."""

    def looks_up(self, inputs: Tensor) -> int | None:
        """How many rows the embedding has that looks up an example's inputs, whole numbers
        ``[1, ...]``; ``None`` if none of the model's does."""
        return None

    @abstractmethod
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Per tensor ``{"dtype": str, "shape": list, "hash": hex of sampled bytes}``."""

    def configuration(self) -> dict[str, Any]:
        """What else its numbers depend on, by name: the values of a configuration (see
        :mod:`raycurv.models.config_print`). Empty where it has none."""
        return {}

    @abstractmethod
    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        """The segment of ``units`` (ascending, not empty), with its own tensors only; UserError for
        one that is missing, misshapen, not finite, or in a damaged file."""

    @abstractmethod
    def stored(self, block: Block) -> StoredWeight:
        """Where the weight of a block is kept, by key; UserError if it is not one tensor, or not of
        this block alone."""

    @abstractmethod
    def block_weight(self, block: Block) -> Tensor:
        """The weight of a block as its matrix ``[O, I]``, the bias its last column, read by itself;
        in the dtype that it is stored in and in memory of its own. UserError as from
        :meth:`stored`, or for a damaged file."""

    @abstractmethod
    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        """The files that the model is saved as, with other weights in some blocks.

        An HF model is saved as its checkpoint is: the same files, tensors, dtypes and order, with
        configuration and tokenizer. Another one as the one file ``model.safetensors`` of its state
        dict. The last file is the one without which nobody takes the others for a model.

        Raises:
            UserError: see :meth:`stored`; an entry that such a file cannot hold; when bytes are
                asked for, a patch of another shape or dtype, or that is not finite.
        """
