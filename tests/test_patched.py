"""Claims about models with other weights in some blocks, and about checkpoints saved of them."""

from __future__ import annotations

import itertools
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
import transformers
from networks import CONVOLUTIONS, MLP, VOCAB, MeanPool, shaken
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError
from raycurv.files.store import Store
from raycurv.files.weights import stored_patch, write_checkpoint, write_weight
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.choice import choose_blocks
from raycurv.models import checkpoint
from raycurv.models.checkpoint import Checkpoint, Weights
from raycurv.models.model import Model
from raycurv.models.opening import open_model
from raycurv.models.patched import Patched, repatch
from raycurv.models.stored import Patch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from tiny_families import tiny_config, tiny_model

CPU = torch.device("cpu")
# Float32, where a product may split its rows otherwise; max |difference| over max |reference|.
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def _small(kind: str, **more: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    return getattr(transformers, kind)(**sizes, **more)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _small("LlamaConfig"),
    "llama tied": lambda: _small("LlamaConfig", tie_word_embeddings=True),
    "qwen2, with biases": lambda: _small("Qwen2Config", num_key_value_heads=1),
    "gpt-neox": lambda: _small("GPTNeoXConfig"),
    "gpt2, transposed": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_positions=32
    ),
}
# Prefixes that older checkpoints lack.
BARE = {"gpt2, transposed": "transformer.", "gpt-neox": "gpt_neox."}


def _save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    network = shaken(transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()))
    network.to(dtype).save_pretrained(folder, **options)
    path = folder / "model.safetensors"
    if family in BARE and path.exists():
        bare = {k.removeprefix(BARE[family]): t for k, t in load_file(path).items()}
        save_file(bare, path, metadata={"format": "pt"})
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _blocks(model: Model) -> tuple[Block, ...]:
    return choose_blocks(model.skeleton(), (), model.default_scope, model.tied_head)


def _other(model: Model, block: Block, seed: int = 0) -> Tensor:
    """Another weight of a block: half of its own is gone, the rest has moved."""
    generator = torch.Generator().manual_seed(seed)
    own = model.block_weight(block)
    kept = torch.rand(own.shape, generator=generator) < 0.5
    moved = own.double() + 0.3 * torch.randn(own.shape, generator=generator).double()
    return (moved * kept).to(own.dtype)


def _patched(model: Model, every: int = 2) -> Patched:
    return Patched(model, [Patch.of(b, _other(model, b)) for b in _blocks(model)[::every]])


def _by_hand(folder: Path, patched: Patched) -> Any:
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, patch in patched.patches.items():
        dense.set_weight(network.get_submodule(name), patch.read())
    return network


IDS = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))


def _logits(model: Model, cuts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    hidden: tuple[Tensor, ...] | None = None
    batch = Batch(0, ("a", "b", "c"), IDS, torch.ones_like(IDS, dtype=torch.bool))
    for start, stop in itertools.pairwise(cuts):
        segment = model.build(range(start, stop), dtype, CPU)
        hidden = segment.forward(batch, hidden)
    assert hidden is not None
    return segment.head(*hidden)


@torch.no_grad()
def _whole(network: Any) -> Tensor:
    logits: Tensor = network(input_ids=IDS, use_cache=False).logits
    return logits


# The matrix of a block, and patches


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_of_a_block_is_that_of_its_module(tmp_path: Path, family: str) -> None:
    model = open_model(str(_save(tmp_path, family)))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for block in _blocks(model):
        module: Any = network.get_submodule(block.name)
        expected = dense.matrix_of(module, module.weight, module.bias)
        assert torch.equal(model.block_weight(block), expected), block.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_is_the_one_whose_weights_are_set_by_hand(
    tmp_path: Path, family: str
) -> None:
    model = open_model(str(_save(tmp_path, family)))
    patched = _patched(model)
    expected = _whole(_by_hand(tmp_path, patched))
    for cuts in ((0, 2), (0, 1, 2)):
        assert dense.worst(_logits(patched, cuts), expected) < CLOSE, cuts
    # Control: the patches matter.
    assert dense.worst(_logits(model, (0, 2)), expected) > 100 * CLOSE


def _grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, **CONVOLUTIONS["groups"]), nn.ReLU(), nn.Conv2d(8, 3, 2), MeanPool(),
        nn.Linear(3, 3, bias=False),
    ).eval()  # fmt: skip


def test_a_patched_sequential_is_the_one_whose_weights_are_set_by_hand() -> None:
    model = open_model(_grouped)
    patched = _patched(model, every=1)
    images = torch.randn(2, 4, 5, 6)
    hidden: tuple[Tensor, ...] | None = None
    for start, stop in ((0, 2), (2, model.units)):
        segment = patched.build(range(start, stop), torch.float32, CPU)
        hidden = segment.forward(Batch(0, ("a", "b"), images), hidden)
    assert hidden is not None
    own = _grouped()
    plain = own(images)
    for name, patch in patched.patches.items():
        dense.set_weight(own.get_submodule(name), patch.read())
    assert torch.equal(*hidden, own(images))
    assert not torch.equal(plain, own(images))


@pytest.mark.parametrize("family", ["gpt2, transposed", "qwen2, with biases"])
def test_a_segment_that_is_patched_again_equals_one_built_anew(tmp_path: Path, family: str) -> None:
    model = open_model(str(_save(tmp_path, family, torch.bfloat16)))
    first, second, *_ = _blocks(model)
    last = _blocks(model)[-1]
    one = Patched(model, [Patch.of(b, _other(model, b)) for b in (first, second, last)])
    two = Patched(model, [Patch.of(first, _other(model, first, seed=1)), one.patches[last.name]])
    units = range(0, 2)
    module = model.build(units, torch.float32, CPU).module
    before: Model = model
    for after in (one, two, model):
        repatch(module, units, before, after)
        expected = after.build(units, torch.float32, CPU).module.state_dict()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        before = after


def test_patches_travel_and_lie_in_a_store(tmp_path: Path) -> None:
    model = open_model(str(_save(tmp_path / "model", "llama")))
    block, store = _blocks(model)[3], Store(str(tmp_path / "out"))
    matrix = _other(model, block)
    write_weight(store, block, matrix)
    expected = _logits(Patched(model, [Patch.of(block, matrix)]), (0, 2))
    travelled = pickle.loads(pickle.dumps(Patched(model, [stored_patch(store, block)])))
    assert torch.equal(_logits(travelled, (0, 2)), expected)
    assert torch.equal(travelled.block_weight(block), matrix)


def test_the_fingerprint_tells_a_single_weight(tmp_path: Path) -> None:
    model = open_model(str(_save(tmp_path, "llama")))
    block = _blocks(model)[0]
    matrix = _other(model, block)
    nearly = matrix.clone()
    nearly[3, 2] += 1e-3
    prints = [model.fingerprint()]
    prints += [Patched(model, [Patch.of(block, m)]).fingerprint() for m in (matrix, nearly)]
    assert prints[0] != prints[1] != prints[2] != prints[0]
    # Control: the same weight is the same model, patched in one step or in two.
    again = Patched(Patched(model, [Patch.of(block, nearly)]), [Patch.of(block, matrix.clone())])
    assert again.fingerprint() == prints[1]


def test_a_parameter_is_stored_as_a_tensor_or_a_view_of_one(tmp_path: Path) -> None:
    save_file({name: torch.zeros(4, 4) for name in "abcde"}, tmp_path / "model.safetensors")
    weights = Weights(Checkpoint(tmp_path), torch.device("meta"))
    a, b, c, d, e = (weights[name].to() for name in "abcde")
    module = nn.ParameterDict({"own": a, "joined": torch.cat([b, c]), "turned": d.T, "part": e[:2]})
    found = weights.parts_of(module)
    assert found.keys() == {"own", "turned", "part"}
    stored = torch.arange(16.0).view(4, 4)
    for name, want in {"own": stored, "turned": stored.T, "part": stored[:2]}.items():
        place = found[name].place(lambda parameter: parameter[1:])
        assert place is not None and torch.equal(place.of(stored), want[1:])


# Saved checkpoints


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def _key(folder: Path, name: str, part: str) -> str:
    """A parameter's key, from its name's end."""
    (key,) = (k for k in _tensors(folder) if f"{name}.{part}".endswith(k))
    return key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded_by_transformers_alone(tmp_path: Path, family: str) -> None:
    source, target = _save(tmp_path / "model", family), tmp_path / "saved"
    patched = _patched(open_model(str(source)))
    write_checkpoint(Store(str(target)), patched)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    assert torch.equal(_whole(loaded), _whole(_by_hand(source, patched)))
    # Nothing else has changed: names, dtypes, bytes, metadata, and what lies beside the weights.
    before, after = _tensors(source), _tensors(target)
    other = {_key(source, name, "weight") for name in patched.patches}
    other |= {_key(source, n, "bias") for n, p in patched.patches.items() if p.block.bias}
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key]) == (key not in other), key
    for path in source.iterdir():
        if path.suffix == ".json":
            assert path.read_bytes() == (target / path.name).read_bytes()
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# How a checkpoint keeps experts: each matrix by itself, under names of its own, or all in tensors
# that are transposed, interleaved, or joined.
MIXTURES = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe")


def _expert(network: Any, block: Block) -> tuple[Tensor, Tensor | None]:
    """The part of a network's parameters that is an expert's matrix ``[O, I]``, and its bias."""
    module, bias = network.get_submodule(block.module), None
    weight = module.get_parameter(block.parameter)[block.index]
    # Llama 4 says nothing of its own layout.
    weight = weight.T if getattr(module, "is_transposed", True) else weight
    if block.bias:
        bias = module.get_parameter(f"{block.parameter}_bias")[block.index]
    if block.part:
        half = slice(len(weight) // 2) if block.part == "gate" else slice(len(weight) // 2, None)
        if not getattr(module, "is_concatenated", True):
            half = slice(int(block.part == "up"), None, 2)
        weight, bias = weight[half], None if bias is None else bias[half]
    return weight, bias


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_read_and_replaced_where_the_checkpoint_keeps_them(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    tiny_model(tiny_config(kind)).save_pretrained(source)
    model = open_model(str(source))
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    blocks = [block for block in _blocks(model) if block.index is not None]
    assert len(blocks) >= 12
    read: list[int] = []
    fill = checkpoint._fill
    monkeypatch.setattr(checkpoint, "_fill", lambda *a: (read.append(len(a[-1])), fill(*a)))
    patches = []
    for number, block in enumerate(blocks):
        weight, bias = (None if t is None else t.detach() for t in _expert(network, block))
        assert weight is not None
        own = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        read.clear()
        assert torch.equal(model.block_weight(block), own), block.name
        # Not the other experts'; of two that alternate the other one, too.
        assert sum(read) <= 4 * (2 * own.numel()), block.name
        if number % 3 == 0:
            patches.append(Patch.of(block, _other(model, block)))
            weight.copy_(patches[-1].read()[:, : weight.shape[1]])
            if bias is not None:
                bias.copy_(patches[-1].read()[:, -1])
    patched = Patched(model, patches)
    write_checkpoint(Store(str(target)), patched)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    built = patched.build(range(model.units), torch.float32, CPU).module.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor) and torch.equal(built[name], tensor), name
    before, after = _tensors(source), _tensors(target)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {place.key for p in patches for place in model.stored(p.block).places}
    files = [folder / "model.safetensors" for folder in (source, target)]
    start = 8 + int.from_bytes(files[0].read_bytes()[:8], "little")
    assert files[0].read_bytes()[:start] == files[1].read_bytes()[:start]


def test_shards_keep_their_index_and_bfloat16_its_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    _save(source, "qwen2, with biases", torch.bfloat16, max_shard_size="1KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    patched = _patched(open_model(str(source)))
    assert {patch.read().dtype for patch in patched.patches.values()} == {torch.bfloat16}
    write_checkpoint(Store(str(target)), patched)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    for name, tensor in _by_hand(source, patched).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names
    # A model that is not patched is copied.
    write_checkpoint(Store(str(tmp_path / "copy")), open_model(str(source)))
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_a_tensor_that_two_files_have_is_replaced_in_both(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    _save(source, "llama", max_shard_size="4KB")
    first, *_, last = sorted(source.glob("*.safetensors"))
    key = next(key for key in load_file(first) if "mlp" in key)
    save_file(load_file(last) | {key: load_file(first)[key]}, last, metadata={"format": "pt"})
    model = open_model(str(source))
    block = next(block for block in _blocks(model) if key.startswith(block.name))
    write_checkpoint(Store(str(target)), Patched(model, [Patch.of(block, _other(model, block))]))
    for path in (first, last):
        assert torch.equal(load_file(target / path.name)[key], _other(model, block))
    # Control: what is not patched is the same file.
    write_checkpoint(Store(str(tmp_path / "copy")), model)
    assert (tmp_path / "copy" / last.name).read_bytes() == last.read_bytes()


def test_the_files_of_a_patched_and_saved_model_give_its_own_weights(tmp_path: Path) -> None:
    patched = _patched(open_model(str(_save(tmp_path / "model", "gpt2, transposed"))))
    write_checkpoint(Store(str(tmp_path / "saved")), patched)
    again = open_model(str(tmp_path / "saved"))
    for block in _blocks(again):
        assert torch.equal(again.block_weight(block), patched.block_weight(block))


def test_a_state_dict_is_saved_under_its_own_names(tmp_path: Path) -> None:
    patched = _patched(open_model(_grouped), every=1)
    write_checkpoint(Store(str(tmp_path)), patched)
    network = _grouped()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, patch in patched.patches.items():
        module: Any = network.get_submodule(name)
        assert torch.equal(dense.matrix_of(module, module.weight, module.bias), patch.read())


class _Watched:
    """Reads a patch, and looks whether an earlier one is still there."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def reader(self, matrix: Tensor) -> Callable[[], Tensor]:
        def read() -> Tensor:
            found = matrix.clone()
            self.alive.append(weakref.ref(found))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            return found

        return read


def test_saving_holds_a_piece_or_a_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "COPIED_BYTES", 100)
    model = open_model(str(_save(tmp_path / "model", "qwen2, with biases")))
    watched = _Watched()
    patches = [Patch(b, watched.reader(_other(model, b)), b.name) for b in _blocks(model)]
    largest = max(patch.block.d_in * patch.block.d_out * 4 for patch in patches)
    weights = model.files(patches)[0]
    sizes = [len(chunk) for chunk in weights.chunks()]
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert sum(sizes) == size
    assert max(sizes) <= max(largest, 100) < size / 10
    assert watched.most == 1


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_checkpoint_that_is_not_whole_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    _save(source, "llama", max_shard_size="4KB")
    patched, store = _patched(open_model(str(source))), Store(str(target))
    write = Store.write
    written: list[str] = []

    def dies(self: Store, name: str, chunks: Any) -> None:
        def some() -> Iterator[Any]:
            for number, chunk in enumerate(chunks):
                if len(written) == at and number:
                    raise _Killed
                yield chunk
            if len(written) == at:
                raise _Killed

        write(self, name, some())
        written.append(name)

    for _ in range(2):  # onto nothing, and onto what was whole
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr(Store, "write", dies)
            write_checkpoint(store, patched)
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(target)
        with pytest.raises(UserError):
            open_model(str(target))
        write_checkpoint(store, patched)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
        assert torch.equal(_whole(loaded), _whole(_by_hand(source, patched)))


# Mistakes


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another shape": (lambda w: w[:, 1:], "shape"),
    "another dtype": (lambda w: w.double(), "float64"),
    "not finite": (lambda w: w / 0, "finite"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_weight_that_does_not_fit_is_named_when_built_and_when_saved(
    tmp_path: Path, mistake: str
) -> None:
    model = open_model(str(_save(tmp_path / "model", "llama")))
    change, says = WRONG[mistake]
    block = _blocks(model)[0]
    patched = Patched(model, [Patch.of(block, change(model.block_weight(block)))])
    for act in (
        lambda: patched.build(range(0, 2), torch.float32, CPU),
        lambda: write_checkpoint(Store(str(tmp_path / "saved")), patched),
    ):
        with pytest.raises(UserError, match=rf"{block.name}[\s\S]*{says}"):
            act()


def test_a_head_that_is_the_embedding_has_no_weight_of_its_own(tmp_path: Path) -> None:
    head = Block("lm_head", "linear", 8, VOCAB, False)
    tied = open_model(str(_save(tmp_path / "tied", "llama tied")))
    with pytest.raises(UserError, match=r"lm_head[\s\S]*embed_tokens"):
        tied.block_weight(head)
    # Control: another head has.
    assert open_model(str(_save(tmp_path / "own", "llama"))).block_weight(head).shape == (VOCAB, 8)


def _normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))


def _sharing() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize(("factory", "says"), [(_normed, "made of"), (_sharing, "share")])
def test_a_weight_that_cannot_be_replaced_by_itself_is_named(
    factory: Callable[[], nn.Module], says: str
) -> None:
    model = open_model(factory)
    first: Any = factory()[0]
    block = Block("0", "linear", first.in_features + 1, 4, True)
    with pytest.raises(UserError, match=rf"block 0[\s\S]*{says}"):
        Patched(model, [Patch.of(block, torch.zeros(4, block.d_in))])


@pytest.mark.parametrize("place", ["its own", "another's"])
def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, place: str) -> None:
    patched = _patched(open_model(str(_save(tmp_path, "llama"))))
    folder = tmp_path
    if place == "another's":
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "notes.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="directory"):
        write_checkpoint(Store(str(folder)), patched)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_a_model_of_ones_own_is_not_changed_by_what_is_read_of_it() -> None:
    model = open_model(MLP.network)
    block = _blocks(model)[1]
    before = model.block_weight(block).clone()
    model.block_weight(block).zero_()
    assert torch.equal(model.block_weight(block), before)
