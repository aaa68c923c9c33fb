"""Tiny networks and data as cases: each is there for one thing that can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import raycurv
from raycurv.batch import Batch

VOCAB = 23


@dataclass(frozen=True)
class Case:
    """A network, its data, and how to fit it.

    Attributes:
        name: of the case.
        network: makes the module, the same weights each time.
        data: rows as ``raycurv.fit`` takes them.
        objective: its name.
        settings: of the fit, beside those of every case.
        checkpoint: whether raycurv reads the network from an HF directory.
        save: writes that directory, where the network itself does not.
        adapters: directories of adapters, below it.
        batch_tokens: small, so that the data makes several microbatches.
        queries: the rows that ask; the first three by default.
        dense: makes the same network of linear layers that have the names of its blocks, where it
            has other ones itself.
    """

    name: str
    network: Callable[[], nn.Module]
    data: tuple[dict[str, Any], ...]
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: bool = False
    batch_tokens: int = 4
    save: Callable[[Path], object] | None = None
    adapters: tuple[str, ...] = ()
    dense: Callable[[], nn.Module] | None = None

    @property
    def queries(self) -> tuple[dict[str, Any], ...]:
        return self.data[:3]

    @property
    def draws(self) -> int:
        return int(self.settings.get("draws", 1))

    @property
    def empirical(self) -> bool:
        return self.settings.get("fisher") == "empirical"


def save_checkpoint(case: Case, folder: Path) -> Path:
    """Save a case's HF network where raycurv can read it."""
    if case.save is None:
        case.network().save_pretrained(folder)
    else:
        case.save(folder)
    return folder


# Data


def vectors(count: int, width: int, labels: str, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Rows of normal numbers; ``labels`` is ``classes`` or ``numbers`` (three of them)."""
    return arrays(count, (width,), labels, seed)


def arrays(
    count: int, shape: Sequence[int], labels: str, seed: int = 0
) -> tuple[dict[str, Any], ...]:
    """As :func:`vectors`, of any shape."""
    rng = np.random.default_rng(seed)
    return tuple(
        {
            "id": f"row {n}",
            "inputs": rng.normal(size=shape).tolist(),
            "labels": int(rng.integers(3)) if labels == "classes" else rng.normal(size=3).tolist(),
        }
        for n in range(count)
    )


def sentences(lengths: Sequence[int], masked: bool, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Token rows of these lengths; in ``masked`` ones prompts and some others are no targets."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for n, length in enumerate(lengths):
        row: dict[str, Any] = {
            "id": f"sentence {n}",
            "input_ids": rng.integers(VOCAB, size=length).tolist(),
        }
        if masked:
            prompt = n % 3  # the head of the sentence is a prompt
            row["loss_mask"] = [t >= prompt for t in range(length)]
            own = [int(y) for y in row["input_ids"]]
            row["labels"] = [-100 if (t + n) % 5 == 4 else own[t] for t in range(length)]
        rows.append(row)
    return tuple(rows)


def texts(lengths: Sequence[int], labels: str, seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Token rows with a class of each text (``class``) or of most tokens (``classes``), or with
    some tokens hidden (``words``); or two rows of tokens that are compared (``pairs``)."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for n, length in enumerate(lengths):
        row: dict[str, Any] = {"id": f"text {n}"}
        ids = rng.integers(3, VOCAB, size=length).tolist()
        if labels == "pairs":
            row |= {"chosen": ids, "rejected": rng.integers(3, VOCAB, size=1 + n).tolist()}
        elif labels == "class":
            row |= {"input_ids": ids, "labels": int(rng.integers(3))}
        else:
            most = 3 if labels == "classes" else VOCAB
            own = rng.integers(most, size=length)
            row |= {
                "input_ids": ids,
                "labels": np.where(rng.random(length) < 0.4, -100, own).tolist(),
            }
        rows.append(row)
    return tuple(rows)


# Networks


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return make().eval()

    return network


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )


def _deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False),
        nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip


def _in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True),
        nn.Linear(6, 3),
    )  # fmt: skip


class Twice(nn.Module):
    """One layer called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Mixer(nn.Module):
    """Causal attention whose q, k and v read one tensor, q and v with a bias and k without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.transpose(1, 2)).masked_fill(later, -torch.inf).softmax(dim=2)
        return x + self.o(weights @ v)


class Heads(nn.Module):
    """One layer on each of two heads: its input has an axis between positions and width."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.each = nn.Linear(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, -1))
        if self.first:  # [N, H, T, d]
            return x + torch.tanh(self.each(heads.transpose(1, 2))).transpose(1, 2).flatten(2)
        return x + torch.tanh(self.each(heads)).flatten(2)


class Again(nn.Module):
    """One layer at two depths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(torch.tanh(self.layer(x))))


class Flat(nn.Module):
    """A layer that sees positions of all examples in one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x.flatten(0, 1))).view_as(x)


class Places(nn.Module):
    """Adds an embedding of positions, ``[T]``, that all examples have in common."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Embedding(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(x.shape[1], device=x.device))


class CausalConvolution(nn.Module):
    """A depthwise convolution over positions, padded on both sides and cut, and a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Decaying(nn.Module):
    """A running sum of positions that decays in its own way: a matrix, and a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay, self.gain = nn.Parameter(torch.randn(width, 2)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, out = x.new_zeros(len(x), *self.decay.shape), []
        for row in x.unbind(1):
            state = self.decay.sigmoid() * state + (self.gain * row)[..., None]
            out.append(state.tanh().sum(dim=2))
        return torch.stack(out, dim=1), state


class First(nn.Module):
    """The first of what a module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)[0]


class TiedEnds(nn.Module):
    """An embedding whose weight makes the logits, too, with a bias of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, width, padding_idx=4), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB)
        self.head.weight = self.embed.weight
        self.mixer = Mixer(width)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mixer(self.embed(x))))


def _of_every_kind() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(VOCAB, 6, padding_idx=4), Places(6), nn.LayerNorm(6), CausalConvolution(6),
        First(Decaying(6)), nn.RMSNorm(6), Mixer(6), nn.Linear(6, VOCAB),
    )  # fmt: skip


def language_model(*middle: Callable[[int], nn.Module], width: int = 6) -> nn.Module:
    """Embedding, some modules, a head over the vocabulary."""
    return nn.Sequential(
        nn.Embedding(VOCAB, width), *(make(width) for make in middle), nn.Linear(width, VOCAB)
    )


class MeanPool(nn.Module):
    """A row of channels from an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _conv(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first = nn.Conv2d(4, 8, **options)
        return nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(8, 3, 2), MeanPool())

    return make


def shaken(module: nn.Module) -> nn.Module:
    """Fresh HF weights are so small that attention is flat: a wrong mask would hardly show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def _llama(layers: int = 2) -> nn.Module:
    # Importing it takes seconds, which tests without a checkpoint need not wait for.
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return shaken(AutoModelForCausalLM.from_config(config))


def adapted(folder: Path | None = None) -> nn.Module:
    """A Llama with two of PEFT's adapters active; base and adapters are saved to a folder first.

    Both change a projection of the second layer; the first layer has only the first one, whose rank
    differs from layer to layer.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = _llama().eval()
        if folder is not None:
            base.save_pretrained(folder)
        one = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"],
                         rank_pattern={"layers.1.self_attn.q_proj": 3}, lora_dropout=0.5,
                         task_type="CAUSAL_LM")  # fmt: skip
        other = LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "up_proj"],
                           layers_to_transform=[1], lora_bias=False)  # fmt: skip
        model = get_peft_model(base, one)
        model.add_adapter("adapter2", other)
        model.base_model.set_adapter(["default", "adapter2"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.3)
        if folder is not None:
            model.save_pretrained(str(folder / "adapters"))
        return model.base_model.model.eval()


def _gpt2() -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=VOCAB, n_embd=6, n_layer=1, n_head=2, n_positions=32)
    return shaken(AutoModelForCausalLM.from_config(config))


def _gpt_oss(layers: int) -> nn.Module:
    """A mixture of four experts, of which each token has two, and the third none at all."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=5, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=4, max_position_embeddings=32, swiglu_limit=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = shaken(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[2] = -100.0
    return model


class Separate(nn.Module):
    """The mixture of GPT-OSS with a linear layer for each matrix."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        own, self.chosen = fused.experts, fused.router.top_k
        self.limit, self.alpha = own.limit, own.alpha
        self.router = _linear(fused.router.weight, fused.router.bias)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.ModuleList(
            nn.ModuleDict(
                {name: _linear(w.T[n::2], b[n::2]) for n, name in enumerate(("gate", "up"))}
            )
            for w, b in zip(own.gate_up_proj, own.gate_up_proj_bias, strict=True)
        )
        self.experts.down_proj = nn.ModuleList(
            _linear(w.T, b) for w, b in zip(own.down_proj, own.down_proj_bias, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        rows = x.flatten(0, 1)
        scores, chosen = self.router(rows).topk(self.chosen, dim=1)
        weights, out = scores.softmax(dim=1), torch.zeros_like(rows)
        layers: Any = self.experts
        for e, (first, down) in enumerate(zip(layers.gate_up_proj, layers.down_proj, strict=True)):
            tokens, which = (chosen == e).nonzero(as_tuple=True)
            for layer in (*first.values(), down):
                layer.tokens = tokens
            if len(tokens):
                gate = first["gate"](rows[tokens]).clamp(max=self.limit)
                up = first["up"](rows[tokens]).clamp(-self.limit, self.limit)
                made = down((up + 1) * gate * torch.sigmoid(gate * self.alpha))
                out = out.index_add(0, tokens, made * weights[tokens, which, None])
        return out.view_as(x), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight, made.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
    return made


def _separated(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        model: Any = make()
        for layer in model.model.layers:
            layer.mlp = Separate(layer.mlp)
        return model

    return network


def _encoder(head: str, kind: str = "Bert", **more: Any) -> Callable[[], nn.Module]:
    """An encoder of two layers with a head: ``SequenceClassification``, say."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=10, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=32, **more,
        )  # fmt: skip
        return shaken(getattr(transformers, f"{kind}For{head}")(config))

    return make


class Once(raycurv.Classification):
    """Cross-entropy whose gradient is a function of its own, without a derivative."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return _Once.apply(outputs, super().loss(outputs, batch))  # type: ignore[no-any-return]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(outputs)
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (outputs,) = ctx.saved_tensors
        return outputs * gradients[0][:, None], None


# Lengths that differ, one token among them: an example without any loss term.
LENGTHS = (5, 2, 7, 1, 4, 7)
TOKENS = {"batch_tokens": 14}
NO_EMBEDDING = {"blocks": ("!0",)}

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "rectangle": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "bias": False},
    "same dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same even": {"kernel_size": 2, "padding": "same", "bias": False},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    "groups": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
    "depthwise": {"kernel_size": 2, "groups": 4, "bias": False},
    "groups circular": {"kernel_size": 2, "padding": 1, "groups": 2, "padding_mode": "circular"},
}

MLP = Case("mlp", _seeded(_mlp), vectors(9, 5, "classes"), "classification")
DEEP = Case("deep", _seeded(_deep), vectors(9, 5, "classes"), "classification")
IN_PLACE = Case("relu in place", _seeded(_in_place), vectors(9, 5, "classes"), "classification")
REGRESSION = Case("regression", _seeded(_mlp), vectors(9, 5, "numbers"), "regression")
LLAMA = Case(
    "llama", _seeded(_llama), sentences(LENGTHS, True), "causal-lm", checkpoint=True, **TOKENS
)
# What looks both ways, and what is of whole texts. Pads of 1, and of none: a text may hold either.
CLASSIFIER = Case(
    "bert of texts", _seeded(_encoder("SequenceClassification", num_labels=3)),
    texts(LENGTHS, "class"), "classification", {"blocks": ("bert.encoder.*", "classifier")},
    checkpoint=True, **TOKENS,
)  # fmt: skip
REWARD = Case(
    "qwen2 of pairs",
    _seeded(_encoder("SequenceClassification", "Qwen2", num_labels=1, num_key_value_heads=1)),
    texts(LENGTHS, "pairs"), "preference", {"draws": 2, "blocks": ("model.layers.*", "score")},
    checkpoint=True, batch_tokens=40,  # several pairs in a microbatch
)  # fmt: skip
MASKED = Case(
    "roberta of masked words", _seeded(_encoder("MaskedLM", "Roberta", pad_token_id=1)),
    texts(LENGTHS, "words"), "masked-lm", checkpoint=True, **TOKENS,
)  # fmt: skip
LLAMA_4 = Case(
    "llama of four layers", _seeded(lambda: _llama(4)), sentences((5, 2, 7, 1, 4, 7, 3, 6), False),
    "causal-lm", checkpoint=True, **TOKENS,
)  # fmt: skip
ADAPTED = Case(
    "llama with two adapters", adapted, LLAMA.data, "causal-lm", checkpoint=True,
    save=adapted, adapters=("adapters", "adapters/adapter2"), **TOKENS,
)  # fmt: skip
MIXER = Case(
    "q/k/v",
    _seeded(lambda: language_model(Mixer)),
    sentences(LENGTHS, False),
    "causal-lm",
    NO_EMBEDDING,
    **TOKENS,
)

MIXTURE = Case(
    "mixture of experts", _seeded(lambda: _gpt_oss(1)), LLAMA.data, "causal-lm", checkpoint=True,
    dense=_separated(_seeded(lambda: _gpt_oss(1))), **TOKENS,
)  # fmt: skip
MIXTURE_3 = Case(
    "mixture of experts of three layers", _seeded(lambda: _gpt_oss(3)), LLAMA_4.data, "causal-lm",
    checkpoint=True, **TOKENS,
)  # fmt: skip
ALL = {"blocks": ("all",)}
# Cases of which every parameter has a block.
EVERY: tuple[Case, ...] = (
    Case("every kind", _seeded(_of_every_kind), sentences(LENGTHS, True), "causal-lm",
         ALL | {"draws": 2}, **TOKENS),
    Case("tied ends", _seeded(lambda: TiedEnds(6)), sentences(LENGTHS, True), "causal-lm",
         ALL | {"draws": 2}, **TOKENS),
    Case("all of a llama", LLAMA.network, LLAMA.data, "causal-lm", ALL, checkpoint=True, **TOKENS),
    Case("all of gpt2", _seeded(_gpt2), LLAMA.data, "causal-lm", ALL | {"fisher": "empirical"},
         checkpoint=True, **TOKENS),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    MLP,
    REGRESSION,
    Case("mlp, two draws", MLP.network, MLP.data, "classification", {"draws": 2}),
    Case("mlp, empirical", MLP.network, MLP.data, "classification", {"fisher": "empirical"}),
    IN_PLACE,
    Case("layer called twice", _seeded(Twice), vectors(7, 4, "classes"), "classification"),
    LLAMA,
    Case(
        "llama with its head",
        LLAMA.network,
        LLAMA.data,
        "causal-lm",
        {"blocks": ("model.layers.1.mlp.*", "lm_head"), "draws": 2, "logits_chunk": 2 * VOCAB},
        checkpoint=True,
        **TOKENS,
    ),
    ADAPTED,
    MIXTURE,
    Case("gpt2", _seeded(_gpt2), LLAMA.data, "causal-lm", checkpoint=True, **TOKENS),
    CLASSIFIER,
    REWARD,
    MASKED,
    MIXER,
    Case(
        "q/k/v, empirical",
        MIXER.network,
        sentences(LENGTHS, True),
        "causal-lm",
        NO_EMBEDDING | {"fisher": "empirical"},
        **TOKENS,
    ),
    *(
        Case(
            name,
            _seeded(lambda make=make: language_model(make, Mixer)),
            sentences(LENGTHS, False),
            "causal-lm",
            NO_EMBEDDING,
            **TOKENS,
        )
        for name, make in (
            ("tokens, layer called twice", Again),
            ("tokens, flattened positions", Flat),
            ("tokens, heads behind positions", lambda width: Heads(width, first=False)),
            ("tokens, heads before positions", lambda width: Heads(width, first=True)),
        )
    ),
    *(
        Case(
            f"conv2d {name}",
            _seeded(_conv(**options)),
            arrays(5, (4, 5, 6), "classes"),
            "classification",
            {"blocks": ("0",)},
        )
        for name, options in CONVOLUTIONS.items()
    ),
)
