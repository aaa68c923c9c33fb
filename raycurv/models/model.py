"""A model as a chain of segments: what every kind of model can say of itself and build."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint_files import CheckpointFile
from raycurv.models.factory import FactoryModel
from raycurv.models.stored import Patch, StoredWeight

ModelSource = str | Callable[[], nn.Module]


class Segment(Protocol):
    """The part of a model that one stage holds: consecutive units, frozen, in eval mode.

    Attributes:
        module: its ``named_modules`` have the names of the whole model; what other segments hold
            is replaced by stubs without weights, or left out.
        first: holds the first unit.
        last: holds the last unit.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def first(self) -> bool: ...

    @property
    def last(self) -> bool: ...

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What travels to the next segment: the output of the last unit held.

        Args:
            batch: the microbatch.
            hidden: what the segment before returned; ``None`` for the first segment alone.

        Returns:
            the hidden states ``[N, T, d]`` (before norm and head in the last segment) and whatever
            else the next unit takes. Differentiable in each of ``hidden``, and connected to
            whatever hooks on modules of the segment put in place of an output.
        """
        ...

    def head(self, part: Tensor) -> Tensor:
        """What the objective takes, from a slice of the last segment's hidden states.

        Args:
            part: ``[N, t, d]``: some positions of the first tensor that :meth:`forward` returned.

        Returns:
            logits ``[N, t, V]`` of an HF model; ``part`` itself for other models.
        """
        ...


class Outline(Protocol):
    """What is known of a model without its weights.

    Attributes:
        name: what the user gave.
        units: number of consecutive pieces that can be separated.
        unit_costs: relative cost of each.
        width: columns of the hidden states between units, if the model says so.
        default_scope: prefixes of the module names in which blocks are chosen by default;
            ``()`` for everywhere.
        tied_head: name of the output embedding if its weight is the input embedding's.
        max_positions: longest sequence, in tokens, if the model says so.
        vocab_size: number of token ids, if the model says so.
        tokenizer_dir: directory of the model's tokenizer, if there is one.
        token_inputs: whether inputs are token ids.
    """

    name: str

    @property
    def units(self) -> int: ...

    @property
    def unit_costs(self) -> tuple[float, ...]: ...

    @property
    def width(self) -> int | None: ...

    @property
    def default_scope(self) -> tuple[str, ...]: ...

    @property
    def tied_head(self) -> str | None: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def tokenizer_dir(self) -> str | None: ...

    @property
    def token_inputs(self) -> bool: ...

    def skeleton(self) -> nn.Module:
        """The whole model's module tree, to look at names, kinds and shapes."""
        ...

    def unit_of(self, module_name: str) -> int:
        """The unit that a module of the skeleton belongs to."""
        ...

    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        """Bytes of the tensors of a segment."""
        ...

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        """Run the skeleton (or a copy in another dtype) forward, for those who watch its modules.

        Returns:
            Whether it could run: a model of unknown inputs cannot.
        """
        ...


class Model(Outline, Protocol):
    """A description of a model: picklable, without weights of its own when it is pickled."""

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Per tensor ``{"dtype": str, "shape": list, "hash": hex of sampled bytes}``."""
        ...

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        """The segment of ``units`` (ascending, not empty), with its own tensors only.

        Raises:
            UserError: a tensor that is missing, misshapen, not finite, or in a damaged file.
        """
        ...

    def stored(self, block: Block) -> StoredWeight:
        """Where the weight of a block is kept, by key.

        Raises:
            UserError: it is not one tensor, or not of this block alone.
        """
        ...

    def block_weight(self, block: Block) -> Tensor:
        """The weight of a block as its matrix ``[O, I]``, the bias its last column, read by itself;
        in the dtype that it is stored in.

        Raises:
            UserError: see :meth:`stored`; or a damaged file.
        """
        ...

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        """The files that the model is saved as, with other weights in some blocks.

        An HF model is saved as its checkpoint is: the same files, tensors, dtypes and order, with
        configuration and tokenizer. Another one as the one file ``model.safetensors`` of its state
        dict. The last file is the one without which nobody takes the others for a model.

        Raises:
            UserError: see :meth:`stored`; when bytes are asked for, a patch of another shape or
                dtype, or that is not finite.
        """
        ...


def open_model(source: ModelSource, base: str | Path | None = None) -> Model:
    """Describe a model.

    Args:
        source: a directory with an HF ``config.json`` and safetensors; the name
            ``package.module:factory`` of a callable that returns an ``nn.Module``; or the callable.
        base: directory that relative names start from; the working directory when ``None``.

    Raises:
        UserError: what the source names is not there, or is not such a model.
    """
    factory, directory = _look(source, base)
    if factory is not None:
        return factory
    # Importing transformers takes seconds and memory that other models need not pay for.
    from raycurv.models.hf import HFModel

    return HFModel(str(source), directory)


def open_outline(source: ModelSource, base: str | Path | None = None) -> Outline:
    """As :func:`open_model`, but of an HF directory ``config.json`` alone is read.

    Raises:
        UserError: what the source names is not there, or is not such a model.
    """
    factory, directory = _look(source, base)
    if factory is not None:
        return factory
    from raycurv.models.hf import HFOutline

    return HFOutline(str(source), directory)


def _look(source: ModelSource, base: str | Path | None) -> tuple[FactoryModel | None, Path]:
    """The model of a factory, or ``None`` and the directory that the source names."""
    folder = Path.cwd() if base is None else Path(base).absolute()
    if not isinstance(source, str):
        # A module is callable, too, but calling it is a forward.
        if not callable(source) or isinstance(source, nn.Module):
            raise UserError(
                "model",
                "a directory, package.module:factory, or a callable",
                f"a {type(source).__name__}",
                "Pass a function that builds the network, not the network.",
            )
        return FactoryModel(_name_of(source), source, folder), folder
    directory = folder / Path(source).expanduser()
    if not directory.exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source):
        return FactoryModel(source, None, folder), folder
    return None, directory


def _name_of(source: Callable[[], nn.Module]) -> str:
    module = getattr(source, "__module__", None) or "?"
    return f"{module}:{getattr(source, '__qualname__', type(source).__qualname__)}"
