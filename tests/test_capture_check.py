"""Captured gradients against autograd's own: what is found, what is borne, and that nothing else
changes by it; and models whose graph is their own business."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    CASES,
    LENGTHS,
    LLAMA,
    MIXER,
    TOKENS,
    VOCAB,
    Twice,
    arrays,
    language_model,
    sentences,
    vectors,
)
from results import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import raycurv
from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.files.manifest import Manifest
from raycurv.files.store import Store
from raycurv.mathematics import capture_check
from raycurv.mathematics.capture import Capture, Record
from raycurv.mathematics.capture_check import TOLERANCE, chosen_examples, disagreements
from raycurv.mathematics.kinds.catalogue import kind_of

DOUBLE = torch.float64


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def errors_of(
    module: nn.Module, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = DOUBLE
) -> dict[str, float]:
    """Relative error of each block, for two examples."""
    whole = nn.Sequential(module).to(dtype).eval().requires_grad_(False)
    held = [(name, module, kind_of(module)) for name, module in whole.named_modules()]
    blocks = [b for name, module, kind in held if kind for b in kind.describe(name, module)]
    capture = Capture(whole, blocks)
    batch = Batch(0, ("a", "b"), x.to(dtype), mask=mask)
    record = Record(batch)
    with torch.no_grad(), capture.recording(record):
        whole(batch.inputs)
    capture.blocks = {block.name: block for block in capture.discover(record)}
    found = disagreements(capture, batch, lambda _: [(whole(batch.inputs), 0)], dtype)
    assert found is not None
    assert not any(p.requires_grad or p.grad is not None for p in whole.parameters())
    return {name.removeprefix("0.") if name != "0" else "itself": e for name, e in found.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


class Tied(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t())


class Scaled(nn.Module):
    """A weight's norm divides what comes before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) / self.b.weight.norm())


class Slightly(nn.Module):
    """A thousandth of the layer once more, beside the module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 1e-3 * F.linear(x, self.a.weight)


class Masked(nn.Linear):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("held", (torch.rand(o, i) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.held, self.bias)


class Equalised(nn.Linear):
    """StyleGAN's: a constant multiplies the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.2, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class SequenceFirst(nn.Module):
    """Works on [T, N, d] inside."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.a, self.c, self.flat = nn.Linear(6, 8), nn.Linear(8, 3), flat

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        shape = h.shape[:2]
        h = self.a(h.reshape(-1, 6) if self.flat else h).reshape(*shape, -1)
        return self.c(torch.tanh(h).cumsum(0).mean(0))


class Centred(nn.Module):
    """Takes the mean over the microbatch off."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        return y - y.mean(dim=0, keepdim=True)


class Pooled(nn.Module):
    """The mean over positions, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh().mean(dim=1)


MASK = torch.tensor([[True, True, True], [True, False, False]])
# A network, its input, where its tokens are, the block that is wrong, and by how much at least.
FAULTS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor | None, str, float]] = {
    "an encoder that is the decoder, too": (Tied, normal(2, 6), None, "encoder", 0.1),
    "a norm of a weight": (Scaled, normal(2, 6), None, "b", 0.05),
    "a thousandth": (Slightly, normal(2, 6), None, "a", 9e-4),
    "a mask on the weight": (partial(Masked, 6, 3), normal(2, 6), None, "itself", 0.1),
    "a constant on the weight": (partial(Equalised, 6, 3), normal(2, 6), None, "itself", 0.5),
    "a standardised weight": (partial(Standardised, 1, 4, 3), normal(2, 1, 5, 5), None, "itself",
                              0.5),
    "positions first, as many as examples": (SequenceFirst, normal(2, 2, 6), None, "a", 0.1),
    "positions first, flattened": (partial(SequenceFirst, True), normal(2, 3, 6),
                                   torch.ones(2, 3, dtype=torch.bool), "a", 0.1),
    "examples mixed": (Centred, normal(2, 6), None, "a", 0.1),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_gradient_that_is_not_the_weights_is_found_and_those_of_others_agree(fault: Any) -> None:
    make, x, mask, block, least = fault
    found = errors_of(seeded(make), x, mask)
    others = [error for name, error in found.items() if name != block]
    assert found[block] > least and max(others, default=0.0) < 1e-12
    single = errors_of(seeded(make), x, mask, torch.float32)
    assert single[block] == pytest.approx(found[block], rel=1e-2)
    # Control: the tolerance does not depend on the fault being large.
    assert least > TOLERANCE[torch.float32]
    assert all(e < TOLERANCE[torch.float32] for n, e in single.items() if n != block)


def test_a_gradient_at_padding_is_found() -> None:
    with pytest.raises(UserError, match=r"block 0\.a, example 'b': .*no gradient at padding"):
        errors_of(seeded(Pooled), normal(2, 3, 6), MASK)
    # Control: of texts of one length it is the gradient that is meant.
    assert max(errors_of(seeded(Pooled), normal(2, 3, 6), MASK[[0, 0]]).values()) < 1e-12


class Half(nn.Module):
    """Its first layer computes in bfloat16, whatever the network is in."""

    def __init__(self, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.a, self.b = layer(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.tanh(self.a(x))
        return self.b(h.to(x.dtype))


def test_autocast_in_a_forward_rounds_and_hides_nothing() -> None:
    borne = TOLERANCE[torch.float32]
    found = errors_of(seeded(Half), normal(2, 64, 6), dtype=torch.float32)
    assert 0 < found["a"] < borne and found["b"] < 1e-6
    wrong = errors_of(seeded(partial(Half, Equalised)), normal(2, 64, 6), dtype=torch.float32)
    assert wrong["a"] > 10 * borne


class Mapped(nn.Module):
    """A layer within a transformation of torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.vmap(self.a)(x))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.to(torch.complex64)).abs().to(x.dtype))


@pytest.mark.parametrize("network", [Mapped, Complex])
def test_layers_that_cannot_be_captured_are_named_and_left_out(
    tmp_path: Path, network: Callable[[], nn.Module]
) -> None:
    data = vectors(6, 6, "classes")
    with pytest.raises(UserError, match=r"block a: .*--blocks '!a'"):
        fit(network, data, tmp_path / "o")
    run = fit(network, data, tmp_path / "o", blocks=("!a",), dtype="float32")
    assert run.block_names() == ["b"]


class Overwriting(nn.Module):
    """Changes what tanh keeps for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        y = self.b(h)
        h.add_(1.0)
        return y


def test_a_backward_that_fails_is_a_mistake_of_the_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RuntimeError: .*inplace operation.*Correct the forward"):
        fit(Overwriting, vectors(6, 6, "classes"), tmp_path / "o")


def test_a_layer_by_itself_is_told_how_it_is_taken(tmp_path: Path) -> None:
    data = vectors(6, 6, "classes")
    with pytest.raises(UserError, match=r"Return torch\.nn\.Sequential\(layer\)"):
        fit(partial(seeded, partial(nn.Linear, 6, 3)), data, tmp_path / "o")
    alone = nn.Sequential(seeded(partial(nn.Linear, 6, 3)))
    assert fit(lambda: alone, data, tmp_path / "o").block_names() == ["0"]


def test_a_fault_of_five_percent_is_found_in_bfloat16_and_rounding_is_none() -> None:
    class Five(Slightly):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 0.05 * F.linear(x, self.a.weight)

    half = torch.bfloat16
    assert errors_of(seeded(Five), normal(2, 64, 6), dtype=half)["a"] > TOLERANCE[half]
    right: list[tuple[Callable[[], nn.Module], Tensor]] = [
        (partial(nn.Linear, 6, 3), normal(2, 64, 6)),
        (Twice, normal(2, 64, 4)),
        (partial(nn.Conv2d, 4, 8, 3, groups=2), normal(2, 4, 9, 9)),
    ]
    for make, x in right:
        assert 0 < max(errors_of(seeded(make), x, dtype=half).values()) < TOLERANCE[half]


def test_a_weight_that_is_computed_for_the_forward_is_the_one_that_is_meant() -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    def parametrized() -> nn.Module:
        layer = nn.Linear(6, 3)
        parametrize.register_parametrization(layer, "weight", Half())
        return layer

    def pruned() -> nn.Module:
        layer = nn.Linear(6, 3)
        prune.l1_unstructured(layer, "weight", 0.5)
        return layer

    for make in (parametrized, pruned):
        assert max(errors_of(seeded(make), normal(2, 5, 6)).values()) < 1e-12


def test_no_more_than_one_weight_has_a_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = seeded(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))))
    there: list[int] = []
    compare = capture_check._Sides._compare

    def counted(self: Any, block: Any, name: str, gradient: Tensor | None) -> None:
        there.append(sum(p.grad is not None for p in deep.parameters()))
        compare(self, block, name, gradient)

    monkeypatch.setattr(capture_check._Sides, "_compare", counted)
    errors_of(deep, normal(2, 6))
    assert len(there) == 10 and max(there) == 0


def test_a_single_number_that_is_what_the_head_gives_too_is_looked_at(tmp_path: Path) -> None:
    # What leaves the layers is what the head gives: signs of one size may cancel out.
    rows = [row | {"labels": row["labels"][:1]} for row in vectors(3, 6, "numbers")]

    def fitted(make: Callable[[], nn.Module], out: str) -> raycurv.Run:
        return raycurv.fit(
            lambda: seeded(lambda: nn.Sequential(make())), rows, tmp_path / out, batch_tokens=1,
            objective="regression", address="none", quiet=True,
        )  # fmt: skip

    with pytest.raises(UserError, match=r"block 0.*relative error"):
        fitted(lambda: Masked(6, 1), "wrong")
    assert fitted(lambda: nn.Linear(6, 1), "right").manifest.facts["capture_check"]["worst"] < 1e-5


def test_sparse_gradients_of_an_embedding_are_compared(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return seeded(
            lambda: nn.Sequential(nn.Embedding(VOCAB, 6, sparse=True), nn.Linear(6, VOCAB))
        )

    run = fit(network, sentences(LENGTHS, True), tmp_path / "run", objective="causal-lm",
              blocks=("all",), **TOKENS)  # fmt: skip
    assert run.manifest.facts["capture_check"]["worst"] < 1e-12


def test_the_longest_and_the_shortest_example_are_looked_at() -> None:
    mask = torch.arange(6) < torch.tensor([4, 2, 6, 3])[:, None]
    batch = Batch(0, tuple("abcd"), mask.long(), mask=mask, columns={"x": list("wxyz")})
    assert chosen_examples(batch) == [2, 1]
    part = batch.part([2, 1], 3)
    assert part.ids == ("c", "b") and part.inputs.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert part.columns == {"x": ["y", "x"]}
    assert chosen_examples(batch.part([0])) == [0]


# In jobs


def fit(network: Callable[[], nn.Module], data: Any, out: Path, **settings: Any) -> raycurv.Run:
    chosen = {"address": "none", "dtype": "float64", "objective": "classification", "quiet": True}
    return raycurv.fit(network, list(data), str(out), **chosen | settings)


AGREE = tuple(
    case
    for case in CASES
    if case.name
    in (
        "llama with its head", "gpt2", "layer called twice", "relu in place",
        "conv2d groups circular", "tokens, heads before positions",
    )
)  # fmt: skip


@pytest.mark.parametrize("case", AGREE, ids=lambda case: case.name)
def test_of_networks_that_are_as_they_say_every_block_agrees(case: Any, fits: Any) -> None:
    run = fits.run(case)
    said = run.manifest.facts["capture_check"]
    assert 0 <= said["worst"] < 1e-12 and said["tolerance"] == TOLERANCE[DOUBLE]
    assert said["block"] in run.block_names()


def test_a_fit_names_the_block_and_by_how_much_and_goes_on_without_it(tmp_path: Path) -> None:
    data = vectors(9, 6, "classes")
    network = partial(seeded, lambda: nn.Sequential(Masked(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    for settings in ({}, {"stages": 2}, {"stages": 2, "schedule": "swept"}):
        with pytest.raises(UserError, match=r"block 0: .*relative error of 0\.\d+: Masked comp"):
            fit(network, data, tmp_path / "out", **settings)
    run = fit(network, data, tmp_path / "without", blocks=("!0",))
    assert run.block_names() == ["2"] and run.manifest.facts["capture_check"]["worst"] < 1e-12
    # Control: what was refused is not what anything else refuses.
    run = fit(network, data, tmp_path / "out", check_capture=False)
    assert run.block_names() == ["0", "2"] and run.manifest.facts["capture_check"] is None


def test_one_message_has_the_flags_for_all_layers_of_a_role(tmp_path: Path) -> None:
    def network() -> nn.Module:
        layers = [OrderedDict(masked=Masked(6, 6), plain=nn.Linear(6, 6)) for _ in range(3)]
        return nn.Sequential(OrderedDict(layers=nn.Sequential(*map(nn.Sequential, layers))))

    data = vectors(9, 6, "classes")
    with pytest.raises(UserError, match=r"2 more blocks disagree") as refused:
        fit(partial(seeded, network), data, tmp_path / "out")
    globs = re.findall(r"--blocks '(!\S+)'", refused.value.remedy)
    assert globs == ["!layers.*.masked"]
    run = fit(partial(seeded, network), data, tmp_path / "out", blocks=globs)
    assert len(run.block_names()) == 3


def test_remedies_for_a_weight_of_ones_own_making(tmp_path: Path) -> None:
    class Mask(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.tril()

    def network() -> nn.Module:
        net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        parametrize.register_parametrization(net[0], "weight", Mask())
        return net

    run = fit(
        network, vectors(9, 6, "classes"), tmp_path / "o", blocks=("!0.parametrizations.weight",)
    )
    assert run.block_names() == ["0", "2"] and run.manifest.facts["capture_check"]["worst"] < 1e-12


@pytest.mark.parametrize("positions", [2, 3])
def test_positions_before_examples_are_refused_however_many_there_are(
    tmp_path: Path, positions: int
) -> None:
    data = arrays(9, (positions, 6), "classes")
    for size in (positions, 9):
        with pytest.raises(UserError, match=r"block a: .*mix examples"):
            fit(SequenceFirst, data, tmp_path / str(size), batch_tokens=size)
    # Control: of one example alone all rows are its own.
    run = fit(SequenceFirst, data, tmp_path / "1", batch_tokens=1)
    assert run.manifest.facts["capture_check"]["worst"] < 1e-12


def test_a_first_microbatch_of_one_example_does_not_settle_whether_examples_mix(
    tmp_path: Path,
) -> None:
    data = list(sentences((8, 1, 2, 3, 2, 3), False))

    class Mixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y - y[:, :1].mean(dim=0, keepdim=True)

    network = partial(seeded, lambda: language_model(Mixed))
    settings = {"objective": "causal-lm", "batch_tokens": 8, "blocks": ("1",)}
    with pytest.raises(UserError, match=r"block 1\.a: .*for an example alone they agree"):
        fit(network, data, tmp_path / "mixed", **settings)
    # Control: of single examples everything agrees.
    fit(network, data, tmp_path / "single", **settings | {"batch_tokens": 1})


def test_both_passes_of_a_scoring_are_looked_at(tmp_path: Path) -> None:
    class Fickle(nn.Module):
        """Uses its weight twice where the inputs say so."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + (F.linear(x, self.a.weight) if (x > 9).any() else 0)

    data = list(vectors(9, 6, "classes"))
    run = fit(partial(seeded, Fickle), data, tmp_path / "fit")
    strange = [row | {"inputs": [x + 10 for x in row["inputs"]]} for row in data]
    for name, queries, train in (("q", strange, data), ("t", data, strange)):
        with pytest.raises(UserError, match=r"block a: .*relative error"):
            run.influence(queries, train, str(tmp_path / name), address="none", quiet=True)
    scores = run.influence(data, data, str(tmp_path / "both"), address="none", quiet=True)
    assert Manifest.read(Store(str(tmp_path / "both"))).facts["capture_check"]["worst"] < 1e-12
    assert scores.matrix()[0].shape == (9, 9)


@pytest.mark.parametrize("how", [{}, {"stages": 2, "schedule": "swept"}, {"replicas": 2}], ids=str)
def test_no_bit_of_a_result_depends_on_the_check(tmp_path: Path, how: dict[str, Any]) -> None:
    randomness = []
    for name, check in (("with", True), ("without", False)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            fit(
                MIXER.network, MIXER.data, tmp_path / name, objective="causal-lm", draws=2,
                check_capture=check, **MIXER.settings, **TOKENS, **how,
            )  # fmt: skip
            randomness.append(torch.get_rng_state())
    assert_same(tmp_path / "with", tmp_path / "without")
    assert torch.equal(*randomness)


# Models whose graph is their own business


class Recomputed(nn.Module):
    """A language model whose first layers run under a checkpoint, or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.reentrant = nn.Linear(6, VOCAB), reentrant

    def first(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(self.embed(ids)))))

    def second(self, h: Tensor) -> Tensor:
        return h + torch.relu_(self.c(h))

    def forward(self, ids: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.second(self.first(ids)))
        h = checkpoint(self.first, ids, use_reentrant=self.reentrant)
        return self.head(checkpoint(self.second, h, use_reentrant=self.reentrant))


class Wanting(Recomputed):
    """Its embeddings require a gradient, as scripts for adapters have them."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(reentrant)
        self.embed.register_forward_hook(lambda module, args, y: y.requires_grad_(True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpointed(Recomputed, None, tmp_path_factory.mktemp("plain") / "fit")


def checkpointed(make: Any, reentrant: bool | None, out: Path, check: bool = True) -> Path:
    fit(
        partial(seeded, partial(make, reentrant)), sentences(LENGTHS, True), out,
        objective="causal-lm", blocks=("!embed",), draws=2, gradients=True, check_capture=check,
        **TOKENS,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    "make, reentrant",
    [(Recomputed, False), (Recomputed, True), (Wanting, None), (Wanting, False), (Wanting, True)],
)
def test_checkpoints_and_inputs_that_require_gradients_change_no_bit(
    plain: Path, make: Any, reentrant: bool | None, tmp_path: Path
) -> None:
    assert_same(checkpointed(make, reentrant, tmp_path / "fit"), plain)


def test_that_checkpoints_are_switched_off_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reentrant, said in ((False, False), (True, True)):
        out = str(tmp_path / str(reentrant))
        raycurv.fit(
            partial(seeded, partial(Recomputed, reentrant)), list(sentences(LENGTHS, True)), out,
            blocks=("!embed",), address="none", **TOKENS,
        )  # fmt: skip
        shown = capsys.readouterr().err
        assert (
            "checkpointing (use_reentrant=True) inside the model is switched off" in shown
        ) is said
        assert shown.count("captured gradients agree with autograd's within") == 1
    # It comes back for whoever else uses it.
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.tanh, x, use_reentrant=True)
    assert type(y.grad_fn).__name__ == "CheckpointFunctionBackward"


def test_a_prepared_checkpoint_gives_the_numbers_of_a_plain_one(tmp_path: Path) -> None:
    def prepared() -> Any:
        model: Any = LLAMA.network()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        return model

    for name, network in (("plain", LLAMA.network), ("prepared", prepared)):
        fit(network, LLAMA.data, tmp_path / name, objective="causal-lm",
            blocks=("model.layers.0.*",), **TOKENS)  # fmt: skip
    assert_same(tmp_path / "prepared", tmp_path / "plain")
