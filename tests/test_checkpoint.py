"""Claims about reading safetensors: the same numbers as the reference reader, damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raycurv.errors import UserError
from raycurv.models.checkpoint import (
    Checkpoint,
    Weights,
    check_finite,
    describe_tensor,
)

torch.set_num_threads(1)

TENSORS = {
    "f64": torch.randn(3, 5, dtype=torch.float64),
    "f32": torch.randn(7),
    "f16": torch.randn(2, 3, 4).to(torch.float16),
    "bf16": torch.randn(5, 5).to(torch.bfloat16),
    "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "i64": torch.arange(6).reshape(2, 3),
    "i8": torch.arange(5, dtype=torch.int8),
    "flag": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("key", sorted(TENSORS))
def test_a_tensor_is_read_as_it_was_saved(folder: Path, key: str) -> None:
    checkpoint = Checkpoint(folder)
    read = checkpoint.read(key)
    assert read.dtype == TENSORS[key].dtype == checkpoint.entries[key].dtype
    assert tuple(read.shape) == checkpoint.entries[key].shape == tuple(TENSORS[key].shape)
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (read, TENSORS[key])]
    assert torch.equal(*raw)


def test_each_read_has_memory_of_its_own(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    first, second = checkpoint.read("f32"), checkpoint.read("f32")
    first.zero_()
    assert torch.equal(second, TENSORS["f32"])
    assert torch.equal(checkpoint.read("f32"), TENSORS["f32"])
    assert first.untyped_storage().nbytes() == 7 * 4


def test_a_checkpoint_survives_pickling(folder: Path) -> None:
    checkpoint = pickle.loads(pickle.dumps(Checkpoint(folder)))
    assert torch.equal(checkpoint.read("bf16"), TENSORS["bf16"])


def test_reading_in_pieces_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycurv.models.checkpoint.PIECE_BYTES", 7)
    assert torch.equal(Checkpoint(folder).read("f64"), TENSORS["f64"])


def test_lazy_weights_read_only_what_is_asked_and_cast_it(folder: Path) -> None:
    weights = Weights(Checkpoint(folder), torch.device("cpu"))
    assert sorted(weights) == sorted(TENSORS) and len(weights) == len(TENSORS)
    assert weights["f64"].shape == (3, 5) and weights["f64"].dtype == torch.float64
    assert weights.used == []
    cast = weights["f64"][...].to(device="cpu", dtype=torch.bfloat16)
    assert torch.equal(cast, TENSORS["f64"].to(torch.bfloat16))
    assert weights.used == ["f64"]
    with pytest.raises(KeyError):
        weights["absent"]


def test_the_meta_device_reads_nothing(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    tensor = Weights(checkpoint, torch.device("meta")).load("f32", torch.float64)
    assert tensor.is_meta and tensor.shape == (7,) and tensor.dtype == torch.float64


def test_a_fingerprint_is_the_same_in_a_file_and_in_memory(tmp_path: Path) -> None:
    tensors = {"small": torch.randn(10), "large": torch.randn(300, 1000)}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    prints = Checkpoint(tmp_path).fingerprint()
    assert prints == {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    assert prints["large"]["shape"] == [300, 1000] and prints["large"]["dtype"] == "float32"


@pytest.mark.parametrize("where", [slice(0, 1), slice(-1, None), slice(None)])
def test_a_fingerprint_sees_both_ends_of_a_tensor_and_any_change_of_all(where: slice) -> None:
    tensor = torch.randn(300_000)
    other = tensor.clone()
    other[where] += 1
    assert describe_tensor(tensor)["hash"] != describe_tensor(other)["hash"]


def _index(folder: Path, placed: object) -> None:
    (folder / "model.safetensors.index.json").write_text(
        placed if isinstance(placed, str) else json.dumps(placed)
    )


def test_an_index_joins_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, str(tmp_path / "x.safetensors"))
    save_file({"b": torch.zeros(3)}, str(tmp_path / "y.safetensors"))
    _index(tmp_path, {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint.entries) == ["a", "b"]
    assert checkpoint.read("b").shape == (3,)
    assert checkpoint.entries["a"].file == str(tmp_path / "x.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _truncate_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"12345")


def _header(header: object) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGE = {
    "truncated in a tensor": (_truncate, "truncated inside tensor"),
    "truncated in the header": (_truncate_header, "truncated inside its header"),
    "bytes behind the end": (_lengthen, "5 bytes after the last tensor"),
    "empty file": (b"", "0 bytes"),
    "a pickle": (b"PK\x03\x04" + b"\xff" * 60, "header length"),
    "not JSON": (_header(b"{not json}") + bytes(8), "unreadable header"),
    "a list": (_header([1]) + bytes(8), "unreadable header"),
    "no offsets": (_header({"w": {"dtype": "F32", "shape": [2]}}) + bytes(8), "unreadable header"),
    "unknown dtype": (_header(_entry("F3")) + bytes(8), "unknown dtype F3"),
    "wrong length": (_header(_entry(shape=(3,))) + bytes(8), "8 bytes for shape [3]"),
    "negative shape": (_header(_entry(shape=(-2,))) + bytes(8), "shape [-2]"),
    "a hole": (_header(_entry(offsets=(4, 12))) + bytes(12), "instead of"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_a_damaged_file_is_an_error_that_names_it(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    if isinstance(damage, bytes):
        (folder / "model.safetensors").write_bytes(damage)
    else:
        damage(folder)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    assert message in str(caught.value) and "model.safetensors" in str(caught.value)


def test_a_file_that_shrinks_after_opening_is_an_error_that_names_the_tensor(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"tensor f64.*truncated"):
        checkpoint.read("f64")


INDICES = {
    "no such file": ({"weight_map": {"a": "gone.safetensors"}}, "the file gone.safetensors"),
    "no such tensor": ({"weight_map": {"b": "x.safetensors"}}, "tensor b"),
    "no map": ({"metadata": {}}, "weight_map"),
    "not JSON": ("{", "weight_map"),
    "map is a list": ({"weight_map": ["a"]}, "weight_map"),
}


@pytest.mark.parametrize("case", sorted(INDICES))
def test_a_wrong_index_is_an_error(tmp_path: Path, case: str) -> None:
    placed, message = INDICES[case]
    save_file({"a": torch.ones(2)}, str(tmp_path / "x.safetensors"))
    _index(tmp_path, placed)
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path)
    assert message in str(caught.value)


def test_a_directory_without_safetensors_is_an_error_that_says_what_is_there(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="a directory"):
        Checkpoint(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_an_error(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(9, dtype=dtype)
    check_finite(tensor, "here")
    tensor[4] = bad
    with pytest.raises(UserError, match=r"here.*NaN or Inf"):
        check_finite(tensor, "here")


def test_a_cast_that_overflows_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e30])}, str(tmp_path / "model.safetensors"))
    weights = Weights(Checkpoint(tmp_path), torch.device("cpu"))
    assert weights.load("w", torch.bfloat16).isfinite().all()
    with pytest.raises(UserError, match=r"tensor w.*float16"):
        weights.load("w", torch.float16)
