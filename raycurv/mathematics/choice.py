"""Which weights of a model have curvature: all of a supported kind, or those that globs name.

A layer that its owner froze (``requires_grad`` False) has none unless a glob names it; where all of
a network is frozen that tells no layers apart, and it is taken as if nothing were.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.kinds.catalogue import kind_of, supported


@dataclass(frozen=True)
class Globs:
    """Patterns on dotted names, as ``--blocks`` takes them.

    A pattern that names a container takes what is inside it, too. One of ``include`` must match
    (without any, all that is there by default is chosen), and none of ``exclude``.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Globs:
        """From patterns ``GLOB``, and ``!GLOB`` for what is left out."""
        return cls(
            tuple(p for p in patterns if not p.startswith("!")),
            tuple(p[1:] for p in patterns if p.startswith("!")),
        )

    def refuse_strangers(self, names: Collection[str], expected: str, remedy: str) -> None:
        """Refuse patterns that match none of the ``names`` that may be meant, with a UserError of
        what was ``expected`` and the ``remedy``."""
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(name, pattern) for name in names):
                raise UserError(f"--blocks {pattern!r}", expected, "no match", remedy)

    def take(self, name: str, default: bool = True) -> bool:
        """Whether a name is chosen; when no pattern includes anything, ``default`` says so."""
        if any(_matches(name, pattern) for pattern in self.exclude):
            return False
        if not self.include:
            return default
        return any(_matches(name, pattern) for pattern in self.include)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def choose_blocks(
    skeleton: nn.Module,
    patterns: Sequence[str],
    default_scope: Sequence[str] = (),
    tied_head: str | None = None,
) -> tuple[Block, ...]:
    """The blocks of a model, in the order of its modules.

    Args:
        skeleton: the whole model, possibly on the meta device.
        patterns: globs on dotted names of modules and blocks; ``!GLOB`` leaves out. With no
            including glob the default scope holds, without what is frozen.
        default_scope: prefixes of the names that have blocks by default; empty for the whole model.
        tied_head: name of an output embedding that shares the input embedding's weight.

    Raises:
        UserError: a pattern matches nothing, no block is left, a block sits on a tied head or, by
            default, on a weight that hooks compute from others, or an explicitly chosen module (a
            default one in a model of no scope, too) holds a trainable weight of another kind.
    """
    globs = Globs.of(patterns)
    modules = {name: module for name, module in skeleton.named_modules() if name}
    described = {
        name: kind.describe(name, module)
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None
    }
    names = [block.name for blocks in described.values() for block in blocks]
    globs.refuse_strangers(
        {*modules, *names},
        "a glob that matches a module's dotted name",
        f"Names in this model: {', '.join(names[:5])}, …",
    )

    frozen = frozen_parameters(skeleton)

    def wanted(name: str, trained: bool = True) -> bool:
        inside = not default_scope or any(name.startswith(prefix) for prefix in default_scope)
        return globs.take(name, default=inside and trained)

    holders = _holders(modules)
    chosen: list[Block] = []
    for name, module in modules.items():
        if name in described:
            mine = [
                block
                for block in described[name]
                if wanted(block.name, not frozen or _is_trained(block, module))
            ]
            for block in mine:
                _refuse_empty(block)
                if not globs.include:
                    _refuse_computed_weight(block, module)
                _refuse_shared_weight(block, module, holders, name == tied_head)
            chosen += mine
        elif wanted(name) and (globs.include or not default_scope):
            _refuse_other_weights(name, module, () if globs.include else frozen)
    if not chosen:
        left = [n for n in names if not any(_matches(n, pattern) for pattern in globs.exclude)]
        raise UserError(
            "--blocks",
            f"at least one {supported()}",
            "none that is not frozen (requires_grad False)" if frozen and left else "none",
            f"Name what is meant, such as --blocks {left[0]!r}." if frozen and left
            else "Widen the patterns.",
        )  # fmt: skip
    return tuple(chosen)


def _refuse_empty(block: Block) -> None:
    if not (block.d_out and block.d_in - block.bias):
        raise UserError(
            f"block {block.name}",
            "a weight with numbers in it",
            f"one of shape [{block.d_out}, {block.d_in - block.bias}]",
            f"Leave it out: --blocks '!{block.name}'.",
        )


def frozen_parameters(skeleton: nn.Module) -> frozenset[int]:
    """Identities of the parameters that their owner does not train; none where that is all."""
    parameters = list(skeleton.parameters())
    frozen = frozenset(id(p) for p in parameters if not p.requires_grad)
    return frozen if len(frozen) < len(parameters) else frozenset()


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its identity."""
    # On the meta device, too, modules that share a weight hold one Parameter.
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key in {id(parameter) for parameter in module.parameters(recurse=False)}:
            holders.setdefault(key, []).append(name)
    return holders


def _refuse_shared_weight(
    block: Block, module: nn.Module, holders: dict[int, list[str]], tied: bool
) -> None:
    held_by = holders.get(id(getattr(module, block.parameter)), ())
    others = [f"one that it shares with {name}" for name in held_by if name != block.module]
    if tied:
        others = ["an output embedding that is tied to the input embedding"]
    if others:
        raise UserError(
            f"block {block.name}",
            "a weight of its own",
            others[0],
            f"Leave it out: --blocks '!{block.name}'.",
        )


def _is_trained(block: Block, module: nn.Module) -> bool:
    # A weight that is computed from others is trained if they are.
    with torch.enable_grad():
        return bool(getattr(module, block.parameter).requires_grad)


# What computes a weight before each forward, and what puts the result in its place.
_COMPUTED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}


def _refuse_computed_weight(block: Block, module: nn.Module) -> None:
    if block.parameter in module._parameters or parametrize.is_parametrized(module):
        return
    ask = f"ask for the curvature of what is computed: --blocks {block.name}."
    makers = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    calls = [f"{_COMPUTED_BY[m]}(module)" for m in makers if m in _COMPUTED_BY]
    if f"{block.parameter}_mask" in module._buffers:
        calls.append(f"prune.remove(module, {block.parameter!r})")
    own = ", ".join(n for n in (*module._parameters, *module._buffers) if n != "bias")
    raise UserError(
        f"block {block.name}",
        "a weight that is a parameter",
        f"one that is computed from others ({own})",
        f"Call torch.nn.utils.{calls[0]} in the factory, which makes it one; or {ask}"
        if calls else f"Make it a parameter in the factory; or {ask}",
    )  # fmt: skip


def _refuse_other_weights(name: str, module: nn.Module, frozen: Collection[int]) -> None:
    # Vectors (norms' scales, biases) have no Kronecker factors and no influence on those that have;
    # a matrix that is silently left out would change what the scores mean.
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2 and id(parameter) not in frozen:
            raise UserError(
                f"{name}.{key} ({type(module).__name__})",
                f"a {supported()}",
                f"a trainable weight of shape {tuple(parameter.shape)} of another kind",
                f"Leave it out: --blocks '!{name}'.",
            )
