"""Which weights have curvature, and which of them share an input factor.

A block is one weight matrix ``[O, I]`` (``I`` one column wider when there is a bias). Its rows of
inputs and of output gradients come from the module that holds it: a token of a linear layer, an
output position of a convolution.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from raycurv.errors import UserError

LINEAR, CONV1D, CONV2D = "linear", "conv1d", "conv2d"


@dataclass(frozen=True)
class Block:
    """One Kronecker-factored weight.

    Attributes:
        name: dotted name of the module that holds the weight.
        kind: ``linear``, ``conv1d`` (HF's transposed linear layer) or ``conv2d``.
        d_in: width of the input factor, bias column included.
        d_out: width of the output factor.
        bias: whether the last input column is the bias.
        groups: of a grouped convolution; ``d_in`` is one group's width.
        input_factor: name of the input factor; blocks that read the same tensor share it. Empty
            until the first microbatch has shown which do.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    bias: bool
    groups: int = 1
    input_factor: str = ""

    @property
    def output_factor(self) -> str:
        """Name of the output factor, which no other block shares."""
        return f"{self.name}.output"


def kind_of(module: nn.Module) -> str | None:
    """The kind of block that a module holds, or ``None`` when it is of no supported kind."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Conv2d):
        return CONV2D
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    return None


def describe_block(name: str, module: nn.Module) -> Block:
    """The block of a module of a supported kind (weights may be on the meta device)."""
    kind = kind_of(module)
    weight = module.weight
    assert kind is not None and isinstance(weight, Tensor)
    bias = getattr(module, "bias", None) is not None
    if kind == CONV1D:
        d_in, d_out, groups = weight.shape[0], weight.shape[1], 1
    else:
        d_out, d_in = weight.shape[0], weight[0].numel()
        groups = int(module.groups) if isinstance(module, nn.Conv2d) else 1
    return Block(name, kind, d_in + bias, d_out, bias, groups)


def choose_blocks(
    skeleton: nn.Module,
    patterns: Sequence[str],
    default_scope: Sequence[str] = (),
    tied_head: str | None = None,
) -> tuple[Block, ...]:
    """The blocks of a model, in the order of its modules.

    Args:
        skeleton: the whole model, possibly on the meta device.
        patterns: globs on dotted module names; ``!GLOB`` leaves out. With no including glob the
            default scope holds.
        default_scope: prefixes of the names that have blocks by default; empty for the whole model.
        tied_head: name of an output embedding that shares the input embedding's weight.

    Raises:
        UserError: a pattern matches nothing, no block is left, a block sits on a tied head, or an
            explicitly chosen module (a default one in a model of no scope, too) holds a trainable
            weight of another kind.
    """
    modules = {name: module for name, module in skeleton.named_modules() if name}
    include = [p for p in patterns if not p.startswith("!")]
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            close = ", ".join(list(n for n, m in modules.items() if kind_of(m))[:5])
            raise UserError(
                f"--blocks {pattern!r}",
                "a glob that matches a module's dotted name",
                "no match",
                f"Names in this model: {close}, …",
            )

    def left_out(name: str) -> bool:
        # A pattern that names a container takes what is inside it, too.
        return any(
            fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, p + ".*") for p in exclude
        )

    def wanted(name: str) -> bool:
        if left_out(name):
            return False
        if include:
            return any(
                fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, p + ".*") for p in include
            )
        return not default_scope or any(name.startswith(prefix) for prefix in default_scope)

    holders = _holders(modules)
    chosen = []
    for name, module in modules.items():
        if not wanted(name):
            continue
        if kind_of(module) is not None:
            if name == tied_head:
                raise UserError(
                    f"block {name}",
                    "a weight of its own",
                    "an output embedding that is tied to the input embedding",
                    f"Leave it out: --blocks '!{name}'.",
                )
            _refuse_shared_weight(name, module, holders)
            chosen.append(describe_block(name, module))
        elif include or not default_scope:
            _refuse_other_weights(name, module)
    if not chosen:
        raise UserError(
            "--blocks",
            "at least one linear or convolutional layer",
            "none",
            "Widen the patterns; `nn.Linear`, HF `Conv1D` and `nn.Conv2d` have blocks.",
        )
    return tuple(chosen)


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its identity."""
    # On the meta device, too, modules that share a weight hold one Parameter.
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key in {id(parameter) for parameter in module.parameters(recurse=False)}:
            holders.setdefault(key, []).append(name)
    return holders


def _refuse_shared_weight(name: str, module: nn.Module, holders: dict[int, list[str]]) -> None:
    for other in holders.get(id(module.weight), ()):
        if other != name:
            raise UserError(
                f"block {name}",
                "a weight of its own",
                f"one that it shares with {other}",
                f"Leave it out: --blocks '!{name}'.",
            )


def _refuse_other_weights(name: str, module: nn.Module) -> None:
    # Vectors (norms' scales, biases) have no Kronecker factors and no influence on those that have;
    # a matrix that is silently left out would change what the scores mean.
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            raise UserError(
                f"{name}.{key} ({type(module).__name__})",
                "a linear layer, an HF Conv1D or a Conv2d",
                f"a trainable weight of shape {tuple(parameter.shape)} of another kind",
                f"Leave it out: --blocks '!{name}'.",
            )


def input_rows(
    block: Block, module: nn.Module, x: Tensor, examples: int, tokens: int | None
) -> Tensor:
    """A module's input as rows ``[N, T, I]``, or ``[N, T, S, I]`` with ``S > 1`` groups (no bias).

    Args:
        x: the captured input; its first axis is the examples, or examples x positions flattened.
        examples: N.
        tokens: positions that went through, when the microbatch has a token axis. Where the input
            has further axes (heads, say), the rows of all positions stand together for each place
            on those: row ``e * tokens + t``.

    Raises:
        UserError: the first axis is not the examples, so that rows cannot be told apart.
    """
    if block.kind == CONV2D:
        assert isinstance(module, nn.Conv2d)
        _check_examples(block, x, examples, 4)
        return _patches(module, x)
    _check_examples(block, _split(x, examples, tokens), examples, 2)
    return _rows(x, x, examples, tokens)


def output_rows(block: Block, g: Tensor, x: Tensor, examples: int, tokens: int | None) -> Tensor:
    """A gradient of a module's output as rows ``[N, T, O]``, aligned with those of its input x."""
    if block.kind == CONV2D:
        return g.flatten(2).transpose(1, 2)
    return _rows(g, x, examples, tokens)


def rows_are_positions(block: Block, x: Tensor, examples: int, tokens: int, rows: int) -> bool:
    """Whether the rows of an input are ``tokens`` positions, once or several times over."""
    if block.kind == CONV2D:
        return rows == tokens
    return _position_axis(_split(x, examples, tokens), tokens) is not None


def _split(x: Tensor, examples: int, tokens: int | None) -> Tensor:
    """Examples and positions as two axes, where they were flattened into one."""
    if tokens is not None and x.shape[0] == examples * tokens:
        return x.reshape(examples, tokens, *x.shape[1:])
    return x


def _rows(values: Tensor, x: Tensor, examples: int, tokens: int | None) -> Tensor:
    values, x = _split(values, examples, tokens), _split(x, examples, tokens)
    axis = None if tokens is None else _position_axis(x, tokens)
    if axis is not None:
        values = values.movedim(axis, -2)
    return values.reshape(examples, -1, values.shape[-1])


def _position_axis(x: Tensor, tokens: int) -> int | None:
    """The axis of ``tokens`` positions; of several so long the one with the widest stride.

    Hidden states are [N, T, d]: cut into heads, they keep that order in memory when transposed.
    """
    fitting = [axis for axis in range(1, x.ndim - 1) if x.shape[axis] == tokens]
    return max(fitting, key=x.stride, default=None)


def _check_examples(block: Block, x: Tensor, examples: int, axes: int) -> None:
    if x.ndim < axes or x.shape[0] != examples:
        raise UserError(
            f"block {block.name}",
            f"an input whose first of {axes} or more axes is the {examples} examples",
            f"shape {tuple(x.shape)}",
            "Rows that mix examples have no per-example gradient: leave it out with "
            f"--blocks '!{block.name}'.",
        )


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The rows that a convolution multiplies by its weight: ``[N, P, I]``, or ``[N, P, S, I]``."""
    padding: tuple[int, int] = (0, 0)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif isinstance(module.padding, str):
        x = F.pad(x, module._reversed_padding_repeated_twice)
    else:
        padding = (int(module.padding[0]), int(module.padding[1]))
    columns = F.unfold(
        x,
        kernel_size=(module.kernel_size[0], module.kernel_size[1]),
        dilation=(module.dilation[0], module.dilation[1]),
        padding=padding,
        stride=(module.stride[0], module.stride[1]),
    )
    examples, _, positions = columns.shape
    if module.groups == 1:
        return columns.transpose(1, 2)
    return columns.view(examples, module.groups, -1, positions).permute(0, 3, 1, 2)
