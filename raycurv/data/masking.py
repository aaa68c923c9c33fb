"""Which tokens are hidden from a masked language model, where the data does not say.

    u = uniforms(seed, id, position)        three numbers a token, of a counter
    u_1 < 15 %        the token is a target; hidden behind the mask where u_2 < 80 %, a random word
                      where u_2 < 90 % (the one of u_3), else left as it is

So an example has the same mask in every run, pass and microbatch. Special tokens are no targets.
Of a text so short that none is drawn the token of the least u_1 is one, or it would say nothing.
Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers (2019), section 3.1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from raycurv.batch import NOT_A_TARGET
from raycurv.mathematics.loss.draws import id_keys, uniforms

TARGETS, HIDDEN, RANDOM = 0.15, 0.8, 0.1
# Beside the draws of labels, which count from 0.
_STREAM = 2**40


@dataclass(frozen=True)
class Masking:
    """What hides tokens.

    Args:
        mask: the token that stands for a hidden one.
        special: tokens that are no targets.
        words: number of words, of which a random one is taken.
        seed: of the counter.
    """

    mask: int
    special: frozenset[int]
    words: int
    seed: int

    def hide(self, name: str, ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An example's tokens with some hidden, and its labels: -100 for all others."""
        positions = torch.arange(len(ids_T))
        u_T3 = uniforms(self.seed, id_keys([name]), positions, _STREAM, 3)[0].numpy()
        usual_T = ~np.isin(ids_T, list(self.special))
        targets_T = (u_T3[:, 0] < TARGETS) & usual_T
        if usual_T.any() and not targets_T.any():
            targets_T[np.where(usual_T, u_T3[:, 0], 1.0).argmin()] = True
        labels_T = np.where(targets_T, ids_T, NOT_A_TARGET).astype(np.int64)
        hidden_T = targets_T & (u_T3[:, 1] < HIDDEN)
        random_T = targets_T & ~hidden_T & (u_T3[:, 1] < HIDDEN + RANDOM)
        words_T = (u_T3[:, 2] * self.words).astype(ids_T.dtype)
        shown_T = np.where(random_T, words_T, np.where(hidden_T, self.mask, ids_T))
        return shown_T.astype(ids_T.dtype), labels_T

    def recorded(self) -> dict[str, Any]:
        """How tokens are hidden, ready for JSON, as `facts.reading` of a run records it."""
        said = asdict(self) | {"special": sorted(self.special)}
        return said | {"targets": TARGETS, "hidden": HIDDEN, "random": RANDOM}
