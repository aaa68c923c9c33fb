"""Losses and squared gradient norms of the examples, into ``tables/examples``."""

from __future__ import annotations

from collections.abc import Sequence

from raycurv.driver.corpus import part_file
from raycurv.driver.sinks import write_examples
from raycurv.files.tables import read_table, write_table
from raycurv.mathematics.gradients import SQUARED_NORM
from raycurv.mathematics.loss.differentiation import LOSS
from raycurv.planning.cost import PassCost
from raycurv.steps.step import EXAMPLES_TABLE, PassStep


class LossCost(PassCost):
    """A forward, where no other pass gives the losses."""

    phase = "losses"
    rides = True
    differentiates = False


class ExampleLosses(PassStep):
    """One row an example, from the rows of whichever pass has them, or from one of its own.

    Losses come from the model's last stage. Norms are added up over all stages, by the pass of a
    method that looks at every example's own gradient, and are complete with the first.
    """

    pass_name = "losses"
    cost = LossCost()

    def columns(self, group: int) -> frozenset[str]:
        per_example = self.fit.method.per_example
        if group != (0 if per_example else self.fit.last) or self.fit.examples_there():
            return frozenset()
        return frozenset({LOSS, SQUARED_NORM} if per_example else {LOSS})

    def keep(self, group: int, names: Sequence[str]) -> None:
        fit, before = self.fit, 0
        fit.store.delete_directory(EXAMPLES_TABLE)
        if fit.extends is not None:
            for name in fit.extends.names(EXAMPLES_TABLE, ".parquet"):
                table = read_table(fit.extends, name)
                write_table(fit.store, part_file(EXAMPLES_TABLE, before), table, fit.notes)
                before += 1
        write_examples(fit.store, names, fit.corpus, fit.double, fit.notes, before)
