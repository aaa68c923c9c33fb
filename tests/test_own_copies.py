"""Claims about networks that a caller of Python holds: they come back as they were, and what is
computed with is what they hold."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from commands import classified, classifier
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as spectral
from torch.nn.utils import weight_norm as weight

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.mathematics.choice import choose_blocks
from raycurv.models.opening import open_model

CPU = torch.device("cpu")
HERE: dict[str, Any] = {"objective": "classification", "address": "none", "quiet": True}
ROWS = classified(9)


def segment_outputs(make: Callable[[], nn.Module], inputs: Tensor, dtype: torch.dtype) -> Tensor:
    model = open_model(make)
    batch = Batch(0, tuple(map(str, range(len(inputs)))), inputs)
    hidden: tuple[Tensor, ...] | None = None
    for unit in range(model.units):
        hidden = model.build(range(unit, unit + 1), dtype, CPU).forward(batch, hidden)
    assert hidden is not None
    return hidden[0].detach()


# What a copy holds


class Rotary(nn.Module):
    """Turns pairs of numbers by complex ones, and counts by a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        turns = torch.polar(torch.ones(4), torch.arange(4) * 0.7 + 0.3)
        self.register_buffer("turns", turns, persistent=False)
        self.register_buffer("steps", torch.tensor([2, 3, 5]))
        self.register_buffer("scale", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.view_as_complex(self.a(x).float().reshape(-1, 4, 2)) * self.turns
        flat = torch.view_as_real(h).flatten(1).to(self.b.weight.dtype)
        return self.b(torch.tanh(flat) * self.scale) * self.steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_complex_and_whole_numbers_are_not_cast(dtype: torch.dtype) -> None:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    whole = Rotary()
    for name in ("a", "b"):
        whole.get_submodule(name).to(dtype)
    whole.scale = whole.scale.to(dtype)
    expected = whole(inputs.to(dtype)).detach()
    assert torch.equal(segment_outputs(Rotary, inputs, dtype), expected)
    held = open_model(Rotary).build(range(1), dtype, CPU).module
    assert (held.turns.dtype, held.steps.dtype) == (torch.complex64, torch.int64)
    assert held.scale.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control = Rotary().to(dtype)
    assert not control.turns.is_complex(), "a cast of the whole module loses half of each number"


def test_tables_of_transformers_are_those_of_from_pretrained(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    kind = transformers.LlamaForCausalLM
    ids = torch.arange(60)[None] % 31
    reference = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model = open_model(lambda: nn.Sequential(Logits(kind.from_pretrained(tmp_path))))
    segment = model.build(range(1), torch.bfloat16, CPU)
    (found,) = segment.forward(Batch(0, ("a",), ids), None)
    assert torch.equal(found, reference(ids).logits)
    rotary = segment.module.get_submodule("0.inner.model.rotary_emb")
    assert rotary.inv_freq.dtype == torch.float32
    assert segment.module.get_submodule("0.inner.lm_head").weight.dtype == torch.bfloat16
    held = sum(t.nbytes for t in (*segment.module.parameters(), *segment.module.buffers()))
    assert model.weight_bytes(range(1), torch.bfloat16) == held
    control = kind.from_pretrained(tmp_path).to(torch.bfloat16)(ids).logits
    assert not torch.equal(control, found), "rounded frequencies turn far positions wrongly"


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids).logits
        return logits


# The user's own network


def trained() -> nn.Sequential:
    """A network in the middle of its training: modes, frozen weights, gradients and hooks of its
    own, and an average that a forward in training mode moves."""
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            first=nn.Linear(5, 6), norm=nn.BatchNorm1d(6), act=nn.Tanh(), drop=nn.Dropout(0.5),
            last=nn.Linear(6, 3),
        )
    )  # fmt: skip
    net.train()
    net.get_submodule("norm").eval()
    net.get_parameter("first.bias").requires_grad_(False)
    net.register_buffer("steps", torch.tensor(3))
    net.get_submodule("act").register_forward_hook(lambda module, given, output: output * 1.5)
    F.cross_entropy(net(torch.randn(4, 5)), torch.tensor([0, 1, 2, 0])).backward()
    return net


def state_of(net: nn.Module) -> dict[str, Any]:
    """All that could be seen to have changed, with the objects themselves where they are told
    apart."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {
        "modes": {name: module.training for name, module in net.named_modules()},
        "trained": {name: t.requires_grad for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "gradients": {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()},
        "kinds": {name: (t.dtype, t.device, id(t), t.data_ptr()) for name, t in tensors.items()},
        "hooks": {
            name: (
                list(module._forward_hooks), list(module._forward_pre_hooks),
                list(module._backward_hooks), type(module), sorted(vars(module)),
            )
            for name, module in net.named_modules()
        },
    }  # fmt: skip


def assert_unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    for what, value in state_of(net).items():
        for name in {**value, **before[what]}:
            now, then = value[name], before[what][name]
            same = torch.equal(now, then) if isinstance(now, Tensor) else now == then
            assert same, f"{what} of {name}"


def test_a_network_comes_back_as_it_was(tmp_path: Path) -> None:
    net = trained()
    before = state_of(net)
    how = HERE | {"dtype": "float64"}
    run = raycurv.fit(lambda: net, ROWS, tmp_path / "run", gradients=True, **how)
    assert_unchanged(net, before)
    scores = run.influence(ROWS, ROWS, tmp_path / "scores", address="none", quiet=True)
    pruned = run.prune(tmp_path / "pruned", address="none", quiet=True, steps=2)
    found = raycurv.evaluate(lambda: net, ROWS, tmp_path / "loss", **how)
    assert_unchanged(net, before)
    assert len(scores.table()) == 81 and pruned.sparsity > 0
    own = copy.deepcopy(net).double().eval()
    inputs = torch.tensor([row["inputs"] for row in ROWS], dtype=torch.float64)
    labels = torch.tensor([row["labels"] for row in ROWS])
    assert found.loss == pytest.approx(F.cross_entropy(own(inputs), labels).item(), rel=1e-12)
    net(torch.randn(4, 5)).sum().backward()
    control = state_of(net)
    assert not torch.equal(
        control["gradients"]["last.weight"], before["gradients"]["last.weight"]
    ), "training goes on"


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("in the middle of a pass")


def test_a_network_comes_back_as_it_was_from_a_job_that_fails(tmp_path: Path) -> None:
    net = nn.Sequential(*trained(), Fails())
    before = state_of(net)
    with pytest.raises(Exception, match="in the middle of a pass"):
        raycurv.fit(lambda: net, ROWS, tmp_path / "run", **HERE)
    assert_unchanged(net, before)


def test_another_weight_in_a_stage_is_not_the_networks() -> None:
    net = trained()
    model = open_model(lambda: net)
    held = model.build(range(model.units), torch.float32, CPU).module
    ours = {t.data_ptr() for t in (*held.parameters(), *held.buffers())}
    assert not ours & {t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}


# Networks that have been through something


def masked() -> nn.Module:
    net = classifier()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def normed() -> nn.Module:
    net = classifier()
    net[0] = weight(net[0])
    return net


def spectrally() -> nn.Module:
    net = classifier()
    net[0] = spectral(net[0])
    return net.eval()


def unmasked() -> nn.Module:
    net = masked()
    prune.remove(net[0], "weight")
    return net


def unnormed() -> nn.Module:
    net = normed()
    remove_weight_norm(net[0])
    return net


def unspectral() -> nn.Module:
    net = spectrally()
    remove_spectral_norm(net[0])
    return net


COMPUTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "prune": (masked, unmasked, "torch.nn.utils.prune.remove(module, 'weight')"),
    "weight_norm": (normed, unnormed, "torch.nn.utils.remove_weight_norm(module)"),
    "spectral_norm": (spectrally, unspectral, "torch.nn.utils.remove_spectral_norm(module)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_hooks_compute_is_named_with_remedies_that_work(
    kind: str, tmp_path: Path
) -> None:
    make, mended, call = COMPUTED[kind]
    with pytest.raises(UserError, match="computed from others") as caught:
        raycurv.fit(make, ROWS, tmp_path / "run", **HERE)
    assert caught.value.where == "block 0" and call in caught.value.remedy
    assert "--blocks 0" in caught.value.remedy
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = mended().eval()(inputs).detach()
    assert torch.allclose(segment_outputs(make, inputs, torch.float32), expected, atol=1e-6)
    names = [block.name for block in choose_blocks(mended(), ())]
    assert names == [block.name for block in choose_blocks(make(), ("0", "2", "4"))]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


class Named(Two):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x)


class Labelled(Two):
    def forward(self, x: Any = None, *, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x)


def lazy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))


def meta() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3, device="meta"))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))


def compiled_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), torch.compile(nn.Linear(4, 3)))  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(classifier()), "a TorchScript module"),
    "traced": (lambda: torch.jit.trace(classifier(), torch.ones(1, 5)), "a TorchScript module"),
    "a scripted part": (
        lambda: nn.Sequential(torch.jit.script(nn.Linear(5, 3))), "a TorchScript module"
    ),
    "compiled inside": (compiled_inside, r"module 1: .*a wrapper around one \(OptimizedModule\)"),
    "lazy": (lazy, r"parameter 0\.weight: .*without a shape"),
    "meta": (meta, r"parameter 0\.weight: .*on the meta device"),
    "quantised": (quantised, r"a quantised one \(Linear\)"),
    "two inputs": (Two, r"forward\(x: .*, y: "),
    "a keyword": (Named, r"forward\(\*, x: "),
    "a keyword beside the inputs": (Labelled, "labels"),
    "a child of two inputs": (lambda: nn.Sequential(Two()), "child 0"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_computed_with_is_named(kind: str) -> None:
    make, says = REFUSED[kind]
    with pytest.raises(UserError, match=says) as caught:
        open_model(make)
    assert caught.value.remedy


def materialised() -> nn.Module:
    net = lazy()
    net(torch.zeros(1, 5))
    return net


def assigned() -> nn.Module:
    net = meta()
    net.load_state_dict({"0.weight": torch.ones(3, 5), "0.bias": torch.zeros(3)}, assign=True)
    return net


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Two()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x[:, :5], x[:, 5:])
        return output


@pytest.mark.parametrize(
    ("make", "width"), [(materialised, 5), (assigned, 5), (Joined, 10)], ids=["lazy", "meta", "two"]
)
def test_the_remedies_work(make: Callable[[], nn.Module], width: int) -> None:
    inputs = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(segment_outputs(make, inputs, torch.float32), make()(inputs).detach())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_that_only_run_a_network_are_looked_through(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    wrapped, plain = open_model(lambda: wrap(classifier())), open_model(classifier)
    assert wrapped.fingerprint() == plain.fingerprint() and wrapped.units == plain.units
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = segment_outputs(lambda: wrap(classifier()), inputs, torch.float32)
    assert torch.equal(found, classifier()(inputs).detach())


def test_weights_of_another_dtype_are_told() -> None:
    assert open_model(classifier).notices == ()
    (notice,) = open_model(lambda: classifier().to(torch.float16)).notices
    assert "float16" in notice and "--dtype" in notice


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 3)
        self.lock = (n for n in range(3))


def test_what_cannot_be_copied_is_named() -> None:
    model = open_model(Locked)
    with pytest.raises(UserError, match=r"copy\.deepcopy copies.*generator"):
        model.build(range(1), torch.float32, CPU)


# Frozen layers


def test_frozen_layers_have_no_blocks_unless_they_are_named() -> None:
    net = classifier()
    assert [block.name for block in choose_blocks(net, ())] == ["0", "2", "4"]
    net[2].weight.requires_grad_(False)
    assert [block.name for block in choose_blocks(net, ())] == ["0", "4"]
    assert [block.name for block in choose_blocks(net, ("!0",))] == ["4"]
    assert [block.name for block in choose_blocks(net, ("2", "4"))] == ["2", "4"]
    assert [block.name for block in choose_blocks(net, ("*",))] == ["0", "2", "4"]
    # Where all is frozen, that says nothing about a layer.
    assert len(choose_blocks(net.requires_grad_(False), ())) == 3


def test_where_only_frozen_layers_are_left_the_flag_is_named() -> None:
    net = classifier()
    for layer in (0, 2, 4):
        net[layer].weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"none that is not frozen.*--blocks '0'"):
        choose_blocks(net, ())
    assert len(choose_blocks(net, ("0",))) == 1


def test_a_frozen_matrix_of_another_kind_is_no_obstacle() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(5, 3), Table()

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.ones(4, 4))

    net = Own()
    with pytest.raises(UserError, match=r"table\.values"):
        choose_blocks(net, ())
    net.table.requires_grad_(False)
    assert [block.name for block in choose_blocks(net, ())] == ["layer"]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_modes_around_a_call_change_no_number(mode: str, tmp_path: Path) -> None:
    def traces(out: str) -> list[float]:
        return raycurv.fit(classifier, ROWS, tmp_path / out, **HERE).blocks()["trace"].to_pylist()

    expected = traces("plain")
    modes = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with modes[mode]:
        assert traces("within") == expected
        # The negative control: the mode is in force for the caller, afterwards, too.
        own = F.linear(torch.ones(2, 2), torch.ones(2, 2, requires_grad=True))
        assert own.dtype == torch.bfloat16 if mode == "autocast" else not own.requires_grad
