"""A model in a directory with ``config.json``, with an HF checkpoint or without."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from raycurv.errors import UserError, shortened
from raycurv.hub import Snapshot
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.coverage import outermost
from raycurv.models.adapter import ADAPTER
from raycurv.models.anatomy import (
    META,
    Anatomy,
    NotCutError,
    find_anatomy,
    input_embedding,
    run_on_meta,
)
from raycurv.models.checkpoint import INDEX, SINGLE, Weights
from raycurv.models.checkpoint_files import TOKENIZER_FILES, CheckpointFile, hf_files
from raycurv.models.config_file import CONFIG, check_layers, read_content
from raycurv.models.config_print import config_print
from raycurv.models.dequantised import open_checkpoint
from raycurv.models.directories import check_directory, check_outline_directory
from raycurv.models.foreign_code import named_code, nothing_from_outside
from raycurv.models.hf_calls import further_inputs, keep_padding_apart, placeholders_of
from raycurv.models.hf_class import class_on_meta, library_errors, quiet, read_config
from raycurv.models.hf_segment import HFSegment, prune, try_cuts, untie
from raycurv.models.image_model import ImageSegment, image_inputs, layers_of, run_images_on_meta
from raycurv.models.model import Model, Outline, Segment
from raycurv.models.model_task import CAUSAL_LM, MASKED_LM, SEQ2SEQ, Task, class_names
from raycurv.models.pieces import Parts, Piece, Views
from raycurv.models.quantisation import Quantisation, copy_in_floating_point, descriptions
from raycurv.models.seq2seq_segment import Seq2SeqSegment, check_seq2seq, rehearse_seq2seq
from raycurv.models.stacked import stacked_parts
from raycurv.models.stored import (
    Patch,
    StoredWeight,
    no_tensor_of_its_own,
    replacements,
    shared_names,
)
from raycurv.models.unused import (
    FLAG,
    Known,
    allowed,
    listed,
    reason,
    refuse_missing,
    refuse_unused,
    unwrapped,
    wrapper_note,
)
from raycurv.models.whole_segment import WholeSegment, lists_of_layers, whole_anatomy

# What a model may make in memory beside its weights, such as tables of positions; a checkpoint that
# is larger may have as much as it has itself.
_MADE_BYTES = 256 << 20
_EMPTY = (
    "The weights were not gathered when they were saved: each process of DeepSpeed ZeRO-3 holds a "
    "part. Make them whole with zero_to_fp32.py, which lies beside such a checkpoint, or save "
    "again with stage3_gather_16bit_weights_on_model_save."
)


class HFOutline(Outline):
    """What the ``config.json`` in a directory says of a model, without weights.

    Opening it runs the architecture once on the meta device. UserError for no or an unknown
    configuration, a quantised checkpoint, or an architecture whose layers speak past the hidden
    states.
    """

    token_inputs = True
    any_length = True
    task: Task
    anatomy: Anatomy
    _skeleton: nn.Module | None
    # Patterns of names that the model's class knows to be of no use.
    _ignorable: tuple[str, ...] = ()

    def __init__(self, name: str, directory: Path, trust_remote_code: bool = False) -> None:
        self.name = name
        self.directory = directory
        self.trust_remote_code = trust_remote_code
        check_outline_directory(directory)
        self.content = read_content(directory)
        self.quantisation = Quantisation.of(self.content, str(directory / CONFIG))
        self.task, self.config = read_config(directory, self.content, trust_remote_code)
        # Before a model of it sets values.
        with library_errors(str(directory / CONFIG), "a configuration that can be written down"):
            self._configuration = config_print(self.config, next(descriptions(self.content), {}))
        whole = self._on_meta()
        anatomy = self._anatomy_of(whole)
        self.anatomy, self._skeleton = anatomy, whole
        self._ties = dict(getattr(whole, "all_tied_weights_keys", None) or {})
        self.units, self.width = anatomy.count, anatomy.travels.columns or None
        # Weights that multiply at each token: those of each layer, and the head's in the last.
        costs = [float(anatomy.numel[anatomy.layer(i)]) for i in range(self.units)]
        costs[-1] += anatomy.head_numel
        self.unit_costs = tuple(costs)
        self.default_scope = (f"{anatomy.layers}.",) if anatomy.cut else lists_of_layers(whole)
        self.tied_head = anatomy.head if anatomy.tied else None
        self.idle, self.held = anatomy.idle, anatomy.held
        if self.idle:
            names = [name for name, _ in whole.named_parameters()]
            run = [name for name in names if name.rpartition(".")[0] not in self.idle]
            idle = dict.fromkeys(outermost(name, run) for name in sorted({*names} - {*run}))
            self.notices += (f"not run with tokens, and not loaded: {', '.join(idle)}",)
        if self.task not in (CAUSAL_LM, MASKED_LM, SEQ2SEQ):
            self.classes, self.class_names = self.config.num_labels, class_names(self.config)
        if self.task.of_images:
            self.images = image_inputs(whole, self.config, directory)
            self.token_inputs = self.any_length = False
            self.default_scope = layers_of(whole)
            return
        text = self.config.get_text_config()
        self.max_positions = _longest(whole, getattr(text, "max_position_embeddings", None))
        self.vocab_size = getattr(text, "vocab_size", None)
        if not self.task.causal:
            self.takes = further_inputs(whole)
        if self.token_inputs:
            self.placeholders = placeholders_of(whole)
        if any((directory / file).is_file() for file in TOKENIZER_FILES):
            self.tokenizer_dir = str(directory)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeleton": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes of the directory's own can be named in no other process before it has opened it.
        if self._own_code:
            return _opened_again, (type(self), self._made_of(), self.name, self.snapshots)
        return super().__reduce_ex__(protocol)

    def _made_of(self) -> tuple[Any, ...]:
        """What it is opened by, in another process as well."""
        return self.name, self.directory, self.trust_remote_code

    @property
    def _own_code(self) -> list[str]:
        """What is named of the code of the directory, where that may run."""
        return named_code(self.directory / CONFIG) if self.trust_remote_code else []

    def _on_meta(self) -> nn.Module:
        return class_on_meta(
            self.task, self.config, self.content, self.directory, self.trust_remote_code
        )

    def _anatomy_of(self, whole: nn.Module) -> Anatomy:
        """Where the model may be cut; of no causal language model this may be nowhere."""
        causal = self.task.causal
        if self.task == SEQ2SEQ:
            check_seq2seq(whole, self.directory)
            self.notices += ("runs as one stage: an encoder with a decoder",)
        if self.task == SEQ2SEQ or self.task.of_images:
            return whole_anatomy(whole)
        try:
            found = find_anatomy(whole, self.config, self._stored_twice, self.directory, causal)
            try_cuts(whole, found, self.directory)
        except NotCutError as error:
            self.notices += (f"runs as one stage: {shortened(error.got, 120)}",)
            return whole_anatomy(whole)
        return found

    def _stored_twice(self, shape: torch.Size) -> bool:
        return False

    def skeleton(self) -> nn.Module:
        """The whole model on the meta device."""
        if self._skeleton is None:
            self._skeleton = self._on_meta()
        return self._skeleton

    def rehearse(self, skeleton: nn.Module, examples: int, tokens: int) -> bool:
        if self.task == SEQ2SEQ:
            return rehearse_seq2seq(skeleton, examples, tokens)
        if self.images is not None:
            run_images_on_meta(skeleton, examples, self.images)
            return True
        if self.anatomy.given is not None:
            run_on_meta(skeleton, examples, tokens, self.anatomy.given)
        return self.anatomy.given is not None

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


def _opened_again(
    kind: type[HFOutline], made_of: tuple[Any, ...], name: str, snapshots: tuple[Snapshot, ...]
) -> HFOutline:
    for snapshot in snapshots:
        snapshot.bring()
    found = kind(*made_of)
    found.name, found.snapshots = name, snapshots
    return found


class HFModel(HFOutline, Model):
    """A model in a directory with ``config.json`` and safetensors.

    Opening it resolves every weight against the checkpoint and runs the architecture once on the
    meta device, reading no weights: so a mistake shows before any stage starts, as a UserError (as
    for an outline; a weight missing or misshapen, a tensor that the model does not take, or a
    damaged file).

    Args:
        ignored: globs on the names of tensors that may be left unused.
    """

    # Files of adapters that are applied; they may lie beside the weights.
    _applied: Collection[Path] = ()

    def __init__(
        self,
        name: str,
        directory: Path,
        trust_remote_code: bool = False,
        ignored: Sequence[str] = (),
    ) -> None:
        check_directory(directory)
        self.ignored = tuple(ignored)
        super().__init__(name, directory, trust_remote_code)

    def _made_of(self) -> tuple[Any, ...]:
        return *super()._made_of(), self.ignored

    def _on_meta(self) -> nn.Module:
        self.checkpoint = open_checkpoint(self.directory, self.quantisation)
        path = str(self.directory / CONFIG)
        if not self.task.of_images:  # whose configurations count otherwise
            check_layers(self.content, self.checkpoint.entries, path)
        self.notices = (*self._about_files(), *self.checkpoint.notes)
        code = named_code(self.directory / CONFIG)
        if code and not self.trust_remote_code:
            about = "transformers' own class is used, and not the directory's code"
            self.notices += (f"{about} ({', '.join(code)})",)
        whole = super()._on_meta()
        self._class = type(whole)
        # The names as they are; or without a wrapper's, where these are the only difference.
        self._names = {key: key for key in self._given}
        try:
            found = self._loaded_on_meta()
        except UserError:
            names = unwrapped(self._given, whole.state_dict())
            if names is None:
                raise
            self._names = names
            found = self._loaded_on_meta()
            self.notices += (wrapper_note(names),)
        return found

    def _loaded_on_meta(self) -> nn.Module:
        """The whole model on the meta device, if each of its weights is there, and each tensor of
        the checkpoint in it, or known not to matter."""
        weights = Weights(self.checkpoint, META, self._names)
        whole = self._load(weights, torch.float32, None)
        self._used = weights.used
        self._parts = weights.parts_of(whole)
        twice = weights.lost(whole)
        if twice and len(self._parts) == len(dict(whole.named_parameters(remove_duplicate=False))):
            raise UserError(
                str(self._file()),
                "one tensor for each weight",
                f"several for some, of which these would be dropped: {listed(twice)}",
                "Take them out of the checkpoint.",
            )
        self._check_unused(whole)
        return whole.to(META)

    def _about_files(self) -> Iterator[str]:
        """Sort out the tensors that are given to the model; tells what lies beside them.

        Raises:
            UserError: files that make it unclear which model is meant.
        """
        there = sorted(path.name for path in self.directory.glob("*.safetensors"))
        beside = [name for name in there if name not in self.checkpoint.files]
        if self.directory / ADAPTER in self._applied:
            beside.remove(ADAPTER)
        if ADAPTER in beside and not allowed(ADAPTER, ADAPTER, self.ignored):
            raise UserError(
                f"model {self.directory}",
                "the weights of one model",
                f"an adapter ({ADAPTER}) beside the weights of its base",
                f"It would not be applied: give --adapter {self.directory} as well, or {FLAG} "
                f"{ADAPTER} for the base alone.",
            )
        if self.checkpoint.files == (SINGLE,) and (self.directory / INDEX).exists():
            if beside and not allowed(INDEX, INDEX, self.ignored):
                raise UserError(
                    f"model {self.directory}",
                    f"{SINGLE}, or the files of {INDEX}",
                    "both",
                    f"Move one of them away, or give {FLAG} {INDEX} to take {SINGLE}.",
                )
            yield f"{SINGLE} is read, not what {INDEX} names"
        if beside:
            yield f"not a part of the model: {listed(beside)}"
        unlisted = [k for k in self.checkpoint.unlisted if not allowed(k, k, self.ignored)]
        if unlisted:
            raise UserError(
                str(self.directory / INDEX),
                "every tensor of the files that it names",
                f"{len(unlisted)} that it does not list: {listed(unlisted)}",
                f"Copy the checkpoint again, or give {FLAG} GLOB to leave them out.",
            )
        left = set(self.checkpoint.unlisted)
        if left:
            yield f"left out, as {FLAG} says: {listed(left)}"
        self._given = tuple(key for key in self.checkpoint.entries if key not in left)

    def _pretrained(self, whole: Any) -> Iterator[str]:
        """Names of the weights that models of this kind have when they are pretrained, of which
        one for a task may have no use: BERT's pooler, say, and the heads beside it."""
        if self.task.causal:
            return
        for auto in (transformers.AutoModel, transformers.AutoModelForPreTraining):
            if type(self.config) in auto._model_mapping:
                wanted = "a configuration that its bare model takes"
                with library_errors(str(self.directory / CONFIG), wanted), META, quiet():
                    bare = auto.from_config(self.config, dtype=torch.float32)
                inside = type(bare).base_model_prefix if auto is transformers.AutoModel else ""
                for name, _ in bare.named_parameters():
                    yield f"{inside}.{name}" if inside else name

    def _check_unused(self, whole: nn.Module) -> None:
        """Refuse tensors that the model did not take, but those that are known not to matter, or
        that the user lets be; they are told."""
        used = set(self._used)
        unused = {name: key for name, key in self._names.items() if key not in used}
        if not unused:
            return
        entries = self.checkpoint.entries
        known = Known.of(whole, self._ignorable, self._pretrained(whole))
        left: dict[str, list[str]] = {}
        refused = []
        for name, key in unused.items():
            why = reason(name, entries[key], known)
            if not why and allowed(name, key, self.ignored):
                why = f"as {FLAG} says"
            if why:
                left.setdefault(why, []).append(key)
            else:
                refused.append(key)
        if refused:
            where, name = str(self._file()), self._class.__name__
            raise refuse_unused(where, {key: entries[key] for key in refused}, name)
        self.notices += tuple(f"not used: {listed(keys)} ({why})" for why, keys in left.items())

    def _stored_twice(self, shape: torch.Size) -> bool:
        stored = self.checkpoint.stored
        used = stored.keys() & set(self._used)
        prints = self.checkpoint.fingerprint(k for k in used if stored[k].shape == tuple(shape))
        return len(prints) > len({one["hash"] for one in prints.values()})

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        return self.checkpoint.fingerprint() | self._code_fingerprint()

    def configuration(self) -> dict[str, Any]:
        return self._configuration

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

    def build(self, units: range, dtype: torch.dtype, device: torch.device) -> Segment:
        assert 0 <= units.start < units.stop <= self.units and units.step == 1, units
        self._bring()
        weights = Weights(self.checkpoint, device, self._names | self._aliases(units))
        module = self._load(weights, dtype, units)
        # Weights are on the device already; this moves HF's own tables, without a cast.
        module.to(device)
        module.eval().requires_grad_(False)
        if self.task == SEQ2SEQ:
            return Seq2SeqSegment(module)
        if self.images is not None:
            return ImageSegment(module)
        return HFSegment(module, units, self.anatomy) if self.anatomy.cut else WholeSegment(module)

    def _aliases(self, units: range) -> dict[str, str]:
        """Of weights in some layers that are tied to those of other ones, the keys of these."""
        layers = f"{self.anatomy.layers}."
        return {
            target: self._parts[source].pieces[0].key
            for target, source in self._ties.items()
            if target.startswith(layers) and source.startswith(layers) and source in self._parts
            if self.unit_of(target) in units and self.unit_of(source) not in units
        }

    def stored(self, block: Block) -> StoredWeight:
        """Where the checkpoint keeps a block's weight, as the loader resolved its keys; UserError
        if it makes it of several tensors, or makes another weight of it."""
        entries = self.checkpoint.entries

        def parts_of(name: str) -> Parts:
            parts = self._parts.get(name) or self._stacked.get(name)
            if parts is None:
                raise no_tensor_of_its_own(
                    block, f"a {name} that transformers makes of other tensors of the checkpoint"
                )
            for piece in parts.pieces:
                users = self._users[piece.key]
                if sum(users.values()) > math.prod(entries[piece.key].shape):
                    others = [n for n in users if n not in (name, *shared_names(block))]
                    if others or not block.shared:
                        other = next(iter(others), name)
                        raise no_tensor_of_its_own(block, f"{piece.key}, which {other} is, too")
                elif block.shared:
                    raise no_tensor_of_its_own(block, "one that is stored for each of its modules")
            return parts

        return StoredWeight.among(entries, block, parts_of)

    @cached_property
    def _stacked(self) -> dict[str, Parts]:
        """The parameters that the loader made of several tensors."""
        entries, shown = self.checkpoint.entries, self._names

        def there(piece: Piece) -> bool:
            return piece.key in shown and entries[shown[piece.key]].shape == piece.whole

        return {
            name: parts.renamed(shown)
            for name, parts in stacked_parts(self.skeleton(), self._parts).items()
            if all(map(there, parts.pieces))
        }

    @cached_property
    def _users(self) -> dict[str, Counter[str]]:
        """Key -> how many of its numbers each parameter has."""
        users: dict[str, Counter[str]] = {}
        for name, parts in (*self._stacked.items(), *self._parts.items()):
            for piece in parts.pieces:
                users.setdefault(piece.key, Counter())[name] += piece.numel
        return users

    def block_weight(self, block: Block) -> Tensor:
        self._bring()
        return self.stored(block).matrix(self.checkpoint.read_part)

    def _bring(self) -> None:
        """Have the files on this machine, which need not be the one that opened them."""
        for snapshot in self.snapshots:
            snapshot.bring()

    def files(self, patches: Sequence[Patch] = ()) -> tuple[CheckpointFile, ...]:
        if self.quantisation is not None:
            method = self.quantisation.method
            raise UserError(
                f"model {self.directory}",
                "weights in floating point, which can be saved with others in their place",
                f"quantised ones ({method})",
                copy_in_floating_point(method),
            )
        return hf_files(self.checkpoint, replacements(self.stored, patches, self.checkpoint.read))

    def _load(self, weights: Weights, dtype: torch.dtype, units: range | None) -> nn.Module:
        """HF's own loading of the class, pruned to ``units`` if these are given."""
        base = self._class

        def init(module: Any, config: Any) -> None:
            base.__init__(module, config)
            if units is not None:
                prune(module, units, self.anatomy)
            # The weights of other segments are foreign here; what nobody takes is told elsewhere.
            self._ignorable = _ignorable(module)
            module._keys_to_ignore_on_load_unexpected = {".*"}
            module._may_miss = set(module._keys_to_ignore_on_load_missing or ())
            module._keys_to_ignore_on_load_missing = set()

        def before_missing_are_made(module: Any, missing: Any, *rest: Any, **more: Any) -> Any:
            self._check_missing(module, set(missing), weights)
            return cast(Any, base)._move_missing_keys_from_meta_to_device(
                module, missing, *rest, **more
            )

        # HF looks key renamings up by the name and module of the class.
        own = {"__init__": init, "_move_missing_keys_from_meta_to_device": before_missing_are_made}
        pruned = type(base.__name__, (base,), own | {"__module__": base.__module__})
        wanted = f"a checkpoint for {base.__name__} of transformers {transformers.__version__}"
        code = nothing_from_outside(self.directory / CONFIG, self.trust_remote_code)
        # On the meta device, what is cut or turned stays a view of the tensor that it is made of.
        views = Views() if weights.device.type == "meta" else nullcontext()
        with library_errors(f"model {self.directory}", wanted), quiet(), code, views:
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
        keep_padding_apart(module)
        # Whatever transformers would have made is an error before it is made.
        assert not info["mismatched_keys"], info["mismatched_keys"]
        made = {n for n, _ in module.named_parameters()} & set(info["missing_keys"])
        assert all(any(re.search(p, n) for p in module._may_miss) for n in made), made
        for name in made:
            module.get_parameter(name).requires_grad_(False)
        if units is not None:
            untie(module, units, self.anatomy)
        return cast(nn.Module, module)

    def _check_missing(self, module: Any, missing: set[str], weights: Weights) -> None:
        """Refuse weights that transformers would make itself, before it does.

        Args:
            module: on the meta device where a tensor was not loaded.
            missing: names of what was not loaded, or has another shape.
            weights: what was loaded from.
        """
        tied: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
        present = {n for n in (*tied, *tied.values()) if n not in missing}
        # Any of the names of one weight is enough.
        roots = {tied.get(name, name) for name in present}
        allowed_to = [re.compile(pattern) for pattern in module._may_miss]
        parameters = dict(module.named_parameters(remove_duplicate=False))
        tables = dict(module.named_buffers())
        absent = []
        for name in sorted(missing):
            if tied.get(name, name) in roots:
                continue
            tensor = parameters.get(name)
            # A table that the class computes, and nobody trains.
            computed = tensor is None or not tensor.requires_grad
            if computed and any(pattern.search(name) for pattern in allowed_to):
                continue
            shape = tuple((tables[name] if tensor is None else tensor).shape)
            self._check_shape(name, shape)
            absent.append(name)
        if absent:
            entries = self.checkpoint.entries
            used = set(weights.used)
            unused = {k: entries[k] for k in weights.keys_by_name.values() if k not in used}
            raise refuse_missing(str(self._file()), absent, unused, self._class.__name__)
        made = sum(table.nbytes for table in tables.values() if table.is_meta)
        stored = sum(entry.nbytes for entry in self.checkpoint.entries.values())
        if made > max(_MADE_BYTES, stored):
            raise UserError(
                str(self.directory / CONFIG),
                f"tables of at most {max(_MADE_BYTES, stored):,} bytes beside the weights",
                f"{made:,} bytes",
                "Correct the numbers of positions in config.json.",
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is there under the name of a weight, in another shape."""
        for shown, key in self._names.items():
            entry = self.checkpoint.entries[key]
            if not (shown == name or name.endswith(f".{shown}") or shown.endswith(f".{name}")):
                continue
            if entry.shape == shape:
                continue
            empty = 0 in entry.shape
            wrong = [n for n, (a, b) in enumerate(zip(entry.shape, shape, strict=False)) if a != b]
            fields = _fields_of(self.config, {shape[n] for n in wrong})
            raise UserError(
                f"{entry.file}, tensor {key}",
                f"shape {list(shape)}, as config.json says",
                f"{list(entry.shape)}",
                _EMPTY
                if empty
                else "The configuration and the weights belong to different models"
                + (f": see {' and '.join(fields)} in config.json." if fields else "."),
            )

    def _file(self) -> Path:
        """The file of all weights, or the directory of several."""
        files = {entry.file for entry in self.checkpoint.entries.values()}
        return Path(files.pop()) if len(files) == 1 else self.directory


def _ignorable(module: Any) -> tuple[str, ...]:
    """Patterns of names that a class of transformers knows to be of no use."""
    return tuple(module._keys_to_ignore_on_load_unexpected or ())


def _longest(whole: Any, positions: int | None) -> int | None:
    """The longest text that a table of so many positions serves: those of some models begin behind
    the number of the padding. ``None`` for any."""
    for module in whole.modules():
        table = isinstance(module, nn.Embedding) and module is not input_embedding(whole)
        if table and module.num_embeddings == positions and module.padding_idx is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return None if positions is None or positions < 1 else positions


def _fields_of(config: Any, sizes: set[int]) -> list[str]:
    """Fields of a configuration that have one of these sizes, at most three."""
    fields = vars(config.get_text_config()).items()
    return sorted(name for name, value in fields if type(value) is int and value in sizes)[:3]
