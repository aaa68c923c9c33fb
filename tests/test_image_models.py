"""Classifiers of images from HF directories: held against transformers and autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from commands import run_here
from networks import shaken
from PIL import Image
from test_images import file_of, picture
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

import raycurv
from raycurv import UserError
from raycurv.driver.corpus import corpus_of_run
from raycurv.files.store import Store
from raycurv.models.opening import open_outline

HERE: dict[str, Any] = {"address": "none", "quiet": True, "dtype": "float64"}
NAMES = ["cat", "dog", "owl"]
LABELS = ["dog", "cat", "owl", "owl", "cat"]
EXACT = 1e-10
# A configuration, and what has no block by default.
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ViT": ("ViTConfig", {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "image_size": 8, "patch_size": 4,
    }, ["vit.embeddings.position_embeddings"]),
    "ResNet": ("ResNetConfig", {
        "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic",
    }, []),
    "ConvNext": ("ConvNextConfig", {
        "hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "patch_size": 2,
    }, []),
    "Swin": ("SwinConfig", {
        "image_size": 8, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2],
        "window_size": 2,
    }, ["swin.encoder.layers.*.blocks.*.attention.relative_position_bias."
        "relative_position_bias_table"]),
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """A tiny classifier of three classes, and its processor."""
    kind, settings, _ = FAMILIES[family]
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings, **names)
    shaken(AutoModelForImageClassification.from_config(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    return [picture(seed=n, size=(9, 6 + n)) for n in range(len(LABELS))]


def structs(labels: list[Any] = LABELS) -> pa.Table:
    """As data sets have them."""
    files = [{"bytes": file_of(one), "path": f"{n}.png"} for n, one in enumerate(pictures())]
    return pa.table({"image": pa.array(files), "label": labels})


def pixels(folder: Path) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(images=pictures(), return_tensors="pt")["pixel_values"]


def squared_norm(network: nn.Module, blocks: list[str], loss: torch.Tensor) -> float:
    weights = [p for name in blocks for p in network.get_submodule(name).parameters()]
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_transformers_and_autograd(
    tmp_path: Path, family: str
) -> None:
    folder = save(family, tmp_path / "model")
    run = raycurv.fit(folder, structs(), tmp_path / "run", fisher="empirical", **HERE)
    own = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()
    examples = run.examples().to_pylist()
    for row, image, label in zip(examples, pixels(folder).double(), LABELS, strict=True):
        logits = own(pixel_values=image[None]).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([NAMES.index(label)]))
        assert row["loss"] == pytest.approx(loss.item(), rel=EXACT) and row["tokens"] == 1
        want = squared_norm(own, run.block_names(), loss)
        assert row["gradient_sq_norm"] == pytest.approx(want, rel=EXACT)
        # Control: another class has another loss.
        wrong = nn.functional.cross_entropy(
            own(pixel_values=image[None]).logits, torch.tensor([(NAMES.index(label) + 1) % 3])
        )
        assert row["loss"] != pytest.approx(wrong.item(), rel=1e-3)
    facts = run.manifest.facts
    assert facts["capture_check"]["worst"] < 1e-9
    # All layers have blocks; tables of positions, and vectors, have none.
    assert list(facts["coverage"]["left_out"]) == FAMILIES[family][2]
    traces = sum(run.blocks()["trace"].to_pylist())
    assert traces == pytest.approx(np.mean([row["gradient_sq_norm"] for row in examples]))


def test_files_and_numbers_have_the_same_scores_in_a_command(
    tmp_path: Path,
) -> None:
    folder = save("ViT", tmp_path / "model")
    numbers = pixels(folder).double()
    nested = pa.list_(pa.list_(pa.list_(pa.float64())))
    values = pa.array(numbers.tolist(), nested)
    tables = {
        "image": structs(),
        "pixel_values": pa.table({"pixel_values": values, "label": LABELS}),
        "inputs": pa.table({"inputs": values, "labels": [NAMES.index(one) for one in LABELS]}),
    }
    found = []
    how: list[Any] = ["--address", "none", "--dtype", "float64"]
    for name, table in tables.items():
        data, out, scores = (tmp_path / f"{name}{end}" for end in (".parquet", "-run", "-scores"))
        # Labels are drawn by the ids, which would be named after the files.
        pq.write_table(table.append_column("id", pa.array(list("abcde"))), data)
        fitted = run_here("fit", ["--model", folder, "--data", data, "--out", out, *how])
        asked = ["--run", out, "--queries", data, "--train", data, "--out", scores]
        scored = run_here("influence", [*asked, "--rank", "full", *how])
        assert fitted.code == scored.code == 0, fitted.err + scored.err
        assert "torchvision" not in fitted.err
        found.append(raycurv.open_scores(scores).matrix()[0])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert np.abs(found[0]).min() > 0
    described = json.loads((tmp_path / "image-run/data/corpus.json").read_text())
    assert described["tokenizer"]["class"] == "ViTImageProcessorPil"
    # What is finished is held to the processor, where there were images.
    file = folder / "preprocessor_config.json"
    for changes, refused in (({"note": 1}, False), ({"image_mean": [0.1, 0.2, 0.3]}, True)):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        for name in ("inputs", "image"):
            given = ["--data", tmp_path / f"{name}.parquet", "--out", tmp_path / f"{name}-run"]
            done = run_here("fit", ["--model", folder, *given, *how])
            assert (done.code == 2) == (refused and name == "image"), done.err
    assert "the image processor is another one (preprocessor_config.json changed)" in done.err


def test_an_image_counts_as_so_many_tokens_as_its_model_has_places(tmp_path: Path) -> None:
    folder = save("ViT", tmp_path / "model")
    outline = open_outline(str(folder))
    # Four patches and a token of the class.
    assert outline.images is not None and outline.images.positions == 5
    scores = {}
    for size in (5, 10, 1000):
        done = raycurv.evaluate(folder, structs(), tmp_path / f"{size}", batch_tokens=size, **HERE)
        scores[size] = done.examples()["loss"].to_numpy()
    assert np.abs(scores[5] - scores[1000]).max() < 1e-12
    # Of each run, how many images its microbatches have.
    run = raycurv.fit(folder, structs(), tmp_path / "run", batch_tokens=10, **HERE)
    corpus = corpus_of_run(Store(run.path))
    assert [len(one) for one in corpus.plan(10)] == [2, 2, 1] and corpus.lengths.tolist() == [1] * 5


def test_what_a_model_of_images_cannot_take_is_named(tmp_path: Path) -> None:
    folder = save("ViT", tmp_path / "model")
    # An image as it is before it is prepared; as floats it is taken (and is of another size).
    bytes_of = pa.array([[[[0, 255, 1, 2]] * 4] * 3], pa.list_(pa.list_(pa.list_(pa.uint8()))))
    small = pa.array([[[[0.5] * 4] * 4] * 3], pa.list_(pa.list_(pa.list_(pa.float32()))))
    cases: dict[str, tuple[pa.Table, dict[str, Any]]] = {
        r"\[1, 3, 4, 4\].*preprocessor_config.json": (pa.table({"pixel_values": small}), {}),
        r"`pixel_values` as .* processor scales.* got whole numbers from 0 to 255": (
            pa.table({"pixel_values": bytes_of}),
            {},
        ),
        r"`inputs` as .* got whole numbers from 0 to 255": (pa.table({"inputs": bytes_of}), {}),
        r"a class of the model in `label`.*'cow'": (structs(["cow", *LABELS[1:]]), {}),
        r"`inputs` or `pixel_values` or `image`": (pa.table({"text": ["a cat"]}), {}),
        r"--objective causal-lm.*a classifier of images": (structs(), {"objective": "causal-lm"}),
        r"stage": (structs(), {"stages": 2}),
    }
    for n, (said, (table, settings)) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            raycurv.fit(folder, table, tmp_path / f"{n}", **HERE, **settings)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 10**6}))
    with pytest.raises(UserError, match=r"takes images of 3 x 1000000 x 1000000"):
        open_outline(str(folder))
