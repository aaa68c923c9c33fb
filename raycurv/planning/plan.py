"""A plan: what each phase of a job takes, and the most of it all."""

from __future__ import annotations

from dataclasses import dataclass

from raycurv.planning.arrangement import Peak


@dataclass(frozen=True)
class Phase:
    """What one phase takes; in a sweep, the group of stages that takes most.

    Attributes:
        name: as the job's progress shows it.
        peak: memory of the largest process (on GPUs: of its stage on the GPU).
        node: bytes of memory on the fullest node, all its processes.
        gpu: bytes on the fullest GPU; 0 without.
        disk: bytes of the job's files at most.
        moved: bytes between processes.
        stored: bytes written to disk and read from it.
        flops: of products.
        eigh_flops: of eigendecompositions, 9 d³ each.
        seconds: at the plan's rates; ``None`` without.
    """

    name: str
    peak: Peak
    node: int
    gpu: int
    disk: int
    moved: int = 0
    stored: int = 0
    flops: float = 0.0
    eigh_flops: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a job takes.

    Attributes:
        job: ``fit`` or ``influence``.
        phases: in their order.
        kept: bytes of the job's files at its end.
        spool: bytes of its spool at most, where that has a disk of its own.
    """

    job: str
    phases: tuple[Phase, ...]
    kept: int
    spool: int = 0

    @property
    def memory(self) -> Phase:
        """The phase in which the fullest node holds most."""
        return max(self.phases, key=lambda phase: phase.node)

    @property
    def process(self) -> Phase:
        """The phase with the largest process."""
        return max(self.phases, key=lambda phase: phase.peak.bytes)

    @property
    def gpu(self) -> Phase:
        """The phase in which the fullest GPU holds most."""
        return max(self.phases, key=lambda phase: phase.gpu)

    @property
    def disk(self) -> Phase:
        """The phase in which the job's files take most."""
        return max(self.phases, key=lambda phase: phase.disk)

    @property
    def seconds(self) -> float | None:
        """Of all phases; ``None`` without rates."""
        known = [phase.seconds for phase in self.phases if phase.seconds is not None]
        return sum(known) if len(known) == len(self.phases) else None
