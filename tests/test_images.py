"""Images in data: prepared as the model directory's own processor says, or refused by name."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ConvNextImageProcessorPil, ViTImageProcessorPil

from raycurv.data import images
from raycurv.data.images import LazyImages
from raycurv.data.reading import ExampleReader
from raycurv.errors import UserError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PLAIN = {"image_mean": MEAN, "image_std": STD}


def picture(mode: str = "RGB", size: tuple[int, int] = (7, 5), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **more)
    return target.getvalue()


def saved(folder: Path, make: Callable[..., Any] = ViTImageProcessorPil, **settings: Any) -> Path:
    """A directory with an image processor."""
    make(**PLAIN | settings).save_pretrained(folder)
    return folder


def turned(image: Image.Image) -> bytes:
    """A JPEG whose metadata say that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(image, "JPEG", quality=95, exif=exif)


def claiming(width: int, height: int) -> bytes:
    """A PNG file whose first bytes say another size than it has."""
    data = file_of(picture())
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


# A file, and the upright picture of 8 bits in three colours that it stands for.
FILES: dict[str, Callable[[], tuple[bytes, Image.Image]]] = {
    **{
        kind: lambda kind=kind: (
            file_of(picture(), kind, **({"lossless": True} if kind == "WEBP" else {})),
            picture(),
        )
        for kind in ("PNG", "WEBP", "BMP")
    },
    "grey": lambda: (file_of(picture("L")), picture("L").convert("RGB")),
    "palette": lambda: (file_of(picture("P")), picture("P").convert("RGB")),
    "transparent": lambda: (file_of(picture("RGBA")), picture("RGBA").convert("RGB")),
    "on its side": lambda: (
        turned(picture()),
        Image.open(io.BytesIO(turned(picture()))).transpose(Image.Transpose.ROTATE_270),
    ),
}
PROCESSORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ViT": (ViTImageProcessorPil, {"size": {"height": 6, "width": 4}}),
    "ConvNeXT": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 4}, "crop_pct": 0.8}),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_pixels_are_those_of_the_processor_for_the_upright_picture(
    tmp_path: Path, file: Any, processor: Any
) -> None:
    folder, (data, upright) = saved(tmp_path, processor[0], **processor[1]), file()
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    want = own(images=[upright], return_tensors="np")["pixel_values"][0]
    found = LazyImages(folder, 3)
    got = found.pixels(data, "row 0")
    assert got.dtype == np.float32 and np.array_equal(got, want)
    # Control: of the picture as it is stored, or of another one, they are others.
    assert not np.array_equal(found.pixels(file_of(picture(seed=1)), "row 1"), want)
    assert found.describe()["class"] == type(own).__name__


def test_pixels_are_what_the_settings_say_by_hand(tmp_path: Path) -> None:
    got = LazyImages(saved(tmp_path, do_resize=False), 3).pixels(file_of(picture()), "row 0")
    numbers = np.asarray(picture()).transpose(2, 0, 1) / 255.0
    want = (numbers - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert np.abs(got - want).max() < 1e-6
    grey = saved(tmp_path / "grey", do_resize=False, image_mean=[0.4], image_std=[0.2])
    one = LazyImages(grey, 1).pixels(file_of(picture("L")), "row 0")
    assert np.abs(one - (np.asarray(picture("L"))[None] / 255.0 - 0.4) / 0.2).max() < 1e-6


SIXTEEN = Image.fromarray(np.full((4, 4), 3000, np.uint16))
# What is wrong: a file, settings of the processor, and what the message says.
REFUSED: dict[str, tuple[Callable[[], bytes], dict[str, Any], str]] = {
    "no image": (lambda: b"GIF89a and more", {}, "image file"),
    "cut off": (lambda: file_of(picture(size=(90, 90)))[:-300], {}, "whole bytes"),
    "a format of many pictures": (lambda: file_of(picture("P"), "GIF"), {}, "JPEG, PNG"),
    "a program": (lambda: file_of(picture(), "EPS"), {}, "JPEG, PNG"),
    "16 bits": (lambda: file_of(SIXTEEN), {}, "mode I;16"),
    "a bomb": (lambda: claiming(10_000, 10_000), {}, "got one of 100,000,000"),
    "one that Pillow tells": (lambda: claiming(20_000, 20_000), {}, "bomb"),
    "a thread": (lambda: file_of(Image.new("1", (20_000, 1))),
                 {"size": {"shortest_edge": 224}}, "got one resized to"),
    "a huge result": (lambda: file_of(picture()), {"size": {"height": 9, "width": 10**6}},
                      "sizes from 1 to 4,096"),
    "a crop of nothing": (lambda: file_of(picture()), {"crop_size": {"height": 0, "width": 0},
                          "size": {"height": 0, "width": 0}}, "sizes from 1 to 4,096"),
    "no spread": (lambda: file_of(picture()), {"image_std": [0.0, 1.0, 1.0]}, "finite numbers"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_an_image_that_cannot_be_taken_is_named(tmp_path: Path, case: Any) -> None:
    file, settings, said = case
    data, found = file(), LazyImages(saved(tmp_path, **settings), 3)
    with pytest.raises(UserError, match=said):
        found.pixels(data, "row 3")


def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    real = Image.core.new  # type: ignore[attr-defined]

    def counted(mode: str, size: tuple[int, int]) -> Any:
        loaded.append(size[0] * size[1])
        return real(mode, size)

    data = file_of(Image.new("1", (9000, 9000)))
    assert len(data) < 20_000
    monkeypatch.setattr(Image.core, "new", counted)
    found = LazyImages(saved(tmp_path), 3)
    found.pixels(file_of(picture()), "row 0")
    before = list(loaded)
    with pytest.raises(UserError, match="pixels"):
        found.pixels(data, "row 1")
    assert loaded == before
    monkeypatch.setattr(images, "IMAGE_BYTES", 100)
    with pytest.raises(UserError, match="MiB"):
        found.pixels(data, "row 1")


def test_a_directory_without_a_processor_that_is_known_is_named(tmp_path: Path) -> None:
    def said(folder: Path, channels: int = 3) -> str:
        with pytest.raises(UserError) as caught:
            LazyImages(folder, channels).pixels(file_of(picture()), "row 0")
        return str(caught.value)

    assert "preprocessor_config.json" in said(tmp_path)
    assert "4 channels" in said(tmp_path, 4)
    path = tmp_path / "preprocessor_config.json"
    for content in (
        {"image_processor_type": "NoSuchProcessor"},
        {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}},
    ):
        path.write_text(json.dumps(content))
        (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
        assert str(path) in said(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    assert "preprocessor_config.json" in said(tmp_path)


def test_without_pillow_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = LazyImages(saved(tmp_path), 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"raycurv\[images\]"):
        found.pixels(file_of(picture()), "row 0")


# In data ------------------------------------------------------------------------------------


def read(table: pa.Table, folder: Path, **more: Any) -> list[Any]:
    how = {"vocab_size": None, "max_positions": None, "token_inputs": False} | more
    return list(ExampleReader(table, None, images=LazyImages(folder, 3), **how).examples())


def test_bytes_and_structs_and_pixel_values_are_the_same_examples(tmp_path: Path) -> None:
    folder = saved(tmp_path, size={"height": 4, "width": 6})
    files = [file_of(picture(seed=n, size=(5 + n, 9))) for n in range(3)]
    labels = pa.array([2, 0, 1])
    structs = pa.array([{"bytes": file, "path": f"{n}.png"} for n, file in enumerate(files)])
    found = {
        "struct": read(pa.table({"image": structs, "labels": labels}), folder),
        "binary": read(pa.table({"image": pa.array(files), "labels": labels}), folder),
        "view": read(pa.table({"image": pa.array(files, pa.binary_view())}), folder),
    }
    pixels = [example.inputs for example in found["struct"]]
    numbers = pa.array([p.tolist() for p in pixels], pa.list_(pa.list_(pa.list_(pa.float32()))))
    found["numbers"] = read(pa.table({"pixel_values": numbers, "labels": labels}), folder)
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for n, want in enumerate(pixels):
        assert want.shape == (3, 4, 6)
        direct = own(images=[Image.open(io.BytesIO(files[n]))], return_tensors="np")
        assert np.array_equal(want, direct["pixel_values"][0])
        assert all(np.array_equal(examples[n].inputs, want) for examples in found.values())
    assert [int(example.labels) for example in found["struct"]] == [2, 0, 1]


def test_images_that_become_others_or_lie_elsewhere_are_named(tmp_path: Path) -> None:
    plain = saved(tmp_path, do_resize=False)
    file = file_of(picture())
    other = file_of(picture(size=(6, 5)))
    cases = (
        (pa.table({"image": [file, other]}), {}, r"row 1.*\[3, 5, 7\].*\[3, 5, 6\]"),
        (pa.table({"image": ["a.png"]}), {}, "bytes of image files"),
        (pa.table({"image": [{"bytes": None, "path": "a.png"}, {"bytes": file, "path": ""}]}), {},
         "row 0.*none"),
        (pa.table({"image": [file], "loss_mask": [[1]]}), {}, "`loss_mask` beside `image`"),
        (pa.table({"text": ["a cat"]}), {}, "`inputs` or `pixel_values` or `image`"),
    )  # fmt: skip
    for table, more, said in cases:
        with pytest.raises(UserError, match=said):
            read(table, plain, **more)
    # Control: a model that takes no images does not decode any.
    with pytest.raises(UserError, match="a column `inputs`"):
        list(ExampleReader(cases[0][0], None, None, None, token_inputs=False).examples())
    assert torch.tensor(read(pa.table({"image": [file]}), plain)[0].inputs).shape == (3, 5, 7)
