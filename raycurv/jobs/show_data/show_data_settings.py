"""Settings of showing data."""

from __future__ import annotations

from dataclasses import dataclass

from raycurv.driver.settings import (
    Adapting,
    Count,
    DataPath,
    ModelPath,
    Reading,
    Required,
    Seed,
    check_fields,
)


@dataclass(frozen=True)
class ShowDataSettings(Reading, Adapting):
    """What the first examples of data become: their text, which tokens carry the loss, how many."""

    model: Required[ModelPath] = ""
    """Directory with an HF config.json (no weights are read), its name on the hub, or
    `package.module:factory`."""
    data: Required[DataPath] = ""
    """Examples, as a fit takes them."""
    rows: Count = 3
    """How many examples are shown."""
    characters: Count = 1000
    """Characters shown at either end of a longer text that carries the loss, or does not."""
    objective: str | None = None
    """As that of fit. Default: what the model directory says that it was trained for."""
    max_examples: Count | None = None
    """Show those of the seeded sample that fit would take of so many examples."""
    seed: Seed = 0
    """Seed of the sample, and of hidden tokens."""
    trust_remote_code: bool = False
    """Run the Python code that a model directory brings along, with all that you may do."""

    def check(self) -> None:
        """Refuse what cannot work, with a UserError that names the flag."""
        check_fields(self)
