"""Random probe vectors by a counter: the same ones on any stages, in any order, after any restart.

A number is drawn from the hash of (seed, block, row, probe, column), see
:mod:`raycurv.mathematics.loss.draws`; signs have the smallest variance of all in Hutchinson's
estimator (Hutchinson 1990), normal numbers no preferred axes.

Axis letters: P probes, O outputs, I inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raycurv.mathematics.blocks import Block
from raycurv.mathematics.loss.draws import id_keys, uniforms

# Numbers that are drawn at a time: each takes some 50 bytes on the way.
_DRAWN = 2**20


def signs(seed: int, block: Block, probes: range, dtype: torch.dtype) -> Tensor:
    """Random numbers ±1, ``[P, O, I]``.

    Args:
        seed: tells these probes from those of other purposes.
        block: of their shape and name.
        probes: their numbers.
        dtype: of the result.
    """
    return _drawn(seed, block, probes, dtype, normal=False)


def normals(seed: int, block: Block, probes: range, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, ``[P, O, I]``; arguments as of :func:`signs`."""
    return _drawn(seed, block, probes, dtype, normal=True)


def _drawn(seed: int, block: Block, probes: range, dtype: torch.dtype, normal: bool) -> Tensor:
    key = id_keys([block.name])
    out = torch.empty(len(probes), block.d_out, block.d_in, dtype=dtype)
    rows = max(1, _DRAWN // block.d_in)
    for start in range(0, block.d_out, rows):
        positions = torch.arange(start, min(start + rows, block.d_out))
        for place, probe in enumerate(probes):
            u_OI = uniforms(seed, key, positions, probe, block.d_in)[0]
            values = math.sqrt(2) * torch.erfinv(2 * u_OI - 1) if normal else (2 * u_OI - 1).sign()
            out[place, start : start + len(positions)] = values
    return out
