"""Every image gets a row, and the answer that the torch model gives it."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from mrl.data import Preprocess, read_image
from mrl.deploy.onnx import plain_float, to_onnx
from mrl.errors import ConfigError, ParityError
from mrl.export import export_model
from mrl.predict import find_images, open_exported, predict

CLASSES = ["crack", "good, clean", "unsure"]
PREPROCESS = Preprocess((32, 48), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bicubic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of several kinds, two that are none, and a text."""
    root = tmp_path_factory.mktemp("line3")
    rng = np.random.default_rng(0)
    (root / "lot 2").mkdir()
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(root / f"{i}.png")
    Image.fromarray(rng.integers(0, 65535, (50, 50), dtype=np.uint16)).save(root / "deep.png")
    Image.fromarray(rng.integers(0, 255, (50, 50), dtype=np.uint8)).save(root / "lot 2" / "grey.jpg")
    Image.fromarray(rng.integers(0, 255, (90, 30, 4), dtype=np.uint8)).save(root / "lot 2" / "clear.PNG")
    whole = (root / "lot 2" / "grey.jpg").read_bytes()
    (root / "lot 2" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a_text.png").write_text("no image")
    (root / "notes.txt").write_text("no image, and does not claim to be one")
    return root


@pytest.fixture(scope="module")
def model(folder) -> nn.Module:
    torch.manual_seed(3)
    net = timm.create_model("test_vit", img_size=(32, 48), num_classes=3)
    nn.init.normal_(net.head.weight, std=0.5)
    return net


@pytest.fixture(scope="module")
def exported(model, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.onnx"
    images = [PREPROCESS(read_image(folder / f"{i}.png")) for i in range(5)]
    export_model(model, path, preprocess=PREPROCESS, classes=CLASSES, images=images, meta={"arm": "mrl"})
    return path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


GOOD = [*(f"{i}.png" for i in range(7)), "deep.png", "lot 2/clear.PNG", "lot 2/grey.jpg"]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_predict__answers_are_the_models(exported, model, folder, tmp_path, batch_size):
    summary = predict(exported, folder, tmp_path / "x.csv", batch_size=batch_size)
    rows = {row["image"]: row for row in rows_of(tmp_path / "x.csv")}
    assert list(rows) == sorted([*GOOD, "a_text.png", "lot 2/cut.jpg"])
    plain = plain_float(model)
    for name in GOOD:
        with torch.no_grad():
            expected = torch.softmax(plain(PREPROCESS(read_image(folder / name))[None]), -1)[0].numpy()
        found = np.array([float(rows[name][f"p_{c}"]) for c in CLASSES])
        assert np.abs(found - expected).max() < 1e-5
        assert rows[name]["prediction"] == CLASSES[int(expected.argmax())]
        assert rows[name]["error"] == ""
    assert (summary["n_images"], summary["n_errors"], summary["not_images"]) == (12, 2, 1)
    assert sum(summary["classes"].values()) == len(GOOD)


def test_predict__unreadable_images_have_a_row_with_the_reason(exported, folder, tmp_path, capsys):
    summary = predict(exported, folder, tmp_path / "x.csv")
    rows = {row["image"]: row for row in rows_of(tmp_path / "x.csv")}
    for name in ("a_text.png", "lot 2/cut.jpg"):
        assert rows[name]["prediction"] == ""
        assert all(rows[name][f"p_{c}"] == "" for c in CLASSES)
        assert len(rows[name]["error"]) > 10
    assert "truncated" in rows["lot 2/cut.jpg"]["error"]
    assert [text.split(":")[0] for text in summary["errors"]] == ["a_text.png", "lot 2/cut.jpg"]
    said = capsys.readouterr().err
    assert "2 of 12 images have no answer" in said
    assert "1 files" in said


def test_predict__header_and_precision(exported, folder, tmp_path):
    predict(exported, folder / "3.png", tmp_path / "x.csv")
    text = (tmp_path / "x.csv").read_text().splitlines()
    assert text[0] == 'image,prediction,p_crack,"p_good, clean",p_unsure,error'
    (row,) = rows_of(tmp_path / "x.csv")
    values = [np.float32(row[f"p_{c}"]) for c in CLASSES]
    assert row["image"] == "3.png"
    assert sum(values) == pytest.approx(1, abs=1e-6)
    assert all(repr(float(v)) == row[f"p_{c}"] for v, c in zip(values, CLASSES, strict=True))


def test_predict__pattern_and_table_say_the_same(exported, folder, tmp_path):
    table = folder.parent / "list.csv"
    table.write_text(f"lot,path\nB,{folder.name}/1.png\nA,{folder.name}/0.png\nA,{folder.name}/none.png\n")
    predict(exported, table, tmp_path / "table.csv")
    predict(exported, f"{folder}/[01].png", tmp_path / "pattern.csv")
    table_rows, pattern_rows = rows_of(tmp_path / "table.csv"), rows_of(tmp_path / "pattern.csv")
    assert [row["image"] for row in table_rows] == [f"{folder.name}/{n}.png" for n in ("0", "1", "none")]
    assert "none.png" in table_rows[2]["error"]
    for one, other in zip(table_rows[:2], pattern_rows, strict=True):
        assert all(float(one[f"p_{c}"]) == pytest.approx(float(other[f"p_{c}"]), abs=1e-6) for c in CLASSES)


def test_predict__refuses_what_exists(exported, folder, tmp_path):
    (tmp_path / "x.csv").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        predict(exported, folder, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "mine"
    predict(exported, folder / "0.png", tmp_path / "x.csv", overwrite=True)
    assert len(rows_of(tmp_path / "x.csv")) == 1


def test_predict__stopped_half_way_leaves_nothing(exported, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mrl.predict.Exported.probabilities", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(exported, folder, tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []


def test_predict__changed_file_is_refused(exported, folder, tmp_path):
    copy = tmp_path / "model.onnx"
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    (tmp_path / "model.parity.json").write_text((exported.parent / "model.parity.json").read_text())
    with pytest.raises(ParityError, match="is not the file that"):
        predict(copy, folder, tmp_path / "x.csv")
    (tmp_path / "model.parity.json").write_text("{")
    with pytest.raises(ParityError, match="is damaged"):
        predict(copy, folder, tmp_path / "x.csv")


def test_predict__file_without_proof_needs_a_word(exported, folder, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    with pytest.raises(ParityError, match=r"model.parity.json is not beside .*--unproved"):
        predict(tmp_path / "model.onnx", folder / "0.png", tmp_path / "x.csv")
    summary = predict(tmp_path / "model.onnx", folder / "0.png", tmp_path / "x.csv", unproved=True)
    assert summary["n_errors"] == 0
    assert "model.parity.json is not beside" in capsys.readouterr().err


def test_predict__files_that_are_not_ours(exported, folder, tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        predict(tmp_path / "none.onnx", folder, tmp_path / "x.csv")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ConfigError, match="cannot be opened"):
        predict(tmp_path / "text.onnx", folder, tmp_path / "x.csv", unproved=True)
    foreign = to_onnx(nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()), tmp_path / "foreign.onnx", 4)
    with pytest.raises(ConfigError, match="was not written by `mrl export`"):
        predict(foreign, folder, tmp_path / "x.csv", unproved=True)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_predict__batch_size(exported, folder, tmp_path, size):
    with pytest.raises(ConfigError, match="--batch-size"):
        predict(exported, folder, tmp_path / "x.csv", batch_size=size)


def test_find_images__nothing_there(tmp_path):
    for images in (tmp_path, tmp_path / "none", tmp_path / "*.png"):
        with pytest.raises(ConfigError, match="no images there"):
            find_images(images)
    (tmp_path / "a.csv").write_text("file\na.png\n")
    with pytest.raises(ConfigError, match="column path"):
        find_images(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"path\n\xff.png\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        find_images(tmp_path / "b.csv")


def test_open_exported__what_travels_in_the_file(exported):
    found = open_exported(exported)
    assert found.classes == tuple(CLASSES)
    assert found.preprocess.to_dict() == PREPROCESS.to_dict()
    assert found.metadata["arm"] == "mrl"
    assert json.loads((exported.parent / "model.parity.json").read_text())["n_images"] == 5
