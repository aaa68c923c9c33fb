"""Which of several texts is better, by a number that the model gives each of them."""

from __future__ import annotations

from torch import Tensor

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.loss.objective import Classification, check_numbers


class Preference(Classification):
    """``-log σ(r_chosen - r_rejected)`` in nats, of the model's number ``r`` for each text.

    Bradley & Terry, Rank Analysis of Incomplete Block Designs (1952). It is the cross-entropy of
    the better text, 0, under a softmax over the numbers of an example's texts: labels are drawn
    from that.
    """

    reads = "pairs"

    def _logits(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The numbers of each example's texts, ``[N, S]``."""
        check_numbers("preference", outputs)
        rows = batch.rows
        if batch.sequences < 2 or outputs.shape not in ((rows,), (rows, 1)):
            raise UserError(
                "preference",
                f"outputs of shape [{rows}, 1], a number for each of two texts of an example",
                f"{list(outputs.shape)} for {batch.sequences} of each",
                "Give a model of one output (num_labels 1 in config.json) and data with `chosen` "
                "and `rejected`, or choose another --objective.",
            )
        return outputs.reshape(batch.size, batch.sequences)
