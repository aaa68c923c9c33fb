"""Weights that take the place of a model's own, and models that are saved with them.

weights/BLOCK.safetensors     weight: the matrix [O, I], the bias its last column
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import PurePosixPath

from torch import Tensor

from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors, write_tensors
from raycurv.mathematics.blocks import Block
from raycurv.models.checkpoint_files import CheckpointFile
from raycurv.models.model import Model
from raycurv.models.stored import Patch


def weight_file(block: str) -> str:
    """Where a block's new weight lies."""
    return f"weights/{block}.safetensors"


def write_weight(store: Store, block: Block, matrix_OI: Tensor) -> None:
    """Write a block's new weight, in the dtype in which its model stores it."""
    write_tensors(store, weight_file(block.name), {"weight": matrix_OI}, {"block": block.name})


def read_weight(store: Store, block: str) -> Tensor:
    """A block's new weight ``[O, I]``; FileNotFoundError if there is none, DamagedFile if it is not
    as it was written."""
    return open_tensors(store, weight_file(block)).read("weight")


def stored_patch(store: Store, block: Block) -> Patch:
    """The patch of a weight in a store, which is read when a model is built or saved; raises as
    :func:`read_weight`."""
    mark = open_tensors(store, weight_file(block.name)).checksum
    return Patch(block, partial(read_weight, store, block.name), mark)


def write_checkpoint(store: Store, model: Model) -> None:
    """Save a model in a directory of its own, a piece or a tensor of it in memory at a time.

    Each file is there whole or not at all, and the one without which nobody takes the others for a
    model comes last: what was interrupted is no model, and is written anew.

    An HF checkpoint becomes one that transformers load by itself; another model one
    ``model.safetensors`` of its state dict.

    Raises:
        UserError: the directory holds other files, or is the model's own; a weight that cannot be
            put in (see :meth:`raycurv.models.model.Model.files`).
        NoSpace: the disk is full.
    """
    files = model.files()
    _refuse_own(store, files)
    names = {file.name for file in files}
    others = [n for n in store.names() if n.removesuffix(".part") not in names]
    if others:
        raise UserError(
            store.root,
            "a new directory for a checkpoint, or one that was written to in part",
            f"one that holds {others[0]}",
            "Give another directory.",
        )
    store.delete(files[-1].name)
    for file in files:
        store.write(file.name, file.chunks())


def _refuse_own(store: Store, files: tuple[CheckpointFile, ...]) -> None:
    for file in files:
        if not store.local or file.source is None:
            continue
        own = file.source.parents[len(PurePosixPath(file.name).parts) - 1]
        if os.path.realpath(own) == store.identity:
            raise UserError(
                store.root,
                "another directory than that of the model itself",
                "the model's own",
                "Give another directory: a checkpoint is not changed in its place.",
            )
