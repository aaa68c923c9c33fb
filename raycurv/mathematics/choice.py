"""Which weights of a model have curvature: all of a supported kind, or those that globs name.

A layer that its owner froze (``requires_grad`` False) has none unless a glob names it; where all of
a network is frozen that tells no layers apart, and it is taken as if nothing were.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block, role
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
    if kind_of(skeleton) is not None:
        raise UserError(
            "the model",
            "a network whose layers have names",
            f"a layer by itself ({type(skeleton).__name__})",
            "Return torch.nn.Sequential(layer) from the factory.",
        )
    globs = Globs.of(patterns)
    modules = {name: module for name, module in skeleton.named_modules() if name}
    described = {
        name: kind.describe(name, module)
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None
    }
    names = [block.name for blocks in described.values() for block in blocks]
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    globs.refuse_strangers(
        {*modules, *names, *parameters},
        "a glob that matches a dotted name",
        f"Names in this model: {', '.join(names[:5])}, …",
    )

    frozen = frozen_parameters(skeleton)

    def wanted(name: str, trained: bool = True) -> bool:
        inside = not default_scope or any(name.startswith(prefix) for prefix in default_scope)
        return globs.take(name, default=inside and trained)

    holders = _holders(modules)
    chosen: list[Block] = []
    obstacles: list[_Obstacle] = []
    for name, module in modules.items():
        for block in described.get(name, ()):
            if not wanted(block.name, not frozen or _is_trained(block, module)):
                continue
            if not globs.include:
                _refuse_computed_weight(block, module)
            obstacle = _no_numbers(block, module) or _shared_weight(
                block, module, holders, name == tied_head
            )
            if obstacle is None:
                chosen.append(block)
            else:
                obstacles.append(obstacle)
    for name, parameter in parameters.items():
        owner, _, key = name.rpartition(".")
        # Vectors (norms' scales, biases) have no Kronecker factors and no influence on those that
        # have; a matrix that is silently left out would change what the scores mean.
        if owner in described or not is_matrix(parameter) or not wanted(name):
            continue
        if globs.include or id(parameter) not in frozen:
            got = f"a trainable weight of shape {tuple(parameter.shape)} of another kind"
            label = type(skeleton.get_submodule(owner)).__name__
            obstacles.append(
                _Obstacle(owner or key, name, f"{name} ({label})", f"a {supported()}", got)
            )
    if obstacles:
        raise _refusal(obstacles, [block.name for block in chosen])
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


@dataclass(frozen=True)
class _Obstacle:
    """A weight that can have no block and has to be left out by name.

    Attributes:
        module: what to leave out, where no other block is in it.
        name: of the weight alone.
        where, expected, got: of the error.
    """

    module: str
    name: str
    where: str
    expected: str
    got: str


def leaving_out(names: Iterable[str], kept: Collection[str]) -> str:
    """The flags that leave out modules or blocks by their names, and with them those of the same
    role in other layers, unless one of these is kept."""
    globs = dict.fromkeys(name if _meets(role(name), kept) else role(name) for name in names)
    return " ".join(f"--blocks '!{glob}'" for glob in globs)


def _meets(glob: str, names: Iterable[str]) -> bool:
    return any(_matches(name, glob) for name in names)


def _refusal(obstacles: Sequence[_Obstacle], chosen: Sequence[str]) -> UserError:
    """All that has to be left out beside the chosen blocks, with the flags that do it."""
    first, more = obstacles[0], len(obstacles) - 1
    names = [o.name if _meets(o.module, chosen) else o.module for o in obstacles]
    flags = leaving_out(names, chosen)
    if not more:
        return UserError(first.where, first.expected, first.got, f"Leave it out: {flags}.")
    return UserError(
        f"{first.where} and {more} more", first.expected, first.got,
        f"Leave them out, all {more + 1}: {flags}.",
    )  # fmt: skip


def _no_numbers(block: Block, module: nn.Module) -> _Obstacle | None:
    """What stands in the way of a block on a weight without numbers, or of complex ones."""
    shape, dtype = [block.d_out, block.d_in - block.bias], getattr(module, block.parameter).dtype
    if all(shape) and not dtype.is_complex:
        return None
    got = f"{dtype}".removeprefix("torch.") if all(shape) else f"one of shape {shape}"
    wanted = "a weight of real numbers" if all(shape) else "a weight with numbers in it"
    return _Obstacle(block.name, block.name, f"block {block.name}", wanted, got)


def _shared_weight(
    block: Block, module: nn.Module, holders: dict[int, list[str]], tied: bool
) -> _Obstacle | None:
    """What stands in the way of a block on a weight that is another module's, too."""
    held_by = holders.get(id(getattr(module, block.parameter)), ())
    others = [f"one that it shares with {name}" for name in held_by if name != block.module]
    if tied:
        others = ["an output embedding that is tied to the input embedding"]
    if not others:
        return None
    return _Obstacle(
        block.name, block.name, f"block {block.name}", "a weight of its own", others[0]
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


def is_matrix(parameter: Tensor) -> bool:
    """Whether several axes of a parameter are longer than one."""
    return sum(n > 1 for n in parameter.shape) >= 2
