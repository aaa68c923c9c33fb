"""A network from an HF checkpoint, cut between its layers.

A segment is the whole HF class, with the layers of other segments replaced by modules that pass
their input on, so that masks, rotary tables, scalings and the head are HF's own code. What enters
a segment is put in by the layer before its first one; what leaves is caught behind its last one.
"""

from __future__ import annotations

import hashlib
import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from raycurv.batch import Batch
from raycurv.errors import RaycurvError, UserError, in_words, shortened
from raycurv.hub import Snapshot
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.coverage import outermost
from raycurv.models.adapter import ADAPTER
from raycurv.models.anatomy import (
    AS_FACTORY,
    META,
    TRIED,
    Anatomy,
    Made,
    NotCutError,
    find_anatomy,
    frozen,
    hidden_of,
    input_embedding,
    refused,
    run_on_meta,
)
from raycurv.models.architectures import task_of
from raycurv.models.checkpoint import INDEX, SINGLE, Weights
from raycurv.models.checkpoint_files import TOKENIZER_FILES, CheckpointFile, hf_files
from raycurv.models.config_file import CONFIG, check_layers, read_content
from raycurv.models.config_print import config_print
from raycurv.models.dequantised import open_checkpoint
from raycurv.models.directories import check_directory, check_outline_directory
from raycurv.models.foreign_code import (
    named_code,
    nothing_from_outside,
    plain_implementations,
)
from raycurv.models.hf_calls import (
    calling,
    further_inputs,
    given_beside,
    keep_padding_apart,
    options,
    padded_ids,
    placeholders_of,
)
from raycurv.models.image_model import (
    ImageSegment,
    image_inputs,
    layers_of,
    run_images_on_meta,
)
from raycurv.models.mixtures import take_own_forward
from raycurv.models.model import Model, Outline, Segment
from raycurv.models.model_task import CAUSAL_LM, MASKED_LM, SEQ2SEQ, Task, class_names, refined
from raycurv.models.pieces import Parts, Piece, Views
from raycurv.models.quantisation import (
    Quantisation,
    copy_in_floating_point,
    descriptions,
)
from raycurv.models.seq2seq_segment import Seq2SeqSegment, check_seq2seq, rehearse_seq2seq
from raycurv.models.stacked import stacked_parts
from raycurv.models.stored import (
    Patch,
    StoredWeight,
    no_tensor_of_its_own,
    replacements,
    shared_names,
)
from raycurv.models.travelling import leaves
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
        self.task, self.config = _read_config(directory, self.content, trust_remote_code)
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
        return _model_of(
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
            _try_cuts(whole, found, self.directory)
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
                str(self._file_of(None)),
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
                with library_errors(str(self.directory / CONFIG), wanted), META, _quiet():
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
            where, name = str(self._file_of(None)), self._class.__name__
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
                _prune(module, units, self.anatomy)
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
        with library_errors(f"model {self.directory}", wanted), _quiet(), code, views:
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
        if units is not None and self.anatomy.tied:
            # Either was there for HF to resolve the tie from both names.
            for name in {self.anatomy.embedding, self.anatomy.head} - self.anatomy.outside(units):
                if next(module.get_submodule(name).parameters(), None) is not None:
                    # A stand-in keeps what it stands for, which must not keep weights.
                    gone = module.get_submodule(name).to(META)
                    _replace(module, name, _Absent(gone, self.anatomy.made.get(name)))
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
        absent, made = [], 0
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
            raise refuse_missing(str(self._file_of(None)), absent, unused, self._class.__name__)
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
        self._entry = None if self.first else cast(_Passed, layers[units.start - 1])
        self._passed = nn.ModuleList(
            layer if isinstance(layer, _Passed) else _Passed(layer, outputs)
            for layer, outputs in zip(layers, anatomy.outputs, strict=True)
        )
        # In place of what runs before the layers alone, when the head runs.
        self._before = {
            name: _Absent(module.get_submodule(name), anatomy.made.get(name))
            for name in sorted(anatomy.early - anatomy.late if self.first and self.last else ())
        }
        weight = next(layers[units.start].parameters())
        self._stand_ins = [
            part
            for part in (*module.modules(), *self._passed, *self._before.values())
            if isinstance(part, _StandIn)
        ]
        for part in self._stand_ins:
            if isinstance(part, _Absent):
                part.to_give(weight.dtype, weight.device)
        # HF's eager attention takes its softmax in float32, where a mask of float64's lowest number
        # is -Inf: a padded row that sees only padding (sliding windows) becomes NaN and poisons
        # the rest. Padded on the right, no token of a causal model sees padding anyway.
        eager = getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
        self._masked = not (anatomy.causal and eager and weight.dtype == torch.float64)
        travels = anatomy.travels
        self._enters, self._leaves = travels.over(units.start), travels.over(units.stop)
        # Values that travel, of the forward under way, by number.
        self._values: dict[int, Tensor] = {}
        self._hidden: Tensor | None = None
        self._hooks = [layers[units.stop - 1].register_forward_hook(self._ended)]
        for index in range(units.start, anatomy.count):
            takes = {value for _, value in travels.taken[index]}
            if index in units and takes & set(self._enters):
                hook = self._filling(index)
            elif index not in units and takes & set(self._leaves):
                hook = self._collecting(index)
            else:
                continue
            self._hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))

    def forward(self, batch: Batch, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Hidden states ``[N, T, d]`` behind the last layer of the segment, and what travels
        with them; the first segment embeds ``batch.inputs``."""
        assert (hidden is None) == self.first, "the first segment, and only that, takes no hidden"
        with calling(self.module, batch.inputs):
            return self._run({"input_ids": batch.inputs, **self._beside(batch)}, hidden)

    def _beside(self, batch: Batch) -> dict[str, Any]:
        given = given_beside(self.module, batch)
        return given if self._masked else given | {"attention_mask": None}

    def rehearse(self, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What :meth:`forward` gives of a segment on the meta device, and the head in the last; its
        layers are left without hooks.

        Whatever stands in for other segments gives values that are marked by requiring a gradient,
        and nothing else does.

        Raises:
            MarkedError: such a value reached a layer of the segment, or what it gives.
        """
        given, problems = self._anatomy.given, list[str]()
        assert given is not None, "a forward that did not run"

        def watch(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for path, tensor in leaves((args, kwargs)):
                if tensor.requires_grad:
                    problems.append(f"called with learned values ({path[1]})")

        for layer in self._layers:
            if not isinstance(layer, _Passed):
                hook = layer.register_forward_pre_hook(watch, with_kwargs=True)
                self._hooks.append(hook)
        try:
            for stand_in in self._stand_ins:
                stand_in.marks = True
            with frozen(self.module):
                left = self._run(given.arguments(self.module, *TRIED), hidden)
                if any(tensor.requires_grad for tensor in left):
                    problems.append("with outputs that depend on other layers")
                if self.last:
                    rows, sizes = left[0], TRIED
                    if not self.pooled:
                        rows = rows.flatten(0, 1)[:, None]
                        sizes = len(rows), 1
                    if self._logits(rows, given.arguments(self.module, *sizes)).requires_grad:
                        problems.append("before logits that depend on more than its output")
        finally:
            for stand_in in self._stand_ins:
                stand_in.marks = False
            for hook in self._hooks:
                hook.remove()
        if problems:
            raise MarkedError(problems[0])
        return left

    @property
    def pooled(self) -> bool:
        return self._anatomy.pooled

    def head(self, part: Tensor, batch: Batch | None = None) -> Tensor:
        """Outputs of hidden states, differentiable in these: ``[N, t, V]`` of ``[N, t, d]`` at some
        positions, or where the head pools ``[N S, V]`` of the whole texts' ``[N S, T, d]``.

        HF's forward with every layer passed over. Behind the layers of a language model nothing
        looks from one position to another, so each position goes alone: no masks of t x t, no limit
        on N·t.
        """
        assert self.last, "only the last segment holds the head"
        with calling(self.module, part):
            if self.pooled:
                assert batch is not None
                # Some classes find the last token of a text by its id.
                ids = padded_ids(self.module, batch)
                return self._logits(part, {"input_ids": ids, **self._beside(batch)})
            rows = part.flatten(0, 1)[:, None]
            ids = torch.full(rows.shape[:2], self._no_padding, device=rows.device)
            logits = self._logits(rows, {"input_ids": ids})
        return logits.reshape(*part.shape[:2], -1)

    @property
    def _no_padding(self) -> int:
        """A token that is not the one of padding."""
        config: Any = self.module.config
        return int(getattr(config.get_text_config(), "pad_token_id", None) == 0)

    def _logits(self, rows: Tensor, given: dict[str, Any]) -> Tensor:
        """What the model gives where ``rows`` leave its layers: ``[R, 1, V]`` of hidden states
        ``[R, 1, ...]``, or where its head pools ``[N S, V]`` of ``[N S, T, d]``."""
        entry = cast(_Passed, self._passed[-1])
        hidden, _ = self._anatomy.travels.unpack((rows,), ())
        before = {name: self.module.get_submodule(name) for name in self._before}
        for name, stand_in in (self._before | {self._anatomy.layers: self._passed}).items():
            _replace(self.module, name, stand_in)
        entry.instead = hidden
        try:
            output = self.module(**given | options(self.module))
        finally:
            entry.instead = None
            for name, module in (before | {self._anatomy.layers: self._layers}).items():
                _replace(self.module, name, module)
        return cast(Tensor, output.logits)

    def _run(
        self, given: dict[str, Any], entering: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        travels = self._anatomy.travels
        self._values, self._hidden = {}, None
        if entering is not None:
            assert self._entry is not None
            self._entry.instead, self._values = travels.unpack(entering, self._enters)
        try:
            self.module(**given | options(self.module))
        except _Stop as stop:
            # The frames between hold activations that nothing else needs.
            traceback.clear_frames(stop.__traceback__)
            assert self._hidden is not None
            return travels.pack(self._hidden, [(v, self._values[v]) for v in self._leaves])
        finally:
            if self._entry is not None:
                self._entry.instead = None
            self._values, self._hidden = {}, None
        raise AssertionError("the forward did not come to the segment's last layer")

    def _ended(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Behind the segment's last layer."""
        self._hidden = hidden_of(output)
        self._stop()

    def _stop(self) -> None:
        """Leave the forward where all is there that leaves."""
        if self._values.keys() >= set(self._leaves):
            raise _Stop

    def _filling(self, index: int) -> Callable[..., Any]:
        """A hook before a layer of the segment, which is called with the values that entered."""

        def fill(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return self._anatomy.travels.put(index, (args, kwargs), self._values)

        return fill

    def _collecting(self, index: int) -> Callable[..., Any]:
        """A hook before a layer behind the segment, of whose arguments some leave."""

        def collect(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            missing = set(self._leaves) - self._values.keys()
            self._values |= self._anatomy.travels.found(index, (args, kwargs), missing)
            self._stop()

        return collect


class MarkedError(Exception):
    """What would not be the whole model's in a part of it: what a layer is called with, say."""


class _Stop(BaseException):
    """Leaves a forward. Not an ``Exception``: no handler on the way keeps it."""


class _StandIn(nn.Module):
    """In place of a module that another segment holds.

    What model classes read off that module is read off it still, on the meta device, where it was
    built and stays: plain facts such as a layer's kind of attention, or weights to be initialised.

    Attributes:
        marks: whether what it gives requires a gradient, for a trial.
    """

    marks = False

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
    ``outputs`` values where the layer does so."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__(layer)
        self.outputs = outputs
        self.instead: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.instead is None else self.instead
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


class _Absent(_StandIn):
    """In place of a module with weights outside the layers: gives nothing in the shape of what it
    gave to the whole model. What is made of it is replaced at the first layer."""

    def __init__(self, module: nn.Module, made: Made | None) -> None:
        super().__init__(module)
        self.made = made
        self.reading = False

    def to_give(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give what is of this dtype, on this device; the same in place of weights that are read
        off it, once the model is built."""
        self.dtype, self.device = dtype, device
        self.reading = True

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not isinstance(found, nn.Parameter) or not (found.is_meta and self.reading):
            return found
        return self._nothing(found.shape)

    def _nothing(self, shape: Sequence[int]) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device, requires_grad=self.marks)
        return zero.expand(*shape)

    def forward(self, given: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.made is None:
            return given
        shape: Sequence[int] = (1,) * (self.made.axes - 1)
        if isinstance(given, Tensor):
            # Token ids, and what is looked up by others (a length, say); or hidden states.
            like = given.shape[:-1] if given.is_floating_point() else given.shape
            if len(like) + 1 == self.made.axes:
                shape = like
        nothing = self._nothing((*shape, self.made.columns))
        return nothing.contiguous() if self.made.writes else nothing


def _stand_ins(module: nn.Module, units: range, anatomy: Anatomy) -> dict[str, nn.Module]:
    """What takes the place of the modules that other segments than that of ``units`` hold."""
    found: dict[str, nn.Module] = {
        anatomy.layer(index): _Passed(
            module.get_submodule(anatomy.layer(index)), anatomy.outputs[index]
        )
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
        stays = {*kept, f"{anatomy.layers}." if anatomy.cut else ""}
        if not goes and not any(other.startswith(f"{name}.") for other in stays):
            found[name] = _Absent(module.get_submodule(name), anatomy.made.get(name))
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
    """Run the first, a middle and the last layer on the meta device, each as a segment of its own;
    all of them where more than hidden states travels.

    Raises:
        UserError: a segment fails that is a part of a model that ran whole, or takes what is not
            the whole model's.
    """
    # One layer each, for all layers have run whole.
    count, more = anatomy.count, any(anatomy.travels.taken)
    tried = range(count) if more else sorted({0, min(1, count - 1), count - 1})
    hidden: tuple[Tensor, ...] | None = None
    for index in tried:
        units = range(index, index + 1)
        stand_ins = _stand_ins(whole, units, anatomy)
        held = {name: whole.get_submodule(name) for name in stand_ins}
        for name, stand_in in stand_ins.items():
            _replace(whole, name, stand_in)
        try:
            hidden = HFSegment(whole, units, anatomy).rehearse(hidden)
        except MarkedError as error:
            raise refused(whole, directory, f"layer {index} {error}") from error
        except Exception as error:
            # Foreign code, as in finding the parts.
            part = "last" if index + 1 == count else "first" if index == 0 else "middle"
            got = f"a {part} layer that fails alone: {type(error).__name__}: {error}"
            raise refused(whole, directory, got) from error
        finally:
            for name, module in held.items():
                _replace(whole, name, module)


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, by)


def _read_config(
    directory: Path, content: Mapping[str, Any], trust_remote_code: bool
) -> tuple[Task, Any]:
    path = str(directory / CONFIG)
    task = task_of(content, path, trust_remote_code)
    wanted = f"a configuration that transformers {transformers.__version__} knows"
    # Each architecture checks its own fields, with errors of several libraries.
    code = nothing_from_outside(directory / CONFIG, trust_remote_code)
    with library_errors(path, wanted, content), _quiet(), code:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Where its code lies, if it has any: whatever the file says of that.
    config._name_or_path = str(directory)
    plain_implementations(config)
    take_own_forward(config)
    # Outputs are taken by their names, whatever other callers are given.
    for part in (config, config.get_text_config()):
        part.return_dict = True
    # Weights come as floating point: their library has nothing to do.
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if getattr(part, name, None) is not None:
                delattr(part, name)
    return refined(task, config), config


def _model_of(
    task: Task, config: Any, content: Mapping[str, Any], directory: Path, trust_remote_code: bool
) -> nn.Module:
    """The whole model on the meta device."""
    path, wanted = directory / CONFIG, f"the configuration of {task.what}"
    code = nothing_from_outside(path, trust_remote_code)
    with library_errors(str(path), wanted, content), META, _quiet(), code:
        # Of models of images and text, too, text alone is a causal language model's.
        auto = getattr(transformers, task.auto)
        if task.causal and type(config) not in auto._model_mapping:
            others = (
                transformers.AutoModelForImageTextToText,
                transformers.AutoModelForMultimodalLM,
            )
            auto = next((a for a in others if type(config) in a._model_mapping), auto)
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        keep_padding_apart(model)
    return cast(nn.Module, model)


@contextmanager
def library_errors(
    where: str, expected: str, content: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Around foreign code that a model directory's content decides about: whatever it raises is
    about that, and those fields of ``content`` whose values it names are named with it."""
    try:
        yield
    except RaycurvError:
        raise
    except Exception as error:
        text = str(error)
        fields = [name for name, value in _texts(content or {}) if repr(value) in text][:3]
        see = f" (see {shortened(' and '.join(fields))})" if fields else ""
        raise UserError(
            where, expected, f"{type(error).__name__}: {in_words(error)}{see}", AS_FACTORY
        ) from error


def _texts(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of a configuration that are text, each with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value


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
