"""What of a fit can be pruned: its blocks, and whether it has the statistics for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raycurv.errors import UserError
from raycurv.files.artifacts import gradient_file
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.files.tensorfile import is_complete
from raycurv.jobs.fitted import chosen_blocks, fit_command, fitted_blocks
from raycurv.jobs.prune.prune_settings import PruneSettings
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.methods import open_method
from raycurv.mathematics.pruning.structures import column_runs
from raycurv.models.heads import head_widths
from raycurv.models.model import Model


def blocks_to_prune(
    settings: PruneSettings, fitted: Store, network: Model
) -> tuple[tuple[Block, ...], dict[str, int]]:
    """The blocks that are pruned, and where heads go the columns of a head in each.

    Raises:
        UserError: there are none, or one that cannot be pruned so.
    """
    blocks = chosen_blocks(fitted_blocks(fitted, network), settings.blocks)
    heads: dict[str, int] = {}
    if settings.structure == "heads":
        heads = head_widths(network, [b.name for b in blocks])
        blocks = _readers_of_heads(blocks, heads)
    pattern = settings.pattern()
    for block in blocks:
        # A weight that cannot be replaced is refused before anything is computed.
        network.stored(block)
        if pattern is not None:
            pattern.groups(block)
    return blocks, heads


def _readers_of_heads(blocks: Sequence[Block], heads: Mapping[str, int]) -> tuple[Block, ...]:
    """The blocks among these that read attention heads."""
    found = tuple(b for b in blocks if b.name in heads)
    if not found:
        raise UserError(
            "--structure heads", "an attention output projection among the blocks", "none",
            "Choose other --blocks; the model's config.json must state its heads.",
        )  # fmt: skip
    for block in found:
        column_runs(block, heads[block.name])
    return found


def check_statistics(
    settings: PruneSettings, fitted: Store, fit: Manifest, blocks: Sequence[Block]
) -> None:
    """Refuse what the run has no statistics for.

    Raises:
        UserError: the message has the command that makes them.
    """
    said = fit.settings
    method = open_method(said["method"])
    if not method.curved and settings.saliency != "magnitude":
        raise UserError(
            f"--saliency {settings.saliency}", "a fit with curvature", f"{method} in {fitted.root}",
            f"{fit_command(fit, 'RUN', method='ekfac')}, or --saliency magnitude.",
        )  # fmt: skip
    if settings.inverse is not None and not method.ranked:
        raise UserError(
            "--inverse", "a fit with --method mfac", f"one with {method}", "Leave --inverse out."
        )
    if settings.first_order and not all(is_complete(fitted, gradient_file(b.name)) for b in blocks):
        remedy = f"{fit_command(fit, fitted.root, gradients=True)}: it makes what is missing."
        if "extend" in fit.facts:
            remedy = "Fit all its data together, with --gradients."
        raise UserError(
            "--first-order", "a fit with gradient statistics", f"none in {fitted.root}", remedy
        )
    if settings.steps > 1 and "extend" in fit.facts:
        raise UserError(
            "--steps", "1 for a fit that extends another, whose directory has not all its examples",
            str(settings.steps), "Fit all the data together, or leave --steps out.",
        )  # fmt: skip
