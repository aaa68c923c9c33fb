"""What ``config.json`` says of quantised weights: how each of them is stored.

A quantised weight is made of numbers of few bits, one scale for all numbers of a cell, and for some
formats a zero point beside each scale: ``w = (q - z) · s``. Understood are

- ``fp8`` of transformers (DeepSeek-V3, Qwen3), ``mxfp8`` and ``fbgemm_fp8``: 8-bit floating point,
  cells of some rows and columns, of a row, or of the whole matrix;
- ``compressed-tensors``: 8-bit floating point, integers of a byte, and integers of 1 to 8 bits that
  are packed into words of 32; https://github.com/vllm-project/compressed-tensors
- ``mxfp4`` (gpt-oss): 4-bit floating point, two to a byte, cells of 32 numbers of a row.

Only weights count here. Where a format quantises what goes into a layer, too, that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raycurv.errors import UserError, shortened
from raycurv.models.patterns import is_bounded

COMPRESSED = "compressed-tensors"
# What a description of compressed tensors may say; of others nothing follows where they are empty.
_KNOWN = {
    "quant_method", "format", "quantization_status", "config_groups", "kv_cache_scheme", "ignore",
    "sparsity_config", "global_compression_ratio", "version", "dequantize", "run_compressed",
    "use_optimized_inference",
}  # fmt: skip
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_MIXED = "mixed-precision"
# Rows and columns of a cell that transformers take for granted.
_BLOCKS = {"fp8": (128, 128), "mxfp8": (1, 32)}
_SAVED = "save_pretrained(NEW, save_original_format=False)"
_DEQUANTISED = f"from_pretrained(DIR, quantization_config={{}}(dequantize=True)).{_SAVED}"
# How transformers make a copy in floating point, of the methods that it can.
_COPIES = {
    COMPRESSED: _DEQUANTISED.format("CompressedTensorsConfig"),
    "mxfp4": _DEQUANTISED.format("Mxfp4Config"),
    **{one: _DEQUANTISED.format("FineGrainedFP8Config") for one in _BLOCKS},
    "bitsandbytes": f"model = from_pretrained(DIR); model.dequantize(); model.{_SAVED}",
}

# Rows and columns of the numbers that share a scale; ``None`` for all there are.
Cell = tuple[int | None, int | None]
_WHOLE: Cell = (None, None)


@dataclass(frozen=True)
class Scheme:
    """How some of the weights are stored.

    Attributes:
        cells: of the numbers that share a scale; of several the shape of the scales tells which.
        bits: of a number, where numbers are packed.
        symmetric: whether there may be no zero points.
    """

    cells: tuple[Cell, ...]
    bits: int = 8
    symmetric: bool = True


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: as ``quant_method`` says.
        schemes: each with the names of the modules that it is of: a name, ``re:`` and a pattern, or
            a class.
        path: of the ``config.json``, for errors.
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    path: str

    @classmethod
    def of(cls, content: Mapping[str, Any], path: str) -> Quantisation | None:
        """What a configuration says; ``None`` where weights are stored as floating point.

        Compressed tensors say what is compressed: without groups of quantised weights, and with
        sparse ones in the dense format, the tensors are those of the model.

        Raises:
            UserError: a format that is not understood, or a description that is none.
        """
        found = []
        for said in descriptions(content):
            if not isinstance(said, Mapping):
                raise _unclear(path, shortened(repr(said)))
            default = COMPRESSED if said.keys() <= _KNOWN else None
            method = said.get("quant_method", default)
            if not isinstance(method, str):
                raise _unclear(path, f"quant_method {shortened(repr(method))}")
            found.append(cls(method, tuple(_schemes(said, method, path)), path))
        found = [one for one in found if one.schemes]
        if any(one != found[0] for one in found):
            raise _unclear(path, "two that differ")
        return found[0] if found else None

    def scheme(self, module: str) -> Scheme:
        """How the weight of a module is stored: by its name, a pattern, or else its class (what is
        quantised is of the class that is named).

        Raises:
            UserError: none is of it, or several that differ.
        """
        if all(scheme == self.schemes[0][1] for _, scheme in self.schemes):
            return self.schemes[0][1]

        def named(target: str) -> bool:
            return target == module

        def matched(target: str) -> bool:
            return target.startswith("re:") and bool(re.match(target[3:], module))

        def of_class(target: str) -> bool:
            return target.isidentifier()

        for fits in (named, matched, of_class):
            found = {s for targets, s in self.schemes if any(fits(target) for target in targets)}
            if found:
                break
        if len(found) != 1:
            raise UserError(
                f"{self.path}, quantization_config",
                f"one group of quantised weights for {module}",
                f"{len(found)} that differ" if found else "none",
                "Take config.json from where the model was saved.",
            )
        return found.pop()


def copy_in_floating_point(method: str) -> str:
    """The sentence that says how to get a checkpoint's weights in floating point."""
    how = _COPIES.get(method)
    if how is None:
        return "Use the checkpoint that this one was quantised from."
    return f"Make a copy in floating point with transformers' class of the model: {how}."


def descriptions(content: Mapping[str, Any]) -> Iterator[Any]:
    text = content.get("text_config")
    for part in (content, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                yield part[key]


def _schemes(
    said: Mapping[str, Any], method: str, path: str
) -> Iterator[tuple[tuple[str, ...], Scheme]]:
    if method == COMPRESSED:
        yield from _compressed(said, path)
    elif method in _BLOCKS:
        block = said.get("weight_block_size", "")
        cells: tuple[Cell, ...] = (_WHOLE, _BLOCKS[method])
        if block != "":
            cells = (_WHOLE if block is None else _pair(block, "weight_block_size", path),)
        yield (), Scheme(cells)
    elif method == "fbgemm_fp8":
        yield (), Scheme(((1, None),))
    elif method == "mxfp4":
        yield (), Scheme(((1, 32),), bits=4)
    else:
        raise UserError(
            f"{path}, quantization_config",
            "weights in floating point, or quantised in a way that is dequantised on loading: "
            f"{', '.join((*_BLOCKS, 'fbgemm_fp8', 'mxfp4', COMPRESSED))}",
            f"a quantised checkpoint of {shortened(method, 40)}",
            copy_in_floating_point(method),
        )


def _compressed(said: Mapping[str, Any], path: str) -> Iterator[tuple[tuple[str, ...], Scheme]]:
    """The schemes of compressed tensors, in the words of their library."""
    strange = sorted(key for key in said.keys() - _KNOWN if said[key])
    if strange:
        raise _foreign(path, f"{shortened(strange[0])}, which changes what the weights are")
    sparse = said.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise _foreign(path, f"sparsity_config {shortened(repr(sparse))}")
    groups = said.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise _unclear(path, f"config_groups {shortened(repr(groups))}")
    for name, group in groups.items():
        where = f"config_groups.{shortened(name, 40)}"
        if not isinstance(group, Mapping):
            raise _foreign(path, f"{where} {shortened(repr(group))}")
        weights, targets = group.get("weights"), group.get("targets")
        if weights is None:
            continue
        if not isinstance(weights, Mapping) or not isinstance(targets, list):
            raise _unclear(path, f"{where} {shortened(repr(group))}")
        if not _are_targets(targets):
            raise _unclear(path, f"{where} with targets {shortened(repr(targets))}")
        stored = group.get("format") or said.get("format")
        if stored not in (*_FORMATS, _MIXED):
            raise _foreign(path, f"{where} in the format {shortened(repr(stored))}")
        yield tuple(targets), _scheme(weights, where, path)


def _scheme(weights: Mapping[str, Any], where: str, path: str) -> Scheme:
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if weights.get("actorder") in ("group", "dynamic", True):
        raise _foreign(path, f"{where} with columns in another order (actorder)")
    most = {"float": range(8, 9), "int": range(1, 9)}.get(str(kind), ())
    if type(bits) is not int or bits not in most:
        raise _foreign(path, f"{where} of {shortened(repr(kind))} in {shortened(repr(bits))} bits")
    if strategy == "group":
        cell: Cell = (1, _size(size, f"{where}, group_size", path))
    elif strategy == "block":
        block = weights.get("block_structure")
        block = block.split("x") if isinstance(block, str) else block
        cell = _pair(block, f"{where}, block_structure", path)
    elif strategy in ("tensor", "channel"):
        cell = _WHOLE if strategy == "tensor" else (1, None)
    else:
        raise _foreign(path, f"{where} with the strategy {shortened(repr(strategy))}")
    return Scheme((cell,), bits, weights.get("symmetric", True) is not False)


def _are_targets(targets: list[Any]) -> bool:
    """Whether they are texts, and the patterns among them end soon."""
    return all(
        isinstance(one, str) and (not one.startswith("re:") or is_bounded(one[3:]))
        for one in targets
    )


def _pair(value: Any, name: str, path: str) -> Cell:
    if not isinstance(value, list) or len(value) != 2:
        raise _unclear(path, f"{name} {shortened(repr(value))}")
    return _size(value[0], name, path), _size(value[1], name, path)


def _size(value: Any, name: str, path: str) -> int:
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise _unclear(path, f"{name} {shortened(repr(value))}")
    return value


def _foreign(path: str, got: str) -> UserError:
    """The error of compressed tensors that are not understood."""
    return UserError(
        f"{path}, quantization_config",
        f"compressed tensors in a format that is dequantised on loading ({', '.join(_FORMATS)})",
        got,
        copy_in_floating_point(COMPRESSED),
    )


def _unclear(path: str, got: str) -> UserError:
    return UserError(
        path,
        "quantization_config as the library that quantised the model writes it",
        got,
        "Take config.json from where the model was saved.",
    )
