"""Where a model keeps the weights of its blocks, and other weights in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.matrices import from_matrix, to_matrix
from raycurv.models.checkpoint import check_finite, tensor_bytes

# Gives a tensor by its key.
Read = Callable[[str], Tensor]


class Headers(Protocol):
    """Shapes and dtypes of a model's tensors."""

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...


@dataclass(frozen=True)
class Patch:
    """Another weight of one block. Picklable.

    Attributes:
        block: whose.
        read: gives the matrix ``[O, I]`` (the bias its last column), in the dtype in which the
            model stores the block; picklable.
        mark: tells this weight from every other one, such as a checksum of all its bytes.
    """

    block: Block
    read: Callable[[], Tensor]
    mark: str

    @classmethod
    def of(cls, block: Block, matrix_OI: Tensor) -> Patch:
        """A weight in memory."""
        kept = matrix_OI.detach().cpu().clone()
        said = repr((kept.dtype, tuple(kept.shape))).encode()
        digest = hashlib.blake2b(said, digest_size=16)
        digest.update(tensor_bytes(kept))
        return cls(block, partial(_given, kept), digest.hexdigest())


def _given(matrix: Tensor) -> Tensor:
    return matrix


@dataclass(frozen=True)
class StoredWeight:
    """Where a model keeps the weight of a block.

    Attributes:
        block: whose.
        weight: key of the weight among the model's tensors.
        bias: key of the bias, if there is one.
        shape: of the weight.
        dtypes: of the weight, and of the bias.
    """

    block: Block
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def among(cls, headers: Headers, block: Block, weight: str, bias: str | None) -> StoredWeight:
        """A weight whose keys are known."""
        keys = [weight] if bias is None else [weight, bias]
        dtypes = tuple(headers.dtype(key) for key in keys)
        return cls(block, weight, bias, headers.shape(weight), dtypes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the block's matrix: the wider one of weight and bias."""
        found = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            found = torch.promote_types(found, dtype)
        return found

    def matrix(self, read: Read) -> Tensor:
        """The matrix ``[O, I]``, contiguous, in the stored dtype."""
        bias = None if self.bias is None else read(self.bias)
        return to_matrix(self.block, read(self.weight), bias).contiguous()

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix ``[O, I]`` as what stands, by key, in place of the stored tensors.

        Raises:
            UserError: a matrix of another shape or dtype, or that is not finite.
        """
        where = f"the new weight of block {self.block.name}"
        wanted = ((self.block.d_out, self.block.d_in), self.dtype)
        if (tuple(matrix.shape), matrix.dtype) != wanted:
            raise UserError(
                where,
                f"shape {list(wanted[0])} of {_named(wanted[1])}, as the model stores it",
                f"{list(matrix.shape)} of {_named(matrix.dtype)}",
                "Make it from Model.block_weight, and cast it back.",
            )
        check_finite(matrix, where)
        weight, bias = from_matrix(self.block, matrix, self.shape)
        found = {self.weight: weight.to(self.dtypes[0])}
        if self.bias is not None:
            assert bias is not None
            found[self.bias] = bias.to(self.dtypes[1])
        return found

    def put(self, module: nn.Module, matrix: Tensor) -> None:
        """Copy a matrix ``[O, I]`` into the module that holds the block, cast as a loaded one is.

        Raises:
            UserError: see :meth:`tensors`; or what overflows the module's dtype.
        """
        tensors = self.tensors(matrix)
        with torch.no_grad():
            for key, name in ((self.weight, "weight"), (self.bias, "bias")):
                if key is not None:
                    held = module.get_parameter(name)
                    held.copy_(tensors[key])
                    check_finite(held, f"the new weight of block {self.block.name}")


def replacements(
    stored: Callable[[Block], StoredWeight], patches: Iterable[Patch]
) -> dict[str, Callable[[], Tensor]]:
    """By key what reads the tensor that patches put there; one patch is in memory at a time."""

    def read(patch: Patch, key: str) -> Tensor:
        return stored(patch.block).tensors(patch.read())[key]

    found: dict[str, Callable[[], Tensor]] = {}
    for patch in patches:
        at = stored(patch.block)
        for key in (at.weight, at.bias):
            if key is not None:
                found[key] = partial(read, patch, key)
    return found


def no_tensor_of_its_own(block: Block, got: str) -> UserError:
    """The mistake of a block whose weight cannot be read or replaced by itself."""
    return UserError(
        f"block {block.name}",
        "a weight that is one tensor of the model's, and of nothing else",
        got,
        f"Leave it out: --blocks '!{block.name}'.",
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
