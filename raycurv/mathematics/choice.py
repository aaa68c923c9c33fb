"""Which weights of a model have curvature: all of a supported kind, or those that globs name.

A layer that its owner froze (``requires_grad`` False) has none unless a glob names it, and a bias
that is frozen is no column of its layer's block; where all of a network is frozen that tells no
layers apart, and it is taken as if nothing were.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block, role
from raycurv.mathematics.kinds.catalogue import (
    FREE,
    HELD,
    describe,
    kind_of,
    kind_of_block,
    own_parameter,
    supported,
)
from raycurv.mathematics.kinds.kind import is_only_held


@dataclass(frozen=True)
class Globs:
    """Patterns on dotted names, as ``--blocks`` takes them.

    A pattern that names a container takes what is inside it, too. One of ``include`` must match
    (without any, all that is there by default is chosen), and none of ``exclude``.

    Attributes:
        by_default: whether what has a block by default is chosen: where nothing is included, or
            ``default`` is.
        all: whether everything is chosen: where ``all`` is included.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    by_default: bool
    all: bool

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Globs:
        """From patterns ``GLOB``, the words ``default`` and ``all``, and ``!GLOB`` for what is left
        out."""
        include = [p for p in patterns if not p.startswith("!")]
        exclude = tuple(p[1:] for p in patterns if p.startswith("!"))
        globs = tuple(p for p in include if p not in _WORDS)
        return cls(globs, exclude, not include or "default" in include, "all" in include)

    def refuse_strangers(self, names: Collection[str], expected: str, remedy: str) -> None:
        """Refuse patterns that match none of the ``names`` that may be meant, with a UserError of
        what was ``expected`` and the ``remedy``."""
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(name, pattern) for name in names):
                raise UserError(f"--blocks {pattern!r}", expected, "no match", remedy)

    def take(self, name: str, default: bool = True, every: bool = True) -> bool:
        """Whether a name is chosen; ``default`` says whether it is by default, ``every`` whether it
        is among all."""
        if self.leaves_out(name):
            return False
        if (self.by_default and default) or (self.all and every):
            return True
        return any(_matches(name, pattern) for pattern in self.include)

    def leaves_out(self, name: str) -> bool:
        """Whether a pattern excludes a name."""
        return any(_matches(name, pattern) for pattern in self.exclude)

    def calls(self, name: str) -> bool:
        """Whether an including pattern calls a name by its last part, and not only what it lies
        in, or anything there: ``*.norm`` and ``*.bias`` do, ``layers.0`` and ``layers.0.*`` not."""
        last = name.rpartition(".")[2]
        return any(
            fnmatch.fnmatchcase(name, pattern)
            and fnmatch.fnmatchcase(last, pattern.rpartition(".")[2])
            and pattern.rpartition(".")[2].strip("*?")
            for pattern in self.include
        )


_WORDS = ("default", "all")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def choose_blocks(
    skeleton: nn.Module,
    patterns: Sequence[str],
    default_scope: Sequence[str] = (),
    tied_head: str | None = None,
    idle: Collection[str] = (),
    held: Collection[str] = (),
    frozen_biases: bool = False,
) -> tuple[Block, ...]:
    """The blocks of a model, in the order of its modules.

    Args:
        skeleton: the whole model, possibly on the meta device.
        patterns: globs on dotted names of modules and blocks; ``!GLOB`` leaves out. With no
            including glob, and with the word ``default``, the layers in the default scope are
            chosen, without what is frozen; with the word ``all`` every trainable parameter.
        default_scope: prefixes of the names that have blocks by default; empty for the whole model.
        tied_head: name of an output embedding that shares the input embedding's weight.
        idle: names of modules that the forward does not run, which are not among all.
        held: names of modules that the forward does not call, while others use their weights.
        frozen_biases: whether a frozen bias is a column of its layer's block all the same.

    Raises:
        UserError: a pattern matches nothing, no block is left, a block sits on a tied head or, by
            default, on a weight that hooks compute from others, or in the default scope is a
            trainable matrix that has none by default.
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
    frozen = frozen_parameters(skeleton)
    described = [
        (module, block if frozen_biases else trained_part(block, module, frozen))
        for name, found in modules.items()
        for block in describe(name, found, held)
        for module in [modules[block.module]]
    ]
    names = [block.name for _, block in described if kind_of_block(block).by_default]
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    globs.refuse_strangers(
        {*modules, *(block.name for _, block in described), *parameters},
        "a glob that matches a dotted name",
        f"Names in this model: {', '.join(names[:5])}, …",
    )

    def inside(name: str) -> bool:
        return not default_scope or any(name.startswith(prefix) for prefix in default_scope)

    def wanted(block: Block, module: nn.Module) -> bool:
        trained = not frozen or _is_trained(block, module)
        default, every = inside(block.name) and trained, trained and block.module not in idle
        if kind_of_block(block).by_default:
            return globs.take(block.name, default, every)
        if globs.leaves_out(f"{block.module}.{block.parameter}"):
            return False
        # A vector's block is asked for by its own name: a glob on what it lies in takes, as ever,
        # the layers there.
        weight = attrgetter(block.parameter)(module)
        named = is_matrix(weight) or globs.calls(block.name) or block.name in globs.include
        return globs.take(block.name, False, every) and (named or (globs.all and every))

    taken = [(module, block) for module, block in described if wanted(block, module)]
    for module, block in () if globs.include or globs.all else taken:
        _refuse_computed_weight(block, module)
    chosen: list[Block] = []
    obstacles: list[_Obstacle] = []
    for found in _resolved(taken, _holders(modules), tied_head):
        (obstacles if isinstance(found, _Obstacle) else chosen).append(found)  # type: ignore[arg-type]
    met = {block.name for _, block in taken}
    named = {
        f"{block.module}.{name}"
        for module, block in described
        if kind_of_block(block).by_default
        for name in _names_of(block, module)
    }
    covered = {f"{b.module}.{name}" for module, b in taken for name in _names_of(b, module)}
    own = {f"{block.module}.{block.parameter}": block for _, block in described}
    for name, parameter in parameters.items():
        owner, _, key = name.rpartition(".")
        mine = own.get(name)
        trained = id(parameter) not in frozen
        # All is asked for, and a bias is trained whose layer's weight is not.
        alone = globs.all and trained and owner not in idle and name in named - covered
        if alone and not globs.leaves_out(name):
            got = "a trainable bias of a layer whose weight is frozen"
            obstacles.append(_Obstacle(owner, name, name, "a weight that has a block", got))
        if name in named or (mine is not None and mine.name in met):
            continue
        # Vectors (norms' scales, biases) have no Kronecker factors and no influence on those that
        # have; a matrix that is silently left out would change what the scores mean.
        default = inside(name) and trained and is_matrix(parameter)
        every = mine is None and trained and owner not in idle
        if globs.take(name, default, every) and (is_matrix(parameter) or every):
            got = f"a trainable weight of shape {tuple(parameter.shape)} of another kind"
            label = type(skeleton.get_submodule(owner)).__name__
            obstacles.append(
                _Obstacle(owner or key, name, f"{name} ({label})", f"a {supported()}", got)
            )
    if obstacles:
        raise _refusal(obstacles, [block.name for block in chosen])
    if not chosen:
        left = [n for n in names if not globs.leaves_out(n)]
        raise UserError(
            "--blocks",
            f"at least one {supported()}",
            "none that is not frozen (requires_grad False)" if frozen and left else "none",
            f"Name what is meant, such as --blocks {left[0]!r}." if frozen and left
            else "Widen the patterns.",
        )  # fmt: skip
    return tuple(chosen)


def _names_of(block: Block, module: nn.Module) -> Iterable[str]:
    """The parameters of a module that a block is, or is computed from."""
    if own_parameter(module, block.parameter) is None:
        return module._parameters
    return kind_of_block(block).parameters(block)


def frozen_parameters(skeleton: nn.Module) -> frozenset[int]:
    """Identities of the parameters that their owner does not train; none where that is all."""
    parameters = list(skeleton.parameters())
    frozen = frozenset(id(p) for p in parameters if not p.requires_grad)
    return frozen if len(frozen) < len(parameters) else frozenset()


def trained_part(block: Block, module: nn.Module, frozen: Collection[int]) -> Block:
    """A block without its bias, where that is frozen and the weight is not.

    Args:
        module: that holds it.
        frozen: identities of parameters.
    """
    if not (block.bias and frozen):
        return block
    weight, bias = (own_parameter(module, n) for n in kind_of_block(block).parameters(block))
    if id(bias) not in frozen or id(weight) in frozen:
        return block
    return replace(block, d_in=block.d_in - 1, bias=False)


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its identity."""
    # On the meta device, too, modules that share a weight hold one Parameter.
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        if is_only_held(module):
            name = name.rpartition(".")[0]
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
    shape, dtype = [block.d_out, block.d_in - block.bias], attrgetter(block.parameter)(module).dtype
    if all(shape) and not dtype.is_complex:
        return None
    got = f"{dtype}".removeprefix("torch.") if all(shape) else f"one of shape {shape}"
    wanted = "a weight of real numbers" if all(shape) else "a weight with numbers in it"
    return _Obstacle(block.name, block.name, f"block {block.name}", wanted, got)


def _resolved(
    taken: Sequence[tuple[nn.Module, Block]], holders: dict[int, list[str]], tied_head: str | None
) -> Iterator[Block | _Obstacle]:
    """The blocks, those of one weight as one, and what stands in the way of others."""
    groups: dict[object, list[tuple[nn.Module, Block]]] = {}
    covered: set[int] = set()
    for module, block in taken:
        weight = own_parameter(module, block.parameter)
        # What is computed is nobody else's, and its identity may be used again.
        key = block.name if weight is None else (id(weight), block.index, block.part)
        groups.setdefault(key, []).append((module, block))
        if kind_of_block(block) is not FREE:
            covered |= {id(p) for k in kind_of_block(block).parameters(block)
                        if (p := own_parameter(module, k)) is not None}  # fmt: skip
    for group in groups.values():
        module, block = group[0]
        weight = own_parameter(module, block.parameter)
        if kind_of_block(block) is FREE and id(weight) in covered:
            continue  # the bias of a layer that has a block
        held_by = [_holder(block)] if weight is None else holders[id(weight)]
        found = _no_numbers(block, module) or _one_block(group, held_by, tied_head)
        yield found
        if isinstance(found, Block) and found.shared:
            for owner, one in group:
                yield from (b for b in FREE.describe(one.module, owner)
                            if one.bias and b.parameter == "bias")  # fmt: skip


def _one_block(
    group: Sequence[tuple[nn.Module, Block]], held_by: Sequence[str], tied_head: str | None
) -> Block | _Obstacle:
    """The block of a weight, for whichever of the modules that hold it were chosen."""
    _, block = group[0]
    names = [_holder(one) for _, one in group]
    free = [one for _, one in group if kind_of_block(one) is FREE]
    if len(free) == len(group):
        # What holds the others is run again with all of them.
        block = min(free, key=lambda one: len(one.module))
        others = [name for name in held_by if not _within(name, block.module)]
        others = [name for name in others if not _within(block.module, name)]
    else:
        others = [name for name in held_by if name not in names or free]
        others = [name for name in others if name != names[0]]
        if len(group) > 1 and not others:
            d_in = block.d_in - block.bias
            return replace(block, d_in=d_in, bias=False, shared=tuple(names[1:]))
    got = f"one that it shares with {others[0]}" if others else ""
    if not free and block.module == tied_head and len(group) == 1:
        got = "an output embedding that is tied to the input embedding"
    if not got:
        return block
    wanted = "a weight of its own, or --blocks that take all modules that have it"
    return _Obstacle(block.name, block.name, f"block {block.name}", wanted, got)


def _holder(block: Block) -> str:
    """The module that has a block's weight."""
    return block.owner if kind_of_block(block) in HELD else block.module


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_trained(block: Block, module: nn.Module) -> bool:
    # A weight that is computed from others is trained if they are.
    with torch.enable_grad():
        return bool(attrgetter(block.parameter)(module).requires_grad)


# What computes a weight before each forward, and what puts the result in its place.
_COMPUTED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}


def _refuse_computed_weight(block: Block, module: nn.Module) -> None:
    if own_parameter(module, block.parameter) is not None or parametrize.is_parametrized(module):
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
