"""A network from an HF checkpoint, cut between its decoder layers.

A segment is the whole HF class, with the layers of other segments replaced by modules that pass
their input on, so that masks, rotary tables, scalings and the head are HF's own code. What enters
a segment is put in by the layer before its first one; what leaves is caught behind its last one.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import UserError, user_errors
from raycurv.mathematics.blocks import Block
from raycurv.models.anatomy import (
    AS_FACTORY,
    META,
    TRIED,
    Anatomy,
    find_anatomy,
    hidden_of,
    meta_mask,
    refused,
    run_on_meta,
)
from raycurv.models.checkpoint import Checkpoint, Weights
from raycurv.models.checkpoint_files import TOKENIZER_FILES, CheckpointFile, hf_files
from raycurv.models.foreign_code import (
    named_code,
    nothing_from_outside,
    plain_implementations,
)
from raycurv.models.model import Model, Outline, Segment
from raycurv.models.stored import (
    Patch,
    StoredWeight,
    no_tensor_of_its_own,
    parameter_names,
    replacements,
)


class HFOutline(Outline):
    """What the ``config.json`` in a directory says of a causal language model, without weights.

    Opening it runs the architecture once on the meta device. UserError for no or an unknown
    configuration, a quantised checkpoint, or an architecture whose layers speak past the hidden
    states.
    """

    token_inputs = True
    anatomy: Anatomy
    _skeleton: nn.Module | None

    def __init__(self, name: str, directory: Path, trust_remote_code: bool = False) -> None:
        self.name = name
        self.directory = directory
        self.trust_remote_code = trust_remote_code
        self.config = _read_config(directory, trust_remote_code)
        whole = self._on_meta()
        anatomy = find_anatomy(whole, self.config, self._stored_twice, directory)
        _try_cuts(whole, anatomy, directory)
        self.anatomy, self._skeleton = anatomy, whole
        self.units, self.width = anatomy.count, anatomy.width
        # Weights that multiply at each token: those of each layer, and the head's in the last.
        costs = [float(anatomy.numel[anatomy.layer(i)]) for i in range(self.units)]
        costs[-1] += anatomy.numel[anatomy.head]
        self.unit_costs = tuple(costs)
        self.default_scope = (f"{anatomy.layers}.",)
        self.tied_head = anatomy.head if anatomy.tied else None
        text = self.config.get_text_config()
        self.max_positions = getattr(text, "max_position_embeddings", None)
        self.vocab_size = getattr(text, "vocab_size", None)
        if any((directory / file).is_file() for file in TOKENIZER_FILES):
            self.tokenizer_dir = str(directory)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeleton": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes of the directory's own can be named in no other process before it has opened it.
        if self._own_code:
            return type(self), (self.name, self.directory, True)
        return super().__reduce_ex__(protocol)

    @property
    def _own_code(self) -> list[str]:
        """What is named of the code of the directory, where that may run."""
        return named_code(self.directory / "config.json") if self.trust_remote_code else []

    def _on_meta(self) -> nn.Module:
        return _causal_model(self.config, self.directory, self.trust_remote_code)

    def _stored_twice(self, shape: torch.Size) -> bool:
        return False

    def skeleton(self) -> nn.Module:
        """The whole model on the meta device."""
        if self._skeleton is None:
            self._skeleton = self._on_meta()
        return self._skeleton

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        run_on_meta(skeleton, examples, tokens, self.anatomy.masked)
        return True

    def unit_of(self, module_name: str) -> int:
        """The layer that holds a module: 0 what runs before them, the last what runs behind."""
        prefix = f"{self.anatomy.layers}."
        if module_name.startswith(prefix):
            return int(module_name.removeprefix(prefix).split(".")[0])
        return 0 if module_name in self.anatomy.early else self.units - 1

    def weight_bytes(self, units: range, dtype: torch.dtype) -> int:
        anatomy = self.anatomy
        names = {anatomy.layer(i) for i in units} | anatomy.outside(units)
        if anatomy.tied and {anatomy.embedding, anatomy.head} <= names:
            names.remove(anatomy.head)
        return dtype.itemsize * sum(anatomy.numel[name] for name in names)


class HFModel(HFOutline, Model):
    """A causal language model in a directory with ``config.json`` and safetensors.

    Opening it resolves every weight against the checkpoint and runs the architecture once on the
    meta device, reading no weights: so a mistake shows before any stage starts, as a UserError (as
    for an outline; a weight missing or misshapen, or a damaged file).
    """

    def _on_meta(self) -> nn.Module:
        self.checkpoint = Checkpoint(self.directory)
        self._class = type(super()._on_meta())
        weights = Weights(self.checkpoint, META)
        whole = self._load(weights, torch.float32, None)
        self._used = weights.used
        self._keys = weights.keys_of(whole)
        return whole.to(META)

    def _stored_twice(self, shape: torch.Size) -> bool:
        entries = self.checkpoint.entries
        alike = [key for key in self._used if entries[key].shape == tuple(shape)]
        prints = self.checkpoint.fingerprint(alike)
        return len(alike) > len({prints[key]["hash"] for key in alike})

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        return self.checkpoint.fingerprint() | self._code_fingerprint()

    def _code_fingerprint(self) -> dict[str, dict[str, Any]]:
        """An entry ``code FILE`` for each file of the directory's code, where that runs."""
        files = sorted(self.directory.glob("*.py")) if self._own_code else []
        read = {file.name: file.read_bytes() for file in files}
        return {
            f"code {name}": {
                "dtype": "code",
                "shape": [len(text)],
                "hash": hashlib.blake2b(text, digest_size=16).hexdigest(),
            }
            for name, text in read.items()
        }

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> HFSegment:
        assert 0 <= units.start < units.stop <= self.units and units.step == 1, units
        weights = Weights(self.checkpoint, device)
        module = self._load(weights, dtype, units)
        # Weights are on the device already; this moves HF's own tables, without a cast.
        module.to(device)
        module.eval().requires_grad_(False)
        return HFSegment(module, units, self.anatomy)

    def stored(self, block: Block) -> StoredWeight:
        """Where the checkpoint keeps a block's weight, as the loader resolved its keys; UserError
        if it makes it of several tensors or of a part of one, or makes another weight of it."""

        def key_of(name: str) -> str:
            key = self._keys.get(name)
            if key is None:
                raise no_tensor_of_its_own(
                    block, f"a {name} that transformers makes of other tensors of the checkpoint"
                )
            others = [n for n, k in self._keys.items() if k == key and n != name]
            if others:
                raise no_tensor_of_its_own(block, f"{key}, which {others[0]} is, too")
            return key

        keys = [key_of(name) for name in parameter_names(block)]
        return StoredWeight.among(self.checkpoint.entries, block, *keys)

    def block_weight(self, block: Block) -> Tensor:
        return self.stored(block).matrix(self.checkpoint.read)

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        return hf_files(self.checkpoint, replacements(self.stored, patches, self.checkpoint.read))

    def _load(self, weights: Weights, dtype: torch.dtype, units: range | None) -> nn.Module:
        """HF's own loading of the class, pruned to ``units`` if these are given."""
        base = self._class
        buffers_may_miss: set[str] = set()

        def init(module: Any, config: Any) -> None:
            base.__init__(module, config)
            if units is not None:
                _prune(module, units, self.anatomy)
            # The weights of other segments are foreign here, as are ignorable extras.
            module._keys_to_ignore_on_load_unexpected = {".*"}
            buffers_may_miss.update(module._keys_to_ignore_on_load_missing)
            module._keys_to_ignore_on_load_missing = set()

        # HF looks key renamings up by the name and module of the class.
        pruned = type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
        wanted = f"a checkpoint for {base.__name__} of transformers {transformers.__version__}"
        kinds = (ImportError, ValueError, RuntimeError)
        code = nothing_from_outside(self.directory / "config.json", self.trust_remote_code)
        with user_errors(f"model {self.directory}", wanted, AS_FACTORY, *kinds), _quiet(), code:
            module, info = cast(Any, pruned).from_pretrained(
                None,
                config=self.config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                # Mismatches come back in the loading info, to be named below.
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
        self._check_loaded(module, info, buffers_may_miss)
        if units is not None and self.anatomy.tied:
            # Either was there for HF to resolve the tie from both names.
            for name in {self.anatomy.embedding, self.anatomy.head} - self.anatomy.outside(units):
                if next(module.get_submodule(name).parameters(), None) is not None:
                    # A stand-in keeps what it stands for, which must not keep weights.
                    gone = module.get_submodule(name).to(META)
                    _replace(module, name, _Absent(gone, self.anatomy.axes.get(name, 0)))
        return cast(nn.Module, module)

    def _check_loaded(
        self, module: nn.Module, info: dict[str, Any], buffers_may_miss: set[str]
    ) -> None:
        for name, got, expected in sorted(info["mismatched_keys"]):
            raise UserError(
                f"{self._file_of(name)}, tensor {name}",
                f"shape {list(expected)}, as config.json says",
                f"{list(got)}",
                "The configuration and the weights belong to different models.",
            )
        weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        allowed = [re.compile(pattern) for pattern in buffers_may_miss]
        missing = sorted(
            name
            for name in info["missing_keys"]
            if name in weights or not any(pattern.search(name) for pattern in allowed)
        )
        if missing:
            raise UserError(
                f"{self._file_of(None)}, tensor {missing[0]}",
                "every weight of the model in the checkpoint",
                f"{len(missing)} missing",
                "A missing weight would be a random one: complete the checkpoint, "
                "or correct config.json.",
            )

    def _file_of(self, weight: str | None) -> Path:
        """The file that a weight comes from, as well as its name tells."""
        if weight is not None:
            for key, entry in self.checkpoint.entries.items():
                if key == weight or weight.endswith(f".{key}") or key.endswith(f".{weight}"):
                    return Path(entry.file)
        files = {entry.file for entry in self.checkpoint.entries.values()}
        return Path(files.pop()) if len(files) == 1 else self.directory


class HFSegment(Segment):
    """The part of an HF model that one stage holds.

    ``module`` is the whole HF class, pruned, so that names are the whole model's.
    """

    def __init__(self, module: nn.Module, units: range, anatomy: Anatomy) -> None:
        self.module = module
        self.first = units.start == 0
        self.last = units.stop == anatomy.count
        self._anatomy = anatomy
        layers = cast(nn.ModuleList, module.get_submodule(anatomy.layers))
        self._layers = layers
        self._passed = nn.ModuleList(
            layer if isinstance(layer, _Passed) else _Passed(layer, anatomy.outputs)
            for layer in layers
        )
        weight = next(layers[units.start].parameters())
        self._dtype = weight.dtype
        for part in module.modules():
            if isinstance(part, _Absent):
                part.device = weight.device
        # HF's eager attention takes its softmax in float32, where a mask of float64's lowest number
        # is -Inf: a padded row that sees only padding (sliding windows) becomes NaN and poisons
        # the rest. Padded on the right, no token sees padding anyway.
        eager = getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
        self._masked = not (eager and self._dtype == torch.float64)
        self._ends = layers[units.stop - 1].register_forward_hook(_stop)

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Hidden states ``[N, T, d]`` behind the segment's last layer, alone in a tuple as they
        come; the first segment embeds ``batch.inputs``."""
        assert (hidden is None) == self.first, "the first segment, and only that, takes no hidden"
        mask = batch.mask
        mask = mask.to(torch.int64) if mask is not None and self._masked else None
        return (self._run(batch.inputs, None if hidden is None else hidden[0], mask),)

    def rehearse(self, hidden: Tensor | None) -> Tensor:
        """What :meth:`forward` gives of a segment on the meta device, and the head in the last; its
        layers are left without hooks."""
        ids = torch.zeros(TRIED, dtype=torch.int64, device=META)
        masked = self._anatomy.masked
        try:
            left = self._run(ids, hidden, meta_mask(self.module, *TRIED, masked))
        finally:
            self._ends.remove()
        if self.last:
            rows = left.flatten(0, 1)[:, None]
            self._logits(rows, meta_mask(self.module, len(rows), 1, masked))
        return left

    def head(self, part: Tensor) -> Tensor:
        """Logits ``[N, t, V]`` of hidden states ``[N, t, d]``, differentiable in ``part``.

        HF's forward with every layer passed over. Nothing behind the layers looks from one
        position to another, so each position goes alone: no masks of t x t, no limit on N·t.
        """
        assert self.last, "only the last segment holds the head"
        logits = self._logits(part.reshape(-1, 1, part.shape[-1]), None)
        return logits.reshape(*part.shape[:-1], -1)

    def _logits(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        parent, _, name = self._anatomy.layers.rpartition(".")
        owner = self.module.get_submodule(parent)
        entry = cast(_Passed, self._passed[0])
        setattr(owner, name, self._passed)
        entry.instead = rows
        try:
            output = self.module(**self._dummy(rows), attention_mask=mask, use_cache=False)
        finally:
            entry.instead = None
            setattr(owner, name, self._layers)
        return cast(Tensor, output.logits)

    def _dummy(self, hidden: Tensor) -> dict[str, Tensor]:
        """Stands for embeddings in shape and dtype, from which HF makes masks and rotary tables."""
        zero = torch.zeros((), dtype=self._dtype, device=hidden.device)
        embedded = zero.expand(*hidden.shape[:-1], self._anatomy.width)
        return {"inputs_embeds": embedded.contiguous() if self._anatomy.writes else embedded}

    def _run(self, ids: Tensor, hidden: Tensor | None, mask: Tensor | None) -> Tensor:
        entry = cast(_Passed, self._passed[0])
        entry.instead = hidden
        given = {"input_ids": ids} if hidden is None else self._dummy(hidden)
        try:
            self.module(**given, attention_mask=mask, use_cache=False)
        except _Stop as stop:
            # The frames between hold activations that nothing else needs.
            traceback.clear_frames(stop.__traceback__)
            return stop.hidden
        finally:
            entry.instead = None
        raise AssertionError("the forward did not come to the segment's last layer")


class _Stop(BaseException):
    """Leaves a forward with hidden states. Not an ``Exception``: no handler on the way keeps it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(layer: nn.Module, args: Any, output: Any) -> None:
    raise _Stop(hidden_of(output))


class _StandIn(nn.Module):
    """In place of a module that another segment holds.

    What model classes read off that module is read off it still, on the meta device, where it was
    built and stays: plain facts such as a layer's kind of attention, or weights to be initialised.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_module" not in self.__dict__:
                raise
            return getattr(self.__dict__["_module"], name)


class _Passed(_StandIn):
    """In place of a layer: returns its input, or the tensor that was put ``instead``, in a tuple of
    ``outputs`` values where layers do so."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__(layer)
        self.outputs = outputs
        self.instead: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.instead is None else self.instead
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


class _Absent(_StandIn):
    """In place of a module with weights outside the layers: returns its input, or for an embedding
    nothing, in its shape. What is made of it is replaced at the first layer.

    An embedding that is not looked up by token ids (but by a length, say) gave so many ``axes`` to
    the whole model, and gives here what extends to any shape that has them.

    Attributes:
        device: of what it gives.
    """

    def __init__(self, module: nn.Module, axes: int = 0) -> None:
        super().__init__(module)
        self.device = META
        self.columns, self.axes = 0, axes
        if isinstance(module, nn.Embedding):
            self.columns, self.dtype = module.embedding_dim, module.weight.dtype

    def forward(self, given: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self.columns:
            return given
        by_ids = isinstance(given, Tensor) and not given.is_floating_point()
        shape = given.shape if by_ids and given.ndim + 1 == self.axes else (1,) * (self.axes - 1)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return zero.expand(*shape, self.columns)


def _stand_ins(module: nn.Module, units: range, anatomy: Anatomy) -> dict[str, nn.Module]:
    """What takes the place of the modules that other segments than that of ``units`` hold."""
    found: dict[str, nn.Module] = {
        anatomy.layer(index): _Passed(module.get_submodule(anatomy.layer(index)), anatomy.outputs)
        for index in range(anatomy.count)
        if index not in units
    }
    kept = anatomy.outside(units)
    # A tie is resolved by HF, from whichever of the two a checkpoint has.
    if anatomy.tied and kept & {anatomy.embedding, anatomy.head}:
        kept |= {anatomy.embedding, anatomy.head}
    for name in sorted((anatomy.early | anatomy.late | anatomy.idle) - kept):
        # What stands below another one that goes, goes with it; above one that stays, stays.
        goes = any(name.startswith(f"{other}.") for other in found)
        if not goes and not any(other.startswith(f"{name}.") for other in kept):
            found[name] = _Absent(module.get_submodule(name), anatomy.axes.get(name, 0))
    return found


def _prune(module: Any, units: range, anatomy: Anatomy) -> None:
    """Replace what other segments hold, before anything is loaded."""
    for name, stand_in in _stand_ins(module, units, anatomy).items():
        _replace(module, name, stand_in)
    there = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.all_tied_weights_keys = {
        target: source
        for target, source in module.all_tied_weights_keys.items()
        if target in there and source in there
    }


def _try_cuts(whole: nn.Module, anatomy: Anatomy, directory: Path) -> None:
    """Run the model once more on the meta device, cut into first, middle and last layers.

    Raises:
        UserError: a segment fails that is a part of a model that ran whole.
    """
    count = anatomy.count
    parts = {
        "first": range(1), "middle": range(1, count - 1), "last": range(max(1, count - 1), count),
    }  # fmt: skip
    hidden: Tensor | None = None
    for part, units in parts.items():
        if not units:
            continue
        stand_ins = _stand_ins(whole, units, anatomy)
        held = {name: whole.get_submodule(name) for name in stand_ins}
        for name, stand_in in stand_ins.items():
            _replace(whole, name, stand_in)
        try:
            hidden = HFSegment(whole, units, anatomy).rehearse(hidden)
        except Exception as error:
            # Foreign code, as in finding the parts.
            got = f"{part} layers that fail alone: {type(error).__name__}: {error}"
            raise refused(whole, directory, got) from error
        finally:
            for name, module in held.items():
                _replace(whole, name, module)


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, by)


def _read_config(directory: Path, trust_remote_code: bool) -> Any:
    path = directory / "config.json"
    if not directory.is_dir() or not any(directory.iterdir()):
        raise UserError(
            f"model {directory}",
            "a directory with an HF config.json and safetensors, or package.module:factory",
            "an empty directory" if directory.is_dir() else "no such directory",
            "Check the path of the model.",
        )
    if not path.is_file():
        raise UserError(
            f"model {directory}",
            "config.json",
            "no such file",
            "Save the model with save_pretrained, or give package.module:factory.",
        )
    wanted = f"a configuration that transformers {transformers.__version__} knows"
    # Each architecture checks its own fields, with errors of several libraries.
    code = nothing_from_outside(path, trust_remote_code)
    with user_errors(str(path), wanted, AS_FACTORY, Exception), code:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Where its code lies, if it has any: whatever the file says of that.
    config._name_or_path = str(directory)
    plain_implementations(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            str(path),
            "weights in floating point",
            "a quantised checkpoint (quantization_config)",
            "Curvature is of the weights that gradients reach: use the unquantised checkpoint.",
        )
    return config


def _causal_model(config: Any, directory: Path, trust_remote_code: bool) -> nn.Module:
    """The whole model on the meta device."""
    path, wanted = directory / "config.json", "the configuration of a causal language model"
    kinds = (ImportError, ValueError, KeyError, TypeError, RuntimeError)
    code = nothing_from_outside(path, trust_remote_code)
    with user_errors(str(path), wanted, AS_FACTORY, *kinds), META, _quiet(), code:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return cast(nn.Module, model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without HF's progress bars and load reports: what they tell is raised as errors here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
