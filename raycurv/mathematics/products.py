"""Matrix products of captured rows, by the fastest kernel at hand.

On CPUs torch multiplies float32 matrices with MKL, which reaches half of oneDNN's rate on AMD
processors (LOG.md). oneDNN is asked for by the operator that torch's own compiler uses; where that
is missing, or for another dtype or device, the product is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def _one_dnn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """``(x [R, C], w [O, C]) -> x wᵀ`` by oneDNN, if this torch has it and it is right."""
    if not torch.backends.mkldnn.is_available():
        return None
    x, w = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(2, 4)

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        # A part of wider rows (a tile) sends oneDNN to its reference loops, a thousand times slower
        # (LOG.md); only x may be one.
        if not (w.is_contiguous() or w.T.is_contiguous()):
            w = w.contiguous()
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return product

    try:
        right = torch.equal(multiply(x, w), x @ w.T)
    except (AttributeError, RuntimeError):
        # Not an interface that torch promises to keep.
        return None
    return multiply if right else None


_multiply = _one_dnn()
# Rows on either side below which oneDNN is the slower one (LOG.md), and multiplications of an
# example from which a call of its own is sooner than a batched product.
_FEWEST, _WORTH = 32, 2**20
# Columns of a panel of a symmetric product, of wide ones twice as many: narrower panels leave more
# of the other triangle out, and multiply slower (LOG.md).
_PANEL = 128


def suits(x: Tensor) -> bool:
    """Whether another kernel than torch's may multiply it."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Every example's ``leftᵀ right``, ``[N, X, Y]``, from ``[N, T, X]`` and ``[N, T, Y]``."""
    work = left.shape[1] * left.shape[2] * right.shape[2]
    if _multiply is None or work < _WORTH or not (suits(left) and right.dtype == left.dtype):
        return torch.bmm(left.transpose(1, 2), right)
    out = left.new_empty(len(left), left.shape[2], right.shape[2])
    for n in range(len(left)):
        out[n] = _multiply(left[n].T, right[n].T)
    return out


def rows_times(x: Tensor, w: Tensor) -> Tensor:
    """``x w`` for rows ``x [..., C]`` and ``w [C, O]``."""
    rows = x.numel() // max(1, x.shape[-1])
    few = min(rows, w.shape[1]) < _FEWEST
    if _multiply is None or few or not (suits(x) and w.dtype == x.dtype):
        return x @ w
    product = _multiply(x.reshape(-1, x.shape[-1]), w.T)
    return product if x.ndim == 2 else product.view(*x.shape[:-1], w.shape[1])


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += leftᵀ right`` for rows ``left [R, X]`` and ``right [R, Y]``."""
    if _multiply is None or not (suits(left) and right.dtype == total.dtype == left.dtype):
        total.addmm_(left.T, right)
    else:
        total.add_(_multiply(left.T, right.T))


def add_gram(total: Tensor, rows: Tensor) -> bool:
    """``total += rowsᵀ rows``; gives whether that is so on and above the diagonal alone, and
    :func:`mirror` has to follow before the sum is used."""
    if _multiply is None or not (suits(rows) and total.dtype == rows.dtype):
        total.addmm_(rows.T, rows)
        return False
    for start, end in _panels(len(total)):
        # Laid out as rows again: they would be turned where they are multiplied.
        right = rows[:, start:].contiguous()
        total[start:end, start:].add_(_multiply(rows[:, start:end].T, right.T))
    return True


def gram_elements(width: int) -> int:
    """Elements of the largest product that :func:`add_gram` makes of rows of a width."""
    return max((end - start) * (width - start) for start, end in _panels(width))


def mirror(total: Tensor) -> None:
    """Write what stands above the diagonal of a symmetric matrix below it, in place."""
    for start, end in _panels(len(total)):
        total[end:, start:end].copy_(total[start:end, end:].T)


def _panels(width: int) -> Iterator[tuple[int, int]]:
    """Where panels of so many columns begin and end; the last takes the rest, for a single column
    would be multiplied, and rounded, another way."""
    panel = _PANEL if width < 8 * _PANEL else 2 * _PANEL
    starts = range(0, max(1, width // panel) * panel, panel)
    return ((start, start + panel if start + panel in starts else width) for start in starts)
