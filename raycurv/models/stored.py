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
from raycurv.models.pieces import Parts, Place

# Gives what lies at a place.
Read = Callable[[Place], Tensor]


@dataclass(frozen=True)
class Patch:
    """Another weight of one block. Picklable.

    Attributes:
        read: gives the matrix ``[O, I]`` (the bias its last column), in the dtype in which the
            model stores the block; picklable.
        mark: tells this weight from every other one, such as a checksum of all its bytes.
        wide: whether the matrix is float64 instead, for a model that is run and never saved.
    """

    block: Block
    read: Callable[[], Tensor]
    mark: str
    wide: bool = False

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
        weight: the block's rows ``[O, I]``, without the bias, among the model's tensors.
        bias: the same of its bias ``[O]``, if there is one.
        dtypes: as stored, of the weight and of the bias, if there is one.
    """

    block: Block
    weight: Place
    bias: Place | None
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def among(
        cls,
        tensors: Mapping[str, Tensor | Entry],
        block: Block,
        parts: Callable[[str], Parts],
    ) -> StoredWeight:
        """Where the weight is kept among ``tensors``, by the parts of each parameter of the block's
        module; UserError if it is in several tensors."""
        found = []
        for name, view in zip(parameter_names(block), _views(block), strict=False):
            place = parts(name).place(view)
            if place is None:
                raise no_tensor_of_its_own(
                    block, f"{name} that transformers makes of several tensors"
                )
            found.append(place)
        dtypes = tuple(tensors[place.key].dtype for place in found)
        return cls(block, found[0], found[1] if block.bias else None, dtypes)

    @property
    def places(self) -> tuple[Place, ...]:
        """Of the weight, and of the bias, if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the block's matrix: the wider one of weight and bias."""
        return reduce(torch.promote_types, self.dtypes)

    def matrix(self, read: Read) -> Tensor:
        """The matrix ``[O, I]``, contiguous, in the stored dtype."""
        columns = [read(place) for place in self.places]
        if self.bias is None:
            return columns[0].contiguous()
        return torch.cat([c.reshape(self.block.d_out, -1).to(self.dtype) for c in columns], dim=1)

    def parts(self, matrix: Tensor, wide: bool = False) -> dict[Place, Tensor]:
        """A matrix ``[O, I]`` as the block's parts of the stored tensors, or in float64 where it is
        ``wide``; UserError for one of another shape or dtype, or that is not finite."""
        where = f"the new weight of block {self.block.name}"
        dtypes = (torch.float64,) * len(self.dtypes) if wide else self.dtypes
        wanted = ((self.block.d_out, self.block.d_in), reduce(torch.promote_types, dtypes))
        if (tuple(matrix.shape), matrix.dtype) != wanted:
            raise UserError(
                where,
                f"shape {list(wanted[0])} of {_named(wanted[1])}, as the model stores it",
                f"{list(matrix.shape)} of {_named(matrix.dtype)}",
                "Make it from Model.block_weight, and cast it back.",
            )
        check_finite(matrix, where)
        rows = (matrix[:, : self.block.d_in - self.block.bias], matrix[:, -1])
        pairs = zip(self.places, rows, dtypes, strict=False)
        return {place: part.to(dtype) for place, part, dtype in pairs}

    def put(self, module: nn.Module, matrix: Tensor, wide: bool = False) -> None:
        """Copy a matrix ``[O, I]`` into the module that holds the block, cast as a loaded one is;
        UserError as from :meth:`parts`, or for what overflows the module's dtype."""
        names = kind_of_block(self.block).parameters(self.block)
        parts = self.parts(matrix, wide).values()
        with torch.no_grad():
            for name, view, part in zip(names, _views(self.block), parts, strict=False):
                held = view(module.get_parameter(name))
                held.copy_(part)
                check_finite(held, f"the new weight of block {self.block.name}")


def _views(block: Block) -> tuple[Callable[[Tensor], Tensor], ...]:
    """A block's part of the parameter of its weight as rows ``[O, I]``, and of its bias ``[O]``."""
    kind = kind_of_block(block)
    return lambda weight: kind.to_rows(kind.part(block, weight)), partial(kind.part, block)


def parameter_names(block: Block) -> tuple[str, ...]:
    """Dotted names of the parameters that hold a block: of its weight, then of its bias, if any."""
    return tuple(f"{block.module}.{name}" for name in kind_of_block(block).parameters(block))


def shared_names(block: Block) -> tuple[str, ...]:
    """Dotted names under which other modules have the block's weight."""
    return tuple(f"{module}.{block.parameter}" for module in block.shared)


def replacements(
    stored: Callable[[Block], StoredWeight], patches: Iterable[Patch], read: Callable[[str], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """By key what makes the tensor with patches in it; one patch is in memory at a time.

    ``read`` gives a tensor as it is stored, in memory of its own.
    """

    def patched(key: str, patches: Sequence[Patch]) -> Tensor:
        whole: Tensor | None = None
        for patch in patches:
            for place, part in stored(patch.block).parts(patch.read()).items():
                if place.key != key:
                    continue
                if whole is None:
                    whole = part.new_empty(place.whole) if place.covers else read(key)
                place.of(whole).copy_(part)
        assert whole is not None
        return whole

    by_key: dict[str, list[Patch]] = {}
    for patch in patches:
        for place in stored(patch.block).places:
            by_key.setdefault(place.key, []).append(patch)
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
