"""Where a model keeps the weights of its blocks, and other weights in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.catalogue import kind_of_block
from raycurv.models.checkpoint import Entry, check_finite, tensor_bytes

# Gives a tensor by its key.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Patch:
    """Another weight of one block. Picklable.

    Attributes:
        read: gives the matrix ``[O, I]`` (the bias its last column), in the dtype in which the
            model stores the block; picklable.
        mark: tells this weight from every other one, such as a checksum of all its bytes.
    """

    block: Block
    read: Callable[[], Tensor]
    mark: str

    @classmethod
    def of(cls, block: Block, matrix_OI: Tensor) -> Patch:
        """The patch of a weight in memory."""
        kept = matrix_OI.detach().cpu().clone()
        header = repr((kept.dtype, tuple(kept.shape))).encode()
        digest = hashlib.blake2b(header, digest_size=16)
        digest.update(tensor_bytes(kept))
        return cls(block, partial(_given, kept), digest.hexdigest())


def _given(matrix: Tensor) -> Tensor:
    return matrix


@dataclass(frozen=True)
class StoredWeight:
    """Where a model keeps the weight of a block.

    Attributes:
        weight: key of the tensor that holds the weight among the model's tensors.
        bias: key of the tensor that holds the bias, if there is one.
        shape: of the block's part of the weight's tensor.
        dtypes: as stored, of the weight and of the bias, if there is one.
    """

    block: Block
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def among(
        cls,
        tensors: Mapping[str, Tensor | Entry],
        block: Block,
        weight: str,
        bias: str | None = None,
    ) -> StoredWeight:
        """Where the weight with these keys is kept."""
        keys = [weight] if bias is None else [weight, bias]
        dtypes = tuple(tensors[key].dtype for key in keys)
        whole = torch.empty(tuple(tensors[weight].shape), device="meta")
        shape = tuple(kind_of_block(block).part(block, whole).shape)
        return cls(block, weight, bias, shape, dtypes)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors that hold the block."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the block's matrix: the wider one of weight and bias."""
        return reduce(torch.promote_types, self.dtypes)

    def matrix(self, read: Read) -> Tensor:
        """The matrix ``[O, I]``, contiguous, in the stored dtype."""
        kind = kind_of_block(self.block)
        # A part of a tensor is cloned, or the whole one would stay in memory.
        weight, *bias = (
            part if self.block.index is None else part.clone()
            for part in (kind.part(self.block, read(key)) for key in self.keys)
        )
        matrix = kind.to_matrix(weight, bias[0] if bias else None)
        return matrix.contiguous()

    def parts(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix ``[O, I]`` as the block's parts of the stored tensors, by key; UserError for one
        of another shape or dtype, or that is not finite."""
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
        parts = kind_of_block(self.block).from_matrix(self.block, matrix, self.shape)
        return {
            key: part.to(dtype)
            for key, part, dtype in zip(self.keys, parts, self.dtypes, strict=False)
            if part is not None
        }

    def put(self, module: nn.Module, matrix: Tensor) -> None:
        """Copy a matrix ``[O, I]`` into the module that holds the block, cast as a loaded one is;
        UserError as from :meth:`parts`, or for what overflows the module's dtype."""
        parts, kind = self.parts(matrix), kind_of_block(self.block)
        with torch.no_grad():
            names = kind.parameters(self.block)
            for key, name in zip(self.keys, names, strict=True):
                held = kind.part(self.block, module.get_parameter(name))
                held.copy_(parts[key])
                check_finite(held, f"the new weight of block {self.block.name}")


def parameter_names(block: Block) -> tuple[str, ...]:
    """Dotted names of the parameters that hold a block: of its weight, then of its bias, if any."""
    return tuple(f"{block.module}.{name}" for name in kind_of_block(block).parameters(block))


def replacements(
    stored: Callable[[Block], StoredWeight], patches: Iterable[Patch], read: Read
) -> dict[str, Callable[[], Tensor]]:
    """By key what makes the tensor with patches in it; one patch is in memory at a time.

    ``read`` gives a tensor as it is stored, in memory of its own.
    """

    def patched(key: str, patches: Sequence[Patch]) -> Tensor:
        whole: Tensor | None = None
        for patch in patches:
            part = stored(patch.block).parts(patch.read())[key]
            if patch.block.index is None:
                return part
            whole = read(key) if whole is None else whole
            kind_of_block(patch.block).part(patch.block, whole).copy_(part)
        assert whole is not None
        return whole

    by_key: dict[str, list[Patch]] = {}
    for patch in patches:
        for key in stored(patch.block).keys:
            by_key.setdefault(key, []).append(patch)
    return {key: partial(patched, key, mine) for key, mine in by_key.items()}


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
