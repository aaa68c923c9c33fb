"""Where the matrices of blocks lie among the parameters of a module.

A vector of the curvature's space has for each block a matrix ``[O, I]``, the bias its last column.
The forward takes parameters: so a vector becomes their tangents, and what autograd finds for them
becomes a vector again.

Axis letters: Q directions, O outputs, I inputs (with the bias column).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.catalogue import kind_of_block


class BlockParameters:
    """The parameters of a module that hold the weights and biases of its blocks.

    Args:
        module: whose ``named_modules`` have the blocks' names.
        blocks: those that directions speak of.

    Attributes:
        own: the parameters by their names, detached.

    Raises:
        UserError: a weight that the module computes from others, so that it is no parameter.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks, self._module = tuple(blocks), module
        found: dict[str, nn.Parameter] = {}
        for block in blocks:
            for name in kind_of_block(block).parameters(block):
                full = f"{block.module}.{name}"
                owner, _, key = full.rpartition(".")
                parameter = module.get_submodule(owner)._parameters.get(key)
                if parameter is None:
                    raise UserError(
                        f"block {block.name}",
                        "a weight that is a parameter of its own",
                        f"{full} is computed from other parameters",
                        f"Leave it out: --blocks '!{block.name}'.",
                    )
                found[full] = parameter
        self.own = {name: parameter.detach() for name, parameter in found.items()}
        # A weight that several modules share has one name here, and stands in all of them.
        names = {id(parameter): name for name, parameter in found.items()}
        self._places = [
            (holder, key, names.get(id(parameter)))
            for holder in module.modules()
            for key, parameter in holder._parameters.items()
            if parameter is not None
        ]

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it, the module computes with these tensors in place of its parameters of the same
        names, and differentiates none of the others."""
        before = [(holder, key, holder._parameters[key]) for holder, key, _ in self._places]
        try:
            for holder, key, name in self._places:
                own = holder._parameters[key]
                assert own is not None
                # A plain tensor where torch's annotation says Parameter: it is only read.
                holder._parameters[key] = tensors.get(name or "", own.detach())  # type: ignore[assignment]
            yield
        finally:
            for holder, key, parameter in before:
                holder._parameters[key] = parameter

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a new graph, in the same memory."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.own.items()}

    def tangents(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions ``[Q, O, I]`` of some blocks as tangents of the parameters, ``[Q, ...]``,
        zero where there is none."""
        if not vectors:
            return {}
        some = next(iter(vectors.values()))
        found = {
            name: torch.zeros((len(some), *own.shape), dtype=own.dtype, device=own.device)
            for name, own in self.own.items()
        }
        for block in self.blocks:
            if block.name not in vectors:
                continue
            kind, (weight, *bias) = kind_of_block(block), self._names(block)
            for q, matrix in enumerate(vectors[block.name].to(some.device)):
                columns = matrix[:, : block.d_in - block.bias]
                held = kind.to_rows(kind.part(block, found[weight][q]))
                held.copy_(columns.reshape(held.shape))
                if bias:
                    kind.part(block, found[bias[0]][q]).copy_(matrix[:, -1])
        return found

    def matrices(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What was found for the parameters as matrices ``[O, I]`` of the blocks; zero where
        autograd found nothing."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            kind = kind_of_block(block)
            parts: list[Tensor] = []
            for name in self._names(block):
                gradient = gradients.get(name)
                own = torch.zeros_like(self.own[name]) if gradient is None else gradient
                part = kind.part(block, own)
                parts.append(part[:, None] if parts else kind.to_rows(part))
            columns = parts[0].reshape(block.d_out, -1)
            found[block.name] = torch.cat([columns, *parts[1:]], dim=1) if parts[1:] else columns
        return found

    def _names(self, block: Block) -> list[str]:
        return [f"{block.module}.{name}" for name in kind_of_block(block).parameters(block)]
