"""Kinds of weights: each by itself against autograd, and a new one by one object of one's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import Truth, solve, worst
from networks import CONVOLUTIONS, LENGTHS, MIXER, TOKENS, VOCAB, Case, sentences
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.files.artifacts import read_blocks
from raycurv.files.store import Store
from raycurv.files.weights import write_checkpoint
from raycurv.mathematics.blocks import Block, block_name
from raycurv.mathematics.capture import Capture, Record
from raycurv.mathematics.choice import choose_blocks
from raycurv.mathematics.coverage import coverage
from raycurv.mathematics.gradients import example_gradients, spread
from raycurv.mathematics.kinds import catalogue
from raycurv.mathematics.kinds.catalogue import kind_of, kind_of_block
from raycurv.mathematics.kinds.kind import Kind, ModuleCall, Note
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched, repatch
from raycurv.models.pieces import Parts
from raycurv.models.stored import Patch, StoredWeight

DOUBLE = torch.float64
# Sums of some dozen float64 products of numbers near 1.
EXACT = 1e-10


# The kinds that there are


@dataclass(frozen=True)
class Layer:
    """A module, what it takes, and which of its layers are never called."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    held: tuple[str, ...] = ()


class PadsItself(nn.Conv2d):
    """Pads by the image's size in its own forward, and has its stride as a list."""

    def __init__(self, pads: int = 1, scale: float = 1.0) -> None:
        super().__init__(4, 8, 3, stride=2, groups=4)
        self.stride, self.pads, self.scale = [2, 2], pads, scale  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x, weight = F.pad(x, [0, self.pads, 0, self.pads]), self.weight
        if self.scale != 1:
            weight = weight * self.scale
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Scaled(nn.Module):
    """A number for each column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Positive(nn.Module):
    """A number for each column, some below zero, by its size alone, and by how far from 1 it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.further = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.abs() * self.further.sub(1).abs()


class Added(nn.Module):
    """Two outputs that are added up, and so have one gradient."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.decay.sigmoid(), x.square() * self.decay.tanh()

    def __init__(self) -> None:
        super().__init__()
        self.two = self.Two()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.two(x)
        return first + second


class Recurrent(nn.Module):
    """Parameters used in no way that is seen from outside: a decay of each column and state, a
    token before the others, a list; and two outputs, the second of them in a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(width, 2))
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.list = nn.ParameterList([torch.randn(width), torch.randn(())])

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Any:
        x = torch.cat([self.first.expand(len(x), -1, -1), x + self.list[0]], dim=1)
        if positions is not None:
            x = x[:, : len(positions)] + positions[:, None]
        state, out = x.new_zeros(*x.shape[::2], 2), []
        for row in x.unbind(1):
            state = self.decay.sigmoid() * state + (row * self.list[1])[..., None]
            out.append(state.sum(dim=-1))
        return torch.stack(out, dim=1), (state,)


class Positions(nn.Module):
    """A recurrent layer that is given the positions, as many as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent(5)

    def forward(self, x: Tensor) -> Tensor:
        y, (state,) = self.inner(x, positions=torch.arange(3.0).to(x))
        return y.sum(dim=1) * state.sum(dim=-1)


class Lstm(nn.Module):
    """torch's own, whose last states have no axis of examples in front, and are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(5, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Gemma(nn.Module):
    """A norm whose scale counts from 1, in channels that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x * (1 + self.weight)[:, None]) / x.norm(dim=1, keepdim=True)


class Attention(nn.Module):
    """torch's own attention, whose output projection is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Looked(nn.Module):
    """Tokens, looked up twice and scaled as in Gemma; their positions as ``[1, T]`` and ``[T]``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4, **options)
        self.rows, self.columns = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        places = self.rows(positions[None]) + self.columns(positions + 1)
        return (3.0 * self.tokens(x) + places) * self.tokens(x.roll(1, 1))


def _norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def shaken() -> nn.Module:
        module = make().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if name.startswith("running"):
                    buffer.add_(torch.rand_like(buffer))
        return module

    return shaken


class Mixer(nn.Module):
    """Uses the weights of layers that it does not call, as state-space mixers do; a bias where they
    scan."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 5)
        self.gate = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.conv1d(
            x.transpose(1, 2), self.conv.weight.squeeze(1).unsqueeze(1), self.conv.bias,
            padding=2, groups=4,
        )[:, :, : x.shape[1]]  # fmt: skip
        projected = self.project.weight @ mixed.tanh()
        gated = F.linear(x, self.gate.weight).sum(dim=2, keepdim=True)
        return (projected.transpose(1, 2) + self.project.bias) * gated


class OneStorage(nn.Module):
    """Two weights that lie side by side in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))
        both = torch.randn(2, 4, 4, dtype=DOUBLE)
        self.first.weight, self.second.weight = nn.Parameter(both[0]), nn.Parameter(both[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first.weight).tanh(), self.second.weight)


class Grouped(nn.Linear):
    """Each group of inputs has its own part of the weight's rows, as DeepSeek-V4 projects heads."""

    def __init__(self) -> None:
        super().__init__(5, 6)
        self.n_groups = 2

    def forward(self, x: Tensor) -> Tensor:
        parts = self.weight.unflatten(0, (2, 3)), self.bias.unflatten(0, (2, 3))
        return torch.einsum("ntgi,goi->ntgo", x, parts[0]) + parts[1]


HELD = ("0.conv", "0.project", "0.gate")
DEPTHWISE = {"kernel_size": 3, "padding": 2, "groups": 4}
LAYERS = {
    "linear": Layer(lambda: nn.Linear(5, 4), (3, 6, 5)),
    "linear, no bias, no positions": Layer(lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d": Layer(lambda: Conv1D(4, 5), (3, 6, 5)),
    **{
        f"conv2d, {name}": Layer(lambda options=options: nn.Conv2d(4, 8, **options), (3, 4, 5, 6))
        for name, options in CONVOLUTIONS.items()
    },
    "conv2d, with a forward of its own": Layer(PadsItself, (3, 4, 6, 6)),
    "convolution of one axis": Layer(
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=(2,)), (3, 4, 9)
    ),
    "convolution of one axis, causal and depthwise": Layer(
        lambda: nn.Conv1d(4, 4, **DEPTHWISE), (3, 4, 6)
    ),
    "convolution of one axis, reflected": Layer(
        lambda: nn.Conv1d(4, 3, 3, padding="same", padding_mode="reflect"), (3, 4, 6)
    ),
    "convolution of three axes": Layer(
        lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(2, 1, 1), padding=(0, 1, 2)), (3, 2, 3, 4, 5)
    ),
    "convolution of three axes, grouped": Layer(
        lambda: nn.Conv3d(2, 4, 2, dilation=(1, 2, 1), groups=2, bias=False), (3, 2, 2, 4, 3)
    ),
    "embedding": Layer(Looked, (3, 5)),
    "embedding, padded": Layer(lambda: Looked(padding_idx=2), (3, 5)),
    "embedding, examples alone": Layer(lambda: nn.Embedding(7, 4), (3,)),
    "layer norm": Layer(_norm(lambda: nn.LayerNorm(5)), (3, 6, 5)),
    "layer norm of two axes": Layer(_norm(lambda: nn.LayerNorm((6, 5), bias=False)), (3, 6, 5)),
    "rms norm": Layer(_norm(lambda: nn.RMSNorm(5)), (3, 5)),
    "norm as Gemma's": Layer(Gemma, (3, 4, 4)),
    "group norm": Layer(_norm(lambda: nn.GroupNorm(2, 4)), (3, 4, 4, 5)),
    "batch norm": Layer(_norm(lambda: nn.BatchNorm2d(4)), (3, 4, 4, 4)),
    "instance norm": Layer(_norm(lambda: nn.InstanceNorm1d(4, affine=True)), (3, 4, 4)),
    "scale of channels": Layer(lambda: Scaled(5), (3, 6, 5)),
    "scale of channels, by its size": Layer(lambda: Positive(5), (3, 6, 5)),
    "outputs that are added up": Layer(Added, (3, 6, 5)),
    "recurrence": Layer(Positions, (3, 4, 5)),
    "attention": Layer(Attention, (3, 4, 6)),
    "lstm": Layer(Lstm, (3, 4, 5)),
    "slope": Layer(lambda: nn.PReLU(4), (3, 4, 5)),
    "grouped linear": Layer(Grouped, (3, 6, 2, 5)),
    "layers that are not called": Layer(Mixer, (3, 6, 4), HELD),
    "layers of one storage that are not called": Layer(
        OneStorage, (3, 6, 4), ("0.first", "0.second")
    ),
    "bilinear": Layer(lambda: Bilinear(), (3, 4, 5)),
}


class Bilinear(nn.Module):
    """A matrix between two halves, in a module that has a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_rows_give_the_gradient_of_the_matrix_and_the_matrix_gives_the_weight_back(
    layer: Layer,
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(layer.make()).double()
    x = torch.randn(layer.shape, dtype=DOUBLE)
    if any(isinstance(m, nn.Embedding) for m in module.modules()):
        x = torch.randint(7, layer.shape)
        x.view(-1)[:: len(x)] = 2
    blocks = choose_blocks(module, ("all",), held=layer.held)
    assert {block.name for block in blocks} >= set(layer.held)
    parameters = dict(module.named_parameters())
    stored = {}
    for block in blocks:
        names = [f"{block.module}.{name}" for name in kind_of_block(block).parameters(block)]
        stored[block.name] = own = StoredWeight.among(
            parameters, block, lambda name: Parts.one(name, parameters[name].shape)
        )
        matrix = own.matrix(lambda place: place.of(parameters[place.key].detach()))
        assert matrix.shape == (block.d_out, block.d_in)
        again = copy.deepcopy(module)
        holder = again.get_submodule(block.module)
        own.put(holder, torch.zeros_like(matrix))
        assert all(not again.get_parameter(name).any() for name in names)
        own.put(holder, matrix)
        assert all(torch.equal(again.get_parameter(n), parameters[n]) for n in names)
    want: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    for example in x:
        found = torch.autograd.grad(
            module(example[None]).tanh().sum(), list(parameters.values()), materialize_grads=True
        )
        gradients = dict(zip(parameters, found, strict=True))
        for name, own in stored.items():
            want[name].append(own.matrix(lambda p, of=gradients: p.of(of[p.key].contiguous())))
    capture = Capture(module, blocks)
    record = Record(Batch(0, ("a", "b", "c"), x))
    with capture.recording(record):
        out = module(x)
    capture.blocks = {b.name: b for b in capture.discover(record)}
    out.tanh().sum().backward()
    captured = capture.captured(record)
    covered = 0
    for name, block in capture.blocks.items():
        g = captured.gradients[name]
        assert g is not None
        columns = captured.columns.get(block.input_factor)
        got = example_gradients(captured.inputs[block.input_factor], g)
        assert (columns is None) == (block.kind != "embedding")
        assert worst(spread(got, columns, block.d_in), torch.stack(want[name])) < EXACT, name
        covered += block.d_in * block.d_out
    # All that has a gradient, and each number once.
    assert covered == sum(p.numel() for p in parameters.values())


def test_a_convolution_that_pads_itself_and_changes_its_weight_is_left_out_by_name() -> None:
    def recorded(module: nn.Module) -> Record:
        network = nn.Sequential(module)
        capture = Capture(network, choose_blocks(network, ()))
        x = torch.randn(2, 4, 6, 6)
        with capture.recording(Record(Batch(0, ("a", "b"), x))) as record:
            network(x)
        capture.close()
        return record

    with pytest.raises(UserError, match=r"\[2, 2\] positions.*got \[3, 3\].*--blocks '!0'"):
        recorded(PadsItself(1, 0.5))
    # Control: without padding the positions agree, and what differs is found by the check.
    (call,) = recorded(PadsItself(0, 0.5)).calls["0"]
    assert call.x.shape[2:] == (6, 6) and call.detail is None
    assert recorded(PadsItself(1)).calls["0"][0].x.shape[2:] == (7, 7)


def test_a_block_is_described_by_its_weights_shape() -> None:
    for name, layer, want in (
        ("c", nn.Conv2d(4, 6, (3, 2), groups=2), Block("c", "conv2d", 2 * 3 * 2 + 1, 6, True, 2)),
        ("l", nn.Linear(5, 4, bias=False), Block("l", "linear", 5, 4, False)),
        ("t", Conv1D(4, 5), Block("t", "conv1d", 6, 4, True)),
    ):
        for device in ("cpu", "meta"):
            kind = kind_of(layer.to(device))
            assert kind is not None and kind.describe(name, layer) == (want,)


def test_blocks_that_an_earlier_version_wrote_have_a_module_and_a_parameter(tmp_path: Path) -> None:
    old = {
        "name": "1.q", "kind": "linear", "d_in": 4, "d_out": 3, "bias": True, "groups": 1,
        "input_factor": "1.q.input",
    }  # fmt: skip
    (tmp_path / "blocks.json").write_text(json.dumps([old]))
    (block,) = read_blocks(Store(str(tmp_path)))
    assert (block.name, block.module, block.parameter, block.index) == (
        "1.q",
        "1.q",
        "weight",
        None,
    )


def test_a_block_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"block a[\s\S]*linear, conv1d, conv2d[\s\S]*fourier"):
        kind_of_block(Block("a", "fourier", 1, 1, False))


# Which weights are chosen


def test_an_embedding_must_be_left_out_by_name() -> None:
    network = MIXER.network()
    with pytest.raises(UserError, match=r"0\.weight.*Embedding.*!0"):
        choose_blocks(network, ())
    assert {b.name for b in choose_blocks(network, ("!0",))} == {"1.q", "1.k", "1.v", "1.o", "2"}


def test_frozen_weights_of_another_kind_are_refused_all_the_same() -> None:
    attention = nn.MultiheadAttention(4, 2).requires_grad_(False)
    with pytest.raises(UserError, match=r"in_proj_weight.*!0"):
        choose_blocks(nn.Sequential(attention), ())


def test_modules_that_share_a_weight_have_one_block_or_none() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh())
    assert len(choose_blocks(network, ())) == 2
    network[1].weight = network[0].weight
    # The biases are those of each.
    weight, *biases = choose_blocks(network, ())
    assert (weight.name, weight.shared, weight.d_in, weight.bias) == ("0", ("1",), 3, False)
    assert [block.name for block in biases] == ["0.bias", "1.bias"]
    for globs in (("0",), ("!1",), ("default", "!0")):
        with pytest.raises(UserError, match=r"shares with [01].*![01]"):
            choose_blocks(network, globs)


def test_a_frozen_bias_is_no_column_of_its_layers_block() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 2, 3), nn.Linear(4, 3))
    whole = choose_blocks(network, ())
    assert [(b.bias, b.d_in) for b in whole] == [(True, 4), (True, 4), (True, 5)]
    for n in (0, 1):
        network[n].bias.requires_grad_(False)
    for globs in ((), ("all",), ("0", "1", "2")):
        blocks = choose_blocks(network, globs)
        assert [(b.bias, b.d_in) for b in blocks] == [(False, 3), (False, 3), (True, 5)]
    said = coverage(network, blocks, ())
    assert said.frozen == {"0.bias": 4, "1.bias": 2}
    assert said.covered == said.trainable == 12 + 6 + 15
    # Of a layer that is frozen whole, and asked for, the bias is asked for as well.
    network[0].requires_grad_(False)
    assert choose_blocks(network, ("0", "2")) == (whole[0], whole[2])
    # Where nothing is trained that says nothing.
    assert choose_blocks(network.requires_grad_(False), ()) == whole


def test_words_and_globs_choose_together() -> None:
    network = nn.Sequential(
        nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 7)
    )

    def chosen(*globs: str) -> list[str]:
        return [block.name for block in choose_blocks(network, globs)]

    layers = ["1.0", "2"]
    assert chosen("all") == ["0", "1.0", "1.1", "1.1.bias", "2"]
    assert chosen("all", "!*.bias") == ["0", "1.0", "1.1", "2"]
    assert chosen("!0") == chosen("default", "!0") == layers
    assert chosen("default", "0") == ["0", *layers]
    assert chosen("0", "1.1.bias") == ["0", "1.1.bias"]
    assert chosen("1.1") == ["1.1"] and chosen("*.bias") == ["1.1.bias"]
    # A glob on what vectors lie in takes, as ever, the layers there.
    assert chosen("1") == chosen("1.*") == ["1.0"]
    # What is frozen, or not run, is not among all.
    network[1][1].requires_grad_(False)
    assert chosen("all") == ["0", *layers]
    assert [b.name for b in choose_blocks(network, ("all",), idle={"0"})] == layers
    assert chosen("all", "1.1") == ["0", "1.0", "1.1", "2"]


def test_all_names_a_parameter_that_can_have_no_block() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.layer = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.start)

    with pytest.raises(UserError, match=r"start \(Own\)[\s\S]*!start"):
        choose_blocks(Own(), ("all",))
    assert len(choose_blocks(Own(), ("all", "!start"))) == 1


# Kinds of one's own: a vector, and matrices of one parameter that are caught inside their module


class Experts(nn.Module):
    """Each token goes through one of two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, width, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        second = x[..., 0] > 0
        out = torch.zeros_like(x)
        for index, chosen in enumerate((~second, second)):
            out = out.masked_scatter(chosen[..., None], self.apply_expert(index, x, chosen))
        return x + torch.tanh(out)

    def apply_expert(self, index: int, x: Tensor, chosen: Tensor) -> Tensor:
        """``[R, d]`` of the tokens that were chosen, ``[N, T]``, among all of ``x [N, T, d]``."""
        return x[chosen] @ self.experts[index].T


class ScaleKind(Kind):
    name, label = "scale", "scale"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, Scaled)

    def describe(self, name: str, module: Any) -> tuple[Block, ...]:
        own = {"module": name, "parameter": "scale"}
        width = len(module.scale)
        return (Block(block_name(name, "scale"), self.name, 1, width, False, **own),)

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        return call.x.new_ones((*call.x.shape[:2], 1))

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        return g * call.x

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return mask

    def to_rows(self, weight: Tensor) -> Tensor:
        return weight[:, None]


class ExpertsKind(Kind):
    name, label = "pair", "pair of matrices"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, Experts)

    def describe(self, name: str, module: Any) -> tuple[Block, ...]:
        count, d_out, d_in = module.experts.shape
        return tuple(
            Block(
                block_name(name, "experts", e), self.name, d_in, d_out, False,
                module=name, parameter="experts", index=e,
            )
            for e in range(count)
        )  # fmt: skip

    def catch(self, module: Any, blocks: Sequence[Block], note: Note) -> Callable[[], None]:
        names, own = {block.index: block.name for block in blocks}, module.apply_expert

        def watched(index: int, x: Tensor, chosen: Tensor) -> Tensor:
            made = own(index, x, chosen)
            return note(names[index], x, made, chosen) if index in names else made

        module.apply_expert = watched
        return lambda: delattr(module, "apply_expert")

    def input_rows(self, block: Block, module: nn.Module, call: ModuleCall) -> Tensor:
        return call.x * call.detail[..., None]

    def output_rows(self, block: Block, module: nn.Module, call: ModuleCall, g: Tensor) -> Tensor:
        spread = g.new_zeros((*call.detail.shape, block.d_out))
        spread[call.detail] = g
        return spread

    def live_rows(
        self, block: Block, call: ModuleCall, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        return call.detail if mask is None else call.detail & mask


@pytest.fixture
def own_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "KINDS", [*catalogue.KINDS, ScaleKind(), ExpertsKind()])


def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Embedding(VOCAB, 6), Scaled(6), Experts(6), nn.Linear(6, VOCAB)
        ).eval()


EXPERTS = Case(
    "kinds of one's own",
    _network,
    sentences(LENGTHS, False),
    "causal-lm",
    {"blocks": ("!0",), "fisher": "empirical"},
    **TOKENS,
)
NAMES = ["1.scale", "2.experts.0", "2.experts.1", "3"]


@dataclass
class Dense:
    """By block the gradients of all examples ``[N, O, I]``, and the rows ``[R, I]``, ``[R, O]``."""

    gradients: dict[str, Tensor]
    a: dict[str, Tensor]
    g: dict[str, Tensor]


@pytest.fixture(scope="module")
def dense() -> Iterator[Dense]:
    """One unpadded example at a time, with autograd on the parameters themselves."""
    truth = Truth(EXPERTS)
    network, seen = truth.network, []
    own = network[2].apply_expert

    def watched(index: int, x: Tensor, chosen: Tensor) -> Tensor:
        out = own(index, x, chosen)
        seen.append((f"2.experts.{index}", x[chosen].detach(), out))
        return out

    network[2].apply_expert = watched
    gradients: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    a: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    g: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for row in EXPERTS.data:
        seen.clear()
        loss = truth.loss(row, truth.outputs(row), truth.own(row))
        last = network[3]
        scale, experts, weight, bias, *outs = torch.autograd.grad(
            loss,
            [network[1].scale, network[2].experts, last.weight, last.bias, *(s[2] for s in seen)],
            materialize_grads=True,
        )
        gradients["1.scale"].append(scale[:, None])
        for e, name in enumerate(NAMES[1:3]):
            gradients[name].append(experts[e])
        gradients["3"].append(torch.cat([weight, bias[:, None]], dim=1))
        for (name, rows, _), out in zip(seen, outs, strict=True):
            a[name].append(rows)
            g[name].append(out)
    yield Dense(
        {name: torch.stack(found) for name, found in gradients.items()},
        {name: torch.cat(found) for name, found in a.items() if found},
        {name: torch.cat(found) for name, found in g.items() if found},
    )


def test_a_new_kind_is_one_object(own_kinds: None, fits: Any, dense: Dense) -> None:
    run = fits.run(EXPERTS)
    table = {row["block"]: row for row in run.blocks().to_pylist()}
    assert list(table) == NAMES
    assert [row["module"] for row in table.values()] == ["1", "2", "2", "3"]
    for name in NAMES:
        curvature, gradients = run.curvature(name), dense.gradients[name]
        q_a, q_g = curvature.input_basis.dense(), curvature.output_basis.dense()
        want = ((q_g.T @ gradients @ q_a) ** 2).mean(dim=0)
        assert worst(curvature.eigenvalues, want) < EXACT, name
    # Both experts are given one tensor, and each its own tokens of it: their factors are means over
    # those, padding left out.
    for name in NAMES[1:3]:
        assert 0 < table[name]["tokens"] == len(dense.a[name]) < sum(LENGTHS)
        for factor, rows in ((f"{name}.input", dense.a[name]), (f"{name}.output", dense.g[name])):
            file = load_file(f"{run.path}/factors/{factor}.safetensors")
            assert worst(file["sum"] / file["count"], rows.T @ rows / len(rows)) < EXACT, factor


def test_scores_of_a_new_kind_are_those_of_dense_matrices(
    own_kinds: None, fits: Any, dense: Dense
) -> None:
    run, scores = fits.run(EXPERTS), fits.scores(EXPERTS).matrix()[0]
    want = torch.zeros(len(EXPERTS.queries), len(EXPERTS.data), dtype=DOUBLE)
    for name in NAMES:
        curvature, gradients = run.curvature(name), dense.gradients[name]
        damping = 0.1 * float(curvature.eigenvalues.mean())
        products = torch.stack(
            [solve(curvature.dense(), damping, v) for v in gradients[: len(want)]]
        )
        want += products.flatten(1) @ gradients.flatten(1).T
    assert worst(torch.as_tensor(scores), want) < EXACT


def test_one_matrix_of_a_parameter_is_read_replaced_and_saved(
    own_kinds: None, tmp_path: Path
) -> None:
    model = open_model(_network)
    _, first, second, _ = choose_blocks(model.skeleton(), ("!0",))
    own = _network()[2].experts
    assert torch.equal(model.block_weight(second), own[1])
    one = Patched(model, [Patch.of(second, 2 * own[1])])
    both = Patched(one, [Patch.of(first, -own[0])])
    module = model.build(range(model.units), torch.float32, torch.device("cpu")).module
    before: Any = model
    for after, want in ((one, [own[0], 2 * own[1]]), (both, [-own[0], 2 * own[1]])):
        repatch(module, range(model.units), before, after)
        assert torch.equal(module.get_parameter("2.experts"), torch.stack(want))
        folder = tmp_path / str(len(after.patches))
        write_checkpoint(Store(str(folder)), after)
        assert torch.equal(load_file(folder / "model.safetensors")["2.experts"], torch.stack(want))
        before = after
    # Control: what was read of the model and written is no memory of its own.
    assert torch.equal(model.skeleton().get_parameter("2.experts"), own)


@pytest.mark.parametrize(
    "globs, want",
    [
        (("!0",), NAMES),
        (("2",), NAMES[1:3]),
        (("2.experts",), NAMES[1:3]),
        (("*.experts.1",), NAMES[2:3]),
        (("!0", "!2.experts.0"), [NAMES[0], *NAMES[2:]]),
    ],
)
def test_globs_choose_a_module_or_one_of_its_blocks(
    own_kinds: None, globs: tuple[str, ...], want: list[str]
) -> None:
    assert [block.name for block in choose_blocks(_network(), globs)] == want


def test_a_weight_of_no_kind_is_refused_until_it_has_one() -> None:
    # Control of all above: what the kinds themselves bring.
    with pytest.raises(UserError, match=r"2\.experts.*Experts.*!2"):
        choose_blocks(_network(), ("!0",))


def test_watching_inside_a_module_ends() -> None:
    module = _network()[2]
    block = ExpertsKind().describe("2", module)[1]
    seen: list[str] = []

    def note(name: str, x: Any, y: Any, detail: Any = None) -> Any:
        seen.append(name)
        return y

    end = ExpertsKind().catch(module, [block], note)
    x = torch.randn(2, 3, 6)
    module(x)
    end()
    module(x)
    assert seen == [block.name]
