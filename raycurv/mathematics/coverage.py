"""How much of a model its blocks cover, and what they leave out: nothing is left out silently."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from raycurv.mathematics.blocks import Block, role
from raycurv.mathematics.choice import frozen_parameters, is_matrix
from raycurv.mathematics.kinds.catalogue import kind_of_block, own_parameter

Counts = dict[str, int]


@dataclass(frozen=True)
class Coverage:
    """Numbers of trainable parameters, each weight counted once.

    Attributes:
        covered: of those in blocks.
        matrices: of the others with several axes, by the names of weights of one role, such as
            ``model.layers.*.mlp.gate.weight``.
        vectors: the same of norms and biases.
        frozen: of what its owner does not train and has no block, by name as well.
        not_run: of modules that this forward does not run, by the name of the outermost.
    """

    covered: int
    matrices: Counts
    vectors: Counts
    frozen: Counts
    not_run: Counts

    @property
    def trainable(self) -> int:
        """Of the parameters that this forward runs, those that are trained or have blocks."""
        return self.covered + sum(self.matrices.values()) + sum(self.vectors.values())

    def facts(self) -> dict[str, Any]:
        """The counts and the share as ``run.json`` records them."""
        return {
            "trainable": self.trainable, "covered": self.covered, "left_out": self.matrices,
            "left_out_vectors": self.vectors, "frozen": self.frozen, "not_run": self.not_run,
        }  # fmt: skip

    def __str__(self) -> str:
        said = f"blocks cover {self.covered / max(1, self.trainable):.1%} of {self.trainable:,} "
        said += "trainable parameters"
        vectors = sum(self.vectors.values())
        left = [f"{name} ({count:,})" for name, count in self.matrices.items()]
        left += [f"norms, biases and other vectors ({vectors:,})"] if vectors else []
        for words, parts in (
            ("left out", left),
            ("frozen", [f"{name} ({count:,})" for name, count in self.frozen.items()]),
            ("not run", [f"{name} ({count:,})" for name, count in self.not_run.items()]),
        ):
            said += f"; {words}: {', '.join(parts)}" if parts else ""
        return said


def coverage(skeleton: nn.Module, blocks: Sequence[Block], idle: Collection[str]) -> Coverage:
    """What blocks cover of a model.

    Args:
        skeleton: the whole model, possibly on the meta device.
        idle: names of modules with weights of their own that the forward does not run.
    """
    covered: Counts = {}
    for block in blocks:
        for name, count in _weights_of(block, skeleton.get_submodule(block.module)):
            covered[name] = covered.get(name, 0) + count
    untrained = frozen_parameters(skeleton)
    parameters = dict(skeleton.named_parameters())
    run = [name for name in parameters if name.rpartition(".")[0] not in idle]
    found = Coverage(sum(covered.values()), {}, {}, {}, {})
    for name, parameter in parameters.items():
        left = parameter.numel() - covered.get(name, 0)
        if name.rpartition(".")[0] in idle:
            _add(found.not_run, outermost(name, run), parameter.numel())
        elif left > 0 and id(parameter) in untrained:
            _add(found.frozen, role(name), left)
        elif left > 0:
            _add(found.matrices if is_matrix(parameter) else found.vectors, role(name), left)
    return found


def _weights_of(block: Block, module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the parameters that a block is, with how many of their numbers are its."""
    if own_parameter(module, block.parameter) is None:
        # Computed from others, which are its module's.
        yield from ((f"{block.module}.{n}", p.numel()) for n, p in module.named_parameters())
        return
    kind = kind_of_block(block)
    for name in kind.parameters(block):
        parameter = own_parameter(module, name)
        if parameter is not None:
            yield f"{block.module}.{name}", kind.part(block, parameter).numel()


def outermost(name: str, others: Collection[str]) -> str:
    """The shortest beginning of a dotted name that none of the others has."""
    parts = name.split(".")
    for n in range(1, len(parts)):
        start = ".".join(parts[:n])
        if not any(other.startswith(f"{start}.") for other in others):
            return start
    return name


def _add(counts: Counts, name: str, count: int) -> None:
    counts[name] = counts.get(name, 0) + count
