"""The curvature of a fit's blocks, opened from its run directory whichever method made it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from raycurv.errors import DamagedFile
from raycurv.files.artifacts import (
    basis_mark,
    corrected_file,
    read_eigen,
    read_lam,
    read_spectrum,
)
from raycurv.files.manifest import Manifest
from raycurv.files.row_files import open_rows
from raycurv.files.store import Store
from raycurv.files.tensorfile import open_tensors
from raycurv.mathematics.bases import BASES, Basis
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import (
    BlockCurvature,
    Curvature,
    IdentityCurvature,
    kfac_eigenvalues,
)
from raycurv.mathematics.eigen import Eigenbasis
from raycurv.mathematics.factors import factors_of
from raycurv.mathematics.methods import Method, open_method
from raycurv.mathematics.rank.rank_curvature import RankCurvature

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class CurvatureFiles:
    """Where the curvature of a fit's blocks lies.

    Attributes:
        store: of the run.
        method, basis: of the fit.
        examples: of the fit, for K-FAC's rows an example.
    """

    store: Store
    method: Method
    basis: Basis
    examples: int

    @classmethod
    def of(cls, store: Store, fit: Manifest) -> CurvatureFiles:
        """Those of a finished fit."""
        said = fit.settings
        examples = int(fit.facts["examples"])
        return cls(store, open_method(said["method"]), BASES[said["basis"]], examples)

    def open(self, block: Block) -> Curvature:
        """A block's curvature, in the form that the method gives it.

        Raises:
            DamagedFile: a file is gone or truncated, or Λ was fitted in other bases than those that
                are there.
        """
        if self.method.ranked:
            return RankCurvature(block, open_rows(self.store, block).whole())
        return self.open_spectral(block, {})

    def eigenvalues(self, blocks: Sequence[Block]) -> Tensor:
        """The eigenvalues above zero (and others) of one block, or of the Fisher that a ranked
        method has of several, float64, without what they stand in.

        Raises:
            DamagedFile: as for :meth:`open`.
        """
        if self.method.ranked:
            opened = [open_rows(self.store, block) for block in blocks]
            gram = torch.stack([rows.gram() for rows in opened]).sum(dim=0)
            values: Tensor = torch.linalg.eigvalsh(gram / len(gram))
            return values.clamp_min(0.0)
        (block,) = blocks
        if not self.method.corrected:
            return self.open_spectral(block, {}).eigenvalues.double()
        with self._there(block):
            return read_lam(open_tensors(self.store, corrected_file(block.name)), block).double()

    def open_stage(
        self, blocks: Sequence[Block], device: torch.device
    ) -> dict[str, BlockCurvature]:
        """The curvature of a stage's blocks by name, bases on the device, each read once.

        Raises:
            DamagedFile: as for :meth:`open`.
        """
        bases: dict[str, Eigenbasis] = {}
        return {block.name: self.open_spectral(block, bases, device) for block in blocks}

    def open_spectral(
        self, block: Block, bases: dict[str, Eigenbasis], device: torch.device = _CPU
    ) -> BlockCurvature:
        """A block's curvature as eigenvalues in a basis: of every method that is not ranked.

        Args:
            block: which.
            bases: factor -> basis, of those that have been read; others are put there.
            device: of the bases; Λ stays on the CPU.

        Raises:
            DamagedFile: as for :meth:`open`.
        """
        assert not self.method.ranked
        if not self.method.curved:
            return IdentityCurvature(block)
        with self._there(block):
            return self._read(block, bases, device)

    @contextmanager
    def _there(self, block: Block) -> Iterator[None]:
        """DamagedFile for files of a block that are not there."""
        try:
            yield
        except FileNotFoundError as error:
            raise DamagedFile(
                f"{self.store.root}, block {block.name}", "eigenbases and eigenvalues", str(error),
                "Run the fit again: it makes what is missing.",
            ) from error  # fmt: skip

    def _read(
        self, block: Block, bases: dict[str, Eigenbasis], device: torch.device
    ) -> BlockCurvature:
        for name, factor in factors_of([block]).items():
            if name not in bases:
                bases[name] = Eigenbasis()
                if self.method.factors:
                    bases[name] = read_eigen(self.store, name, factor.width).to(device)
        right, left = bases[block.input_factor], bases[block.output_factor]
        if not self.method.corrected:
            rows = read_spectrum(self.store, block.input_factor, block.d_in).rows
            lam = kfac_eigenvalues(left, right, rows / max(self.examples, 1), self.basis)
            return BlockCurvature(block, right, left, lam)
        file = open_tensors(self.store, corrected_file(block.name))
        if self.method.factors and file.note("bases") != basis_mark(self.store, block):
            raise DamagedFile(
                self.store.path(corrected_file(block.name)),
                "corrected eigenvalues fitted in the run's bases",
                "ones of other bases",
                "Run the fit again: it refits what does not belong together.",
            )
        return BlockCurvature(block, right, left, read_lam(file, block))
