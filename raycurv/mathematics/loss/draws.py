"""Labels drawn from the model by a counter: no state, no order, no dependence on the batch.

A uniform number is a hash of (seed, example id, position of the target, draw, component), so the
same example gets the same number in any microbatch, on any stage, replica or restart.

    h   = mix(mix(mix(mix(seed, id), position), draw), component)   splitmix64, Steele et al. 2014
    u   = (top 52 bits of h + 1/2) / 2**52                                in (0, 1), float64
    y   = min { v : sum_{w <= v} p_w >= u * sum_w p_w }              inverse CDF, summed in float64

Axis letters: R rows, V classes, K components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# int64 wraps as uint64 does; constants above 2**63 are written as their negative twins.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# Width of the first level of the inverse CDF: one float64 sum for each so many classes.
_BLOCK = 512


def id_keys(ids: Sequence[str]) -> Tensor:
    """The ids' 64-bit keys ``[N]`` (int64): blake2b, which is the same in every process."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # >> on int64 copies the sign bit in; uint64 does not.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(state: Tensor, field: Tensor | int) -> Tensor:
    """One splitmix64 step that folds ``field`` into ``state`` (int64, broadcast)."""
    step = (field + 1) * _GOLDEN
    if isinstance(step, int):
        # Python's integers do not wrap, and torch refuses those that int64 cannot hold.
        step = (step + 2**63) % 2**64 - 2**63
    x = state + step
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hashes(seed: int, keys_N: Tensor, positions_T: Tensor, draw: int, components: int) -> Tensor:
    """64 random bits each, int64 ``[N, T, components]``.

    Args:
        keys_N: from :func:`id_keys`.
        positions_T: position of each target in its example (``zeros(1)`` without a token axis).
        draw: which of the ``--draws`` this is.
        components: how many independent numbers a target needs.
    """
    device = positions_T.device
    # The seed is mixed before the id is added, or (seed, id) pairs would collide along diagonals.
    start = _mix(torch.zeros((), dtype=torch.int64, device=device), seed)
    h_N = _mix(start, keys_N.to(device))
    h_NT = _mix(h_N[:, None], positions_T[None, :])
    h_NT = _mix(h_NT, draw)
    return _mix(h_NT[:, :, None], torch.arange(components, device=device))


def uniforms(seed: int, keys_N: Tensor, positions_T: Tensor, draw: int, components: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 ``[N, T, components]``; arguments as :func:`hashes`."""
    h_NTK = hashes(seed, keys_N, positions_T, draw, components)
    return (_shift_right(h_NTK, 12).double() + 0.5) * 2.0**-52


def draw_categorical(logits_RV: Tensor, u_R: Tensor) -> Tensor:
    """Classes drawn from ``softmax(logits)`` by inverse CDF, int64 ``[R]``.

    Two levels keep the sums in float64 without a float64 ``[R, V]``: sums of blocks of 512 classes,
    then the running sum inside the one block that the number falls into. A float32 running sum over
    a vocabulary of 128k draws up to one label in twenty wrongly. Logits may be of any floating
    dtype; ``u_R`` is float64 in (0, 1).
    """
    rows, classes = logits_RV.shape
    work = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    weights = (work - work.amax(dim=1, keepdim=True)).exp()
    blocks = -(-classes // _BLOCK)
    if blocks * _BLOCK != classes:
        weights = torch.nn.functional.pad(weights, (0, blocks * _BLOCK - classes))
    weights = weights.view(rows, blocks, _BLOCK)
    edges_RB = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target_R = u_R * edges_RB[:, -1]
    block_R = torch.searchsorted(edges_RB, target_R[:, None]).clamp_(max=blocks - 1)[:, 0]
    before_R = torch.where(
        block_R > 0,
        edges_RB.gather(1, (block_R - 1).clamp(min=0)[:, None])[:, 0],
        torch.zeros_like(target_R),
    )
    inside = weights[torch.arange(rows, device=weights.device), block_R].double().cumsum(dim=1)
    offset_R = torch.searchsorted(inside, (target_R - before_R)[:, None])[:, 0]
    # Rounding can leave the target a hair above the block's last edge: take its last likely class.
    last_R = (inside < inside[:, -1:]).sum(dim=1)
    return block_R * _BLOCK + torch.minimum(offset_R, last_R)
