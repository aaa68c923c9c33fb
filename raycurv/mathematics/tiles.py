"""Diagonal tiles of a wide axis: a factor wider than ``max_factor_dim`` is cut into equal runs.

Its basis is then block-diagonal, which is still orthonormal, so the corrected eigenvalues are
fitted in it as in any other (Grosse et al. 2023, appendix A).
"""

from __future__ import annotations

# 32-bit LAPACK indexes d*d elements with a signed 32-bit integer in its workspace queries.
LARGEST_EIGH = 32_766


def tile_widths(width: int, max_factor_dim: int | None) -> tuple[int, ...]:
    """Widths of the tiles of an axis, as equal as they can be, none above ``max_factor_dim``."""
    limit = min(max_factor_dim or LARGEST_EIGH, LARGEST_EIGH)
    count = -(-width // limit)
    small, larger = divmod(width, count)
    return (small + 1,) * larger + (small,) * (count - larger)
