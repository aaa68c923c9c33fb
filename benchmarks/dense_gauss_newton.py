"""The Gauss-Newton matrix of a small network, dense, in float64: what refined IHVPs are held to.

    G = mean_n J_nᵀ R_n J_n,   R the Hessian of the loss in the outputs (identity; diag(p) − ppᵀ)

of the parameters θ [P] of some blocks one after another, each ``[O, I]`` in rows with its bias as
the last column. A language model's head is linear in the last hidden states h and has no block, so
there J is that of h and R becomes Wᵀ R W. Nothing here is shared with raycurv's own products.

Conjugate gradients are Hestenes & Stiefel's (1952), preconditioned, from zero.

Axis letters: P parameters, Q vectors, N examples, K steps.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tasks import Examples, Task
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import raycurv
from raycurv.mathematics.curvature import Damping

CHUNK = 32  # examples at once


class DenseGaussNewton:
    """A network as a function of the parameters of its blocks.

    Args:
        task: whose training examples G is of.
        network: trained; linear layers only have blocks.
        blocks: names of modules.
    """

    def __init__(self, task: Task, network: nn.Module, blocks: Sequence[str]) -> None:
        self.task, self.train = task, task.train.double()
        self._network = copy.deepcopy(network).double().eval()
        self._fixed = {name: p.detach() for name, p in self._network.named_parameters()}
        self._text = not self.train.inputs.is_floating_point()
        weights = {}
        for name in blocks:
            weight, bias = self._fixed[f"{name}.weight"], self._fixed.get(f"{name}.bias")
            weights[name] = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        ends = itertools.accumulate((w.numel() for w in weights.values()), initial=0)
        self.slices = {
            name: slice(*ends) for name, ends in zip(weights, itertools.pairwise(ends), strict=True)
        }
        self.theta_P = torch.cat([w.flatten() for w in weights.values()])

    def gradients(self, examples: Examples) -> Tensor:
        """Of each example's loss, ``[N, P]``."""
        examples = examples.double()

        def loss(theta_P: Tensor, x: Tensor, y: Tensor) -> Tensor:
            outputs = self._outputs(theta_P, x[None])
            return self.task.losses(outputs, y[None])[0]

        of_each = vmap(grad(loss), in_dims=(None, 0, 0))
        parts = zip(examples.inputs.split(CHUNK), examples.targets.split(CHUNK), strict=True)
        return torch.cat([of_each(self.theta_P, x, y) for x, y in parts])

    def products(self, v_QP: Tensor) -> Tensor:
        """``G v`` by forward and backward differentiation, ``[Q, P]``."""
        found_QP = torch.zeros_like(v_QP)
        for x in self.train.inputs.split(CHUNK):

            def outputs(theta_P: Tensor, x: Tensor = x) -> Tensor:
                return self._predicting(self._outputs(theta_P, x))

            z, pull = vjp(outputs, self.theta_P)

            def product(v_P: Tensor, z: Tensor = z, pull: Callable[[Tensor], tuple[Tensor]] = pull,
                        outputs: Callable[[Tensor], Tensor] = outputs) -> Tensor:  # fmt: skip
                _, u = jvp(outputs, (self.theta_P,), (v_P,))
                return pull(self._curved(z, u[..., None])[..., 0])[0]

            found_QP += vmap(product)(v_QP).detach()
        return found_QP / len(self.train)

    def matrix(self) -> Tensor:
        """``G [P, P]``."""
        summed_PP = torch.zeros(len(self.theta_P), len(self.theta_P), dtype=torch.float64)
        head_VD = self._fixed["lm_head.weight"] if self._text else None
        for x in self.train.inputs:
            if head_VD is None:
                z = self._outputs(self.theta_P, x[None])
                jacobian = jacrev(self._outputs)(self.theta_P, x[None])
                rows = self._curved(z, jacobian)
            else:
                z = self._hidden(self.theta_P, x)[:-1] @ head_VD.T
                jacobian = jacrev(self._hidden)(self.theta_P, x)[:-1]
                rows = head_VD.T @ self._curved(z, head_VD) @ jacobian
            summed_PP.addmm_(jacobian.flatten(0, 1).T, rows.flatten(0, 1))
        return ((summed_PP + summed_PP.T) / (2 * len(self.train))).detach()

    def _parameters(self, theta_P: Tensor) -> dict[str, Tensor]:
        """By name, those without a block as they were trained."""
        made = dict(self._fixed)
        for name, part in self.slices.items():
            block = theta_P[part].view(self.shapes[name])
            if f"{name}.bias" in made:
                block, made[f"{name}.bias"] = block[:, :-1], block[:, -1]
            made[f"{name}.weight"] = block
        return made

    def _outputs(self, theta_P: Tensor, x: Tensor) -> Tensor:
        made = functional_call(self._network, self._parameters(theta_P), (x,))
        outputs: Tensor = getattr(made, "logits", made)
        return outputs

    def _predicting(self, outputs: Tensor) -> Tensor:
        """Outputs that the loss is of: a language model's last token predicts nothing."""
        return outputs[..., :-1, :] if self._text else outputs

    def _hidden(self, theta_P: Tensor, x_T: Tensor) -> Tensor:
        """The states that enter the head, ``[T, D]``."""
        inside = {
            name.removeprefix("model."): p
            for name, p in self._parameters(theta_P).items()
            if name.startswith("model.")
        }
        states: Tensor = functional_call(
            self._network.get_submodule("model"), inside, (x_T[None],)
        ).last_hidden_state
        return states[0]

    def _curved(self, z: Tensor, u: Tensor) -> Tensor:
        """``R u``, ``[..., D, K]``, of outputs ``z [..., D]`` and ``u [..., D, K]``."""
        if self.task.objective == "regression":
            return u
        p = z.softmax(dim=-1)
        return p[..., None] * (u - p[..., None, :] @ u)


@dataclass(frozen=True)
class EkfacInverse:
    """``(F + λ)⁻¹`` of a fit, of each block ``Q_G ((Q_Gᵀ V Q_A) / (Λ + λ)) Q_Aᵀ``.

    Attributes:
        slices: of the blocks among the parameters.
        bases: of each block ``Q_G``, Λ, ``Q_A``, float64.
    """

    slices: Mapping[str, slice]
    bases: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, run: raycurv.Run, dense: DenseGaussNewton) -> EkfacInverse:
        """What a fit of the same network left."""
        bases = {}
        for name in dense.slices:
            found = run.curvature(name)
            left, right = found.output_basis.dense(), found.input_basis.dense()
            bases[name] = (left.double(), found.eigenvalues.double(), right.double())
        return cls(dense.slices, bases)

    def damping(self, setting: str) -> dict[str, float]:
        """λ of each block."""
        chosen = Damping.parse(setting)
        return {name: chosen.of(float(lam.mean())) for name, (_, lam, _) in self.bases.items()}

    def apply(self, v_QP: Tensor, damping: Mapping[str, float]) -> Tensor:
        """``[Q, P]``, or ``[Q, its parameters]`` of the one block that ``damping`` names."""
        parts = []
        for name, part in zip(damping, self._split(v_QP, damping), strict=True):
            left, lam_OI, right = self.bases[name]
            turned = left.T @ part.view(-1, *lam_OI.shape) @ right
            parts.append((left @ (turned / (lam_OI + damping[name])) @ right.T).flatten(1))
        return torch.cat(parts, dim=1)

    def _split(self, v_QP: Tensor, blocks: Mapping[str, float]) -> tuple[Tensor, ...]:
        return v_QP.split([self.bases[name][1].numel() for name in blocks], dim=1)


def damped(matrix_PP: Tensor, inverse: EkfacInverse, damping: Mapping[str, float]) -> Tensor:
    """``G + λ``, each block's own λ on its part of the diagonal; of the blocks of ``damping``."""
    added = [
        torch.full_like(inverse.bases[name][1].flatten(), lam) for name, lam in damping.items()
    ]
    return matrix_PP + torch.diag(torch.cat(added))


def conjugate_gradients(
    matrix_PP: Tensor, v_QP: Tensor, precondition: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Iterates 1 to ``steps`` of ``matrix x = v``, ``[K, Q, P]``, begun at zero."""
    x_QP, r_QP = torch.zeros_like(v_QP), v_QP.clone()
    z_QP = precondition(r_QP)
    p_QP, rz_Q1 = z_QP.clone(), (r_QP * z_QP).sum(dim=1, keepdim=True)
    made = []
    for _ in range(steps):
        q_QP = p_QP @ matrix_PP
        # A system that is solved has nothing left to divide.
        a_Q1 = torch.nan_to_num(rz_Q1 / (p_QP * q_QP).sum(dim=1, keepdim=True), 0.0, 0.0, 0.0)
        x_QP, r_QP = x_QP + a_Q1 * p_QP, r_QP - a_Q1 * q_QP
        z_QP = precondition(r_QP)
        before_Q1, rz_Q1 = rz_Q1, (r_QP * z_QP).sum(dim=1, keepdim=True)
        p_QP = z_QP + torch.nan_to_num(rz_Q1 / before_Q1, 0.0, 0.0, 0.0) * p_QP
        made.append(x_QP)
    return torch.stack(made)
