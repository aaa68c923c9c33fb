"""The dense truth: every quantity from its definition, one example at a time, with plain autograd.

Nothing of raycurv's own code is used: rows come from each layer's call on one unpadded example,
gradients from autograd with respect to the weights, labels from the counter in Python's integers,
factors and corrected eigenvalues from loops over rows and examples, curvature as whole matrices.

Axis letters: T rows, S groups, I inputs (with the bias column), O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import torch
from networks import Case
from torch import Tensor, nn

MASK = 2**64 - 1


def mix(state: int, field: int) -> int:
    """One splitmix64 step in unbounded integers."""
    x = (state + (field + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def bits(seed: int, name: str, position: int, draw: int, component: int) -> int:
    """The counter's 64 bits."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    h = mix(mix(0, seed), int.from_bytes(digest, "little"))
    for field in (position, draw, component):
        h = mix(h, field)
    return h


def uniform(seed: int, name: str, position: int, draw: int, component: int) -> float:
    """The counter's number in (0, 1)."""
    return ((bits(seed, name, position, draw, component) >> 12) + 0.5) / 2**52


def sign(seed: int, name: str, position: int, draw: int, number: int) -> float:
    """The counter's sign, 1 or -1."""
    return 2.0 * (bits(seed, name, position, draw, number // 64) >> number % 64 & 1) - 1.0


class Cotangents(list[Tensor]):
    """In place of labels: of each target a gradient with respect to its outputs."""


def inverse_cdf(logits: Tensor, u: float) -> int:
    """The first class at which the running sum of the softmax reaches u."""
    total = 0.0
    probabilities = logits.double().softmax(dim=0).tolist()
    for index, p in enumerate(probabilities):
        total += p
        if total >= u:
            return index
    return len(probabilities) - 1


def worst(got: Tensor, want: Tensor) -> float:
    """max |difference| over max |reference|; the difference alone where the reference is zero."""
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = float(want.abs().max()) if want.numel() else 0.0
    return float((got.double() - want.double()).abs().max()) / (scale or 1.0)


@dataclass(frozen=True)
class Rows:
    """What one example leaves at one layer.

    Attributes:
        a: input rows ``[T S, I]``.
        g: output gradients ``[T, O]``.
        gradient: of the example's loss with respect to the weight, ``[O, I]``.
    """

    a: Tensor
    g: Tensor
    gradient: Tensor


def matrix_of(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weight's gradient as the matrix ``[O, I]``, the bias' its last column."""
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    whole = weight.flatten(1)
    return whole if bias is None else torch.cat([whole, bias[:, None]], dim=1)


def set_weight(module: Any, matrix: Tensor) -> None:
    """Give a layer the weight that :func:`matrix_of` would show."""
    with torch.no_grad():
        if module.bias is not None:
            module.bias.copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        if type(module).__name__ == "Conv1D":
            matrix = matrix.T
        module.weight.copy_(matrix.reshape(module.weight.shape))


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows that a layer multiplies by its weight, for the input of one example."""
    if not isinstance(module, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
    else:
        # A row is what one output number's derivative with respect to the weight holds.
        weight = module.weight.detach().clone().requires_grad_()
        out = torch.func.functional_call(module, {"weight": weight}, (x,))[0].flatten(1)
        per_group = len(out) // module.groups
        found = []
        for p in range(out.shape[1]):
            for group in range(module.groups):
                o = group * per_group
                (d,) = torch.autograd.grad(out[o, p], weight, retain_graph=True)
                found.append(d[o].flatten())
        rows = torch.stack(found)
    if module.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    return rows.detach()


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """Output gradients of one example as rows."""
    if isinstance(module, nn.Conv2d):
        return g[0].flatten(1).T
    return g.reshape(-1, g.shape[-1])


class Truth:
    """All of a case, densely.

    Attributes:
        names: of the blocks.
        labels: ``[draw][example]``: what each draw of the fit differentiates.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self.seed = case, seed
        self.network: Any = (case.dense or case.network)().double().eval()
        self.network.requires_grad_(True)

    def blocks(self, names: Sequence[str]) -> dict[str, nn.Module]:
        return {name: self.network.get_submodule(name) for name in names}

    def inputs(self, row: dict[str, Any]) -> Tensor:
        """A batch of one example, without padding."""
        if "input_ids" in row:
            return torch.tensor([row["input_ids"]])
        return torch.tensor([row["inputs"]], dtype=torch.float64)

    def outputs(self, row: dict[str, Any]) -> Tensor:
        """Logits ``[T, V]`` of a sentence, ``[V]`` of a text or of numbers, ``[D]`` of numbers;
        of two texts the number of each."""
        if "chosen" in row:
            each = [self.network(torch.tensor([row[name]])) for name in ("chosen", "rejected")]
            return torch.cat([one.logits[0] for one in each])
        found = self.network(self.inputs(row))
        return getattr(found, "logits", found)[0]

    def targets(self, row: dict[str, Any]) -> list[bool]:
        """Which tokens are targets: not the first where the one before it predicts it, not those
        that a mask or -100 leaves out."""
        count = len(row["input_ids"])
        mask, own = row.get("loss_mask", [True] * count), self.own(row)
        first = self.shift
        return [t >= first and bool(mask[t]) and own[t] != -100 for t in range(count)]

    @property
    def shift(self) -> int:
        """How far a token that is a target stands behind what predicts it."""
        return int(self.case.objective == "causal-lm")

    @property
    def of_texts(self) -> bool:
        """Whether an example has one label, a class."""
        return self.case.objective in ("classification", "preference")

    def own(self, row: dict[str, Any]) -> Any:
        """The data's own labels."""
        if "chosen" in row:
            return 0
        return row.get("labels", row.get("input_ids"))

    def loss(self, row: dict[str, Any], outputs: Tensor, labels: Any) -> Tensor:
        """Summed over the example's targets; a product where its gradient is given."""
        if isinstance(labels, Cotangents):
            return sum((c @ f for c, f in zip(labels, outputs.view(len(labels), -1), strict=True)))
        if self.case.objective == "regression":
            y = torch.as_tensor(labels, dtype=torch.float64)
            return sum((((f - t) ** 2) / 2 for f, t in zip(outputs, y, strict=True)))
        if self.of_texts:
            return -outputs.log_softmax(dim=0)[int(labels)]
        log_p = outputs.log_softmax(dim=1)
        s = self.shift
        terms = [-log_p[t - s, int(labels[t])] for t, yes in enumerate(self.targets(row)) if yes]
        return sum(terms, 0.0 * outputs.sum())

    def signed(self, row: dict[str, Any], draw: int) -> Cotangents:
        """Gradients of random signs: of a softmax ``diag(√p) H ε`` with the reflection H that takes
        the first axis to ``-√p``, and no sign for that; of numbers the signs themselves."""
        outputs, name = self.outputs(row).detach(), row["id"]
        tokens = outputs.ndim == 2
        found = Cotangents()
        for t, f in enumerate(outputs if tokens else [outputs]):
            target = t + self.shift if tokens else 0
            e = [sign(self.seed, name, target, draw, k) for k in range(len(f))]
            epsilon, p = torch.tensor(e, dtype=torch.float64), f.softmax(dim=0)
            if self.case.objective == "regression":
                c = epsilon
            else:
                u = p.sqrt() + torch.eye(len(f))[0]
                h = torch.eye(len(f)) - 2 * torch.outer(u, u) / (u @ u)
                c = p.sqrt() * (h[:, 1:] @ epsilon[1:])
            counts = not tokens or (target < len(outputs) and self.targets(row)[target])
            found.append(c if counts else 0.0 * c)
        return found

    def drawn(self, row: dict[str, Any], draw: int) -> Any:
        """Labels from the model's own distribution, by the counter."""
        outputs, name = self.outputs(row).detach(), row["id"]
        if self.case.objective == "regression":
            return [
                float(f) + NormalDist().inv_cdf(uniform(self.seed, name, 0, draw, k))
                for k, f in enumerate(outputs)
            ]
        if self.of_texts:
            return inverse_cdf(outputs, uniform(self.seed, name, 0, draw, 0))
        s = self.shift
        return [0] * s + [
            inverse_cdf(outputs[t - s], uniform(self.seed, name, t, draw, 0))
            for t in range(s, len(outputs))
        ]

    def examine(self, row: dict[str, Any], labels: Any, names: Sequence[str]) -> dict[str, Rows]:
        """Rows and gradients of one example at every block."""
        modules = self.blocks(names)
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                calls[name].append((args[0].detach().clone(), out))
                return out.clone()  # what comes after may change it in place

            return hook

        handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
        loss = self.loss(row, self.outputs(row), labels)
        for handle in handles:
            handle.remove()
        found = {}
        for name, module in modules.items():
            outs = [out for _, out in calls[name]]
            weights = [module.weight] + ([] if module.bias is None else [module.bias])
            grads = torch.autograd.grad(
                loss, [*outs, *weights], retain_graph=True, materialize_grads=True
            )
            gs, (weight, *bias) = grads[: len(outs)], grads[len(outs) :]
            matrix = matrix_of(module, weight, bias[0] if bias else None)
            # Of an expert that no token met there is none.
            found[name] = Rows(
                torch.cat([matrix[:0], *(input_rows(module, x) for x, _ in calls[name])]),
                torch.cat([matrix.T[:0], *(output_rows(module, g) for g in gs)]),
                matrix,
            )
        return found

    @cached_property
    def labels(self) -> list[list[Any]]:
        if self.case.empirical:
            return [[self.own(row) for row in self.case.data]]
        of = self.signed if self.case.settings.get("fisher") == "signs" else self.drawn
        return [[of(row, d) for row in self.case.data] for d in range(self.case.draws)]

    @cached_property
    def names(self) -> list[str]:
        kinds = (nn.Linear, nn.Conv2d)
        return [
            name
            for name, m in self.network.named_modules()
            if isinstance(m, kinds) or type(m).__name__ == "Conv1D"
        ]

    @cached_property
    def examined(self) -> list[list[dict[str, Rows]]]:
        """``[draw][example]``, with the fit's labels."""
        return [
            [
                self.examine(row, y, self.names)
                for row, y in zip(self.case.data, labels, strict=True)
            ]
            for labels in self.labels
        ]

    @cached_property
    def own_gradients(self) -> list[dict[str, Tensor]]:
        """Every example's gradients with the data's own labels, by block."""
        found = []
        for row in self.case.data:
            rows = self.examine(row, self.own(row), self.names)
            found.append({name: r.gradient for name, r in rows.items()})
        return found

    def losses(self) -> Tensor:
        """Of the data's own labels."""
        found = [self.loss(r, self.outputs(r), self.own(r)).detach() for r in self.case.data]
        return torch.stack(found)

    def input_factor(self, name: str) -> Tensor:
        """``A``: mean of ``a aᵀ`` over rows (and groups)."""
        return _mean_outer([example[name].a for example in self.examined[0]])

    def output_factor(self, name: str) -> Tensor:
        """``G``: mean of ``g gᵀ`` over rows and draws."""
        return _mean_outer([e[name].g for draw in self.examined for e in draw])

    def rows(self, name: str) -> int:
        """Rows of one draw."""
        return sum(len(example[name].g) for example in self.examined[0])

    def gradients(self, name: str) -> list[Tensor]:
        """``[O, I]`` of every draw and example, with the fit's labels."""
        return [example[name].gradient for draw in self.examined for example in draw]

    def corrected(self, name: str, q_a: Tensor, q_g: Tensor) -> Tensor:
        """``Λ`` in a given basis."""
        gradients = self.gradients(name)
        total = torch.zeros_like(gradients[0])
        for gradient in gradients:
            total += (q_g.T @ gradient @ q_a) ** 2
        return total / len(gradients)

    def fisher(self, name: str) -> Tensor:
        """The block's whole Fisher ``[O I, O I]``: mean of vec(∇W) vec(∇W)ᵀ."""
        rows = torch.stack([gradient.flatten() for gradient in self.gradients(name)])
        return rows.T @ rows / len(rows)


def ekfac_matrix(q_a: Tensor, q_g: Tensor, lam: Tensor) -> Tensor:
    """``(Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ``, on row-major vec."""
    q = torch.kron(q_g, q_a)
    return q @ torch.diag(lam.flatten()) @ q.T


def solve(curvature: Tensor, damping: float, vector: Tensor) -> Tensor:
    """``(F + λI)⁻¹ v`` for a matrix v ``[O, I]``; zero where both F and λ are."""
    if damping == 0 and not curvature.any():
        return torch.zeros_like(vector)
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return torch.linalg.solve(damped, vector.flatten()).view_as(vector)


def _mean_outer(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(parts[0].shape[1], parts[0].shape[1], dtype=parts[0].dtype)
    count = 0
    for part in parts:
        for row in part:
            total += torch.outer(row, row)
            count += 1
    return total / max(count, 1)
