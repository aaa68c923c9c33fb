"""What is asked of a kind of weight.

    y_t = W a_t + b        t over the rows of an example: its tokens, calls, output positions
    ∇[W b] = Σ_t g_t [a_t 1]ᵀ        g_t = ∂f/∂y_t

A kind says which blocks a module holds, catches what enters and leaves them, lays both out as rows,
and turns the stored weight into the matrix ``[O, I]`` and back. Nothing outside this package tells
kinds apart.

Axis letters: N examples, T rows of an example, P positions of a call, S groups, I inputs, O
outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.blocks import Block


@dataclass
class ModuleCall:
    """One use of a block's weight in the forward of one microbatch.

    Attributes:
        x: what entered, detached.
        examples: how many sequences went through: an example of several has its rows one after the
            other, and the kind takes each for an example.
        version: of ``x`` when it entered: another one later means that it was changed in place.
        start: first position of a slice; ``None`` when the whole microbatch went through.
        positions: how many positions went through (P); ``None`` without a token axis.
        mask: which of them are tokens, ``[N, P]``; ``None`` where all are.
        detail: what else the kind has to know of the call. Blocks that are given one tensor share
            an input factor only if this is one object, too.
        g: gradient of what left, by draw.
        columns: numbers of the input columns that rows are given on, see :meth:`Kind.support`.
        use: of a block that several modules share, the number of the one that was called.
    """

    x: Tensor
    version: int
    examples: int
    start: int | None
    positions: int | None
    mask: Tensor | None = None
    detail: Any = None
    g: dict[int, Tensor] = field(default_factory=dict)
    columns: Tensor | None = None
    use: int = 0


class Note(Protocol):
    """Tells that a block, or several at once, have made ``y`` of ``x``; gives what the forward
    shall go on with. Several have one :class:`ModuleCall`, whose rows their kind tells apart."""

    def __call__(self, blocks: str | Sequence[str], x: Any, y: Any, detail: Any = None) -> Any: ...


class Kind(ABC):
    """A kind of weight.

    What stands here holds for a module with one block, ``weight``, whose first axis is the outputs.

    Attributes:
        name: as blocks state it, in ``blocks.json``, too.
        label: a module of this kind, as messages name it.
        rows_are_tokens: whether an example has about as many rows as tokens.
        one_row: whether it has one row, to which all calls add up.
        ragged: whether examples have different numbers of rows: those that do not count are zero as
            they come, and are left out of products of all rows.
        by_default: whether weights of this kind have blocks where nobody names them.
        in_slices: whether calls on a slice of positions at the model's end count.
    """

    name: str
    label: str
    rows_are_tokens = True
    one_row = False
    ragged = False
    by_default = True
    in_slices = True

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def describe(self, name: str, module: nn.Module) -> tuple[Block, ...]:
        """The blocks of a module of this kind, whose weights may be on the meta device."""
        weight, bias = _weight_of(module), getattr(module, "bias", None) is not None
        d_out, d_in = self.to_rows(weight).shape
        return (Block(name, self.name, d_in + bias, d_out, bias),)

    def catch(self, module: nn.Module, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        """Watch a module from now on: each use of one of the ``blocks`` (those that have curvature,
        not always all that it holds) goes through ``note``. Gives what ends the watching."""
        (block,) = blocks

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            return note(block.name, args[0] if args else next(iter(kwargs.values())), output)

        return module.register_forward_hook(hook, with_kwargs=True).remove

    def by_example(
        self, block: Block, module: nn.Module, x: Tensor, y: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """What entered and left a call, with an axis of examples of its own where all examples of
        the microbatch have it in common: the forward goes on with that."""
        return x, y

    def layout(self, block: Block, module: nn.Module) -> object:
        """Equal for blocks to which the same tensor gives the same input rows."""
        return self.name

    def support(self, block: Block, calls: Sequence[ModuleCall]) -> Tensor | None:
        """The numbers ``[U]`` of the input columns outside of which all rows of a microbatch's
        calls are zero, each once; ``None`` for all. Without groups and bias, and of blocks with a
        diagonal A alone."""
        return None

    @abstractmethod
    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        """What entered as rows ``[N, T, I]``, or ``[N, T, S, I]`` with ``S > 1`` groups; no bias.
        Of ``call.columns`` alone where these are given: ``[N, T, U]``.
        UserError if rows cannot be told apart by example."""

    @abstractmethod
    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        """A gradient of what left as rows ``[N, T, O]``, aligned with those of the input."""

    @abstractmethod
    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        """Which of a call's ``rows`` an example has count: ``[N, rows]``; ``None`` for all.

        ``mask [N, P]`` tells which positions of the call are tokens; ``None`` where all are, or
        where there is no token axis.
        """

    def positions(self, block: Block, call: ModuleCall) -> Tensor | None:
        """Of which position each row of a call is, ``[N, T]``; ``None`` where the rows are those of
        all positions in their order, once or several times."""
        return None

    def may_share_output(self, block: Block) -> bool:
        """Whether gradients of what a block makes are alike in all blocks of its parameter, which
        may have one output factor then."""
        return False

    def share(self, call: ModuleCall) -> float:
        """Rows that a block has of a call for each of its positions, on the mean, as far as that
        does not depend on values: less than 1 where tokens are shared out among blocks."""
        return 1.0

    def parameters(self, block: Block) -> tuple[str, ...]:
        """Names in the module of the parameters that hold the block: weight, then bias, if any."""
        return (block.parameter, "bias") if block.bias else (block.parameter,)

    def part(self, block: Block, parameter: Tensor) -> Tensor:
        """What of a parameter (its weight's, or its bias's) is a block's, as a view."""
        return parameter if block.index is None else parameter[block.index]

    def to_rows(self, weight: Tensor) -> Tensor:
        """A block's part of its parameter as the matrix ``[O, I]`` without the bias; a view."""
        return weight.flatten(1)

    def flops(self, module: nn.Module, x: Tensor, *more: Any) -> int:
        """FLOPs of a forward of the module, given its arguments (a multiplication and an addition
        are two)."""
        return 2 * (x.numel() // x.shape[-1]) * _weight_of(module).numel()


def check_examples(block: Block, x: Tensor, examples: int, axes: int) -> None:
    """Refuse, with a UserError, an input of a block whose first axis is not the examples."""
    if x.ndim < axes or x.shape[0] != examples:
        alone = "give --batch-tokens 1, with which each example goes alone, or "
        common = x.ndim >= axes and x.shape[0] == 1
        raise UserError(
            f"block {block.name}",
            f"an input whose first of {axes} or more axes is the {examples} examples",
            f"shape {tuple(x.shape)}",
            f"Rows that mix examples have no per-example gradient: {alone * common}leave it out "
            f"with --blocks '!{block.name}'.",
        )


def is_only_held(module: nn.Module) -> bool:
    """Whether a module is never called, and its parameters are its parent's."""
    held = (nn.ParameterList, nn.ParameterDict, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, held)


def _weight_of(module: nn.Module) -> Tensor:
    # Not always a parameter: a parametrized module computes it.
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
