"""Every image gets a row, and the answer that the torch model gives it."""

import csv
import io
import json
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from mrl.data import Preprocess, read_image
from mrl.deploy.onnx import plain_float, to_onnx
from mrl.deploy.parity import check_proof
from mrl.errors import ConfigError, ParityError
from mrl.explain import region_map
from mrl.export import export_model
from mrl.journal import Journal
from mrl.predict import find_images, predict
from mrl.predictor import Predictor

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


def test_predict__stopped_half_way_goes_on_and_gives_the_same_table(exported, folder, tmp_path, monkeypatch):
    whole = predict(exported, folder, tmp_path / "whole.csv", batch_size=2)
    real, calls = Predictor.probabilities, []

    def stop(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(Predictor, "probabilities", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(exported, folder, tmp_path / "x.csv", batch_size=2)
    assert not (tmp_path / "x.csv").exists()
    with (tmp_path / "x.csv.part").open("ab") as file:
        file.write(b'{"image": "cut off')  # as a killed process may leave it
    summary = predict(exported, folder, tmp_path / "x.csv", batch_size=2)
    assert summary["resumed_at"] == 6
    assert {k: summary[k] for k in ("n_images", "n_errors", "classes")} == {
        k: whole[k] for k in ("n_images", "n_errors", "classes")
    }
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.csv", "x.csv"]


def test_predict__an_unfinished_run_of_other_images_is_not_gone_on_with(exported, folder, tmp_path, monkeypatch):
    images = shutil.copytree(folder, tmp_path / "images")

    def stop(self, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real, calls = Predictor.probabilities, []
        patch.setattr(
            Predictor, "probabilities", lambda s, x: (calls.append(1), real(s, x) if len(calls) < 3 else stop(s, x))[1]
        )
        with pytest.raises(KeyboardInterrupt):
            predict(exported, images, tmp_path / "x.csv", batch_size=2)
    with pytest.raises(ConfigError, match="another model or other images"):
        predict(exported, images, tmp_path / "x.csv", batch_size=3)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(images / "0.png")
    with pytest.raises(ConfigError, match=r"0\.png: the images are not those of the unfinished run"):
        predict(exported, images, tmp_path / "x.csv", batch_size=2)
    assert predict(exported, images, tmp_path / "x.csv", batch_size=4, overwrite=True)["resumed_at"] == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_predict__other_tables_say_the_same(exported, folder, tmp_path, suffix):
    predict(exported, folder, tmp_path / "x.csv")
    predict(exported, folder, tmp_path / f"x{suffix}")
    if suffix == ".jsonl":
        found = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    else:
        found = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    for row, expected in zip(found, rows_of(tmp_path / "x.csv"), strict=True):
        assert list(row) == list(expected)
        assert {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in row.items()} == expected


def test_predict__several_sources_and_standard_input(exported, folder, tmp_path, monkeypatch):
    predict(exported, [folder / "3.png", f"{folder}/[01].png"], tmp_path / "several.csv")
    names = [row["image"] for row in rows_of(tmp_path / "several.csv")]
    assert [Path(name).name for name in names] == ["3.png", "0.png", "1.png"]
    lines = f"{folder}/3.png\n\n{folder}/gone.png\n{folder}/0.png\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert predict(exported, "-", tmp_path / "stdin.csv", batch_size=1)["n_errors"] == 1
    rows = rows_of(tmp_path / "stdin.csv")
    assert [Path(row["image"]).name for row in rows] == ["3.png", "gone.png", "0.png"]
    assert rows[0]["p_crack"] == rows_of(tmp_path / "several.csv")[0]["p_crack"]
    with pytest.raises(ConfigError, match="stands alone"):
        predict(exported, ["-", folder], tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=r"\.csv, \.jsonl, \.parquet"):
        predict(exported, folder, tmp_path / "x.xlsx")


def test_predictor__answers_as_they_come(exported, folder):
    """A camera: with nothing read ahead, the answer of one frame is there before the next frame is asked for."""
    model, asked = Predictor(exported), []

    def frames():
        for i in range(3):
            asked.append(i)
            yield folder / f"{i}.png"

    for i, answer in enumerate(model.stream(frames(), batch_size=1, ahead=0)):
        assert answer.prediction in CLASSES
        assert asked == list(range(i + 1))


def test_predictor__paths_bytes_and_arrays_are_one_image(exported, folder):
    model = Predictor(exported)
    by_path, by_bytes = model(folder / "2.png"), model((folder / "2.png").read_bytes())
    by_array = model(np.asarray(Image.open(folder / "2.png")))
    deep = model(np.asarray(Image.open(folder / "deep.png")))
    for answer in (by_bytes, by_array):
        assert np.array_equal(answer.probabilities, by_path.probabilities)
    assert np.array_equal(deep.probabilities, model(folder / "deep.png").probabilities)
    for bad in (np.zeros((4, 4)), np.zeros((0, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), b"", b"no image"):
        assert model(bad).error
        assert model(bad).prediction is None


def test_predictor__many_threads_use_one(exported, folder):
    model = Predictor(exported)
    files = [folder / f"{i}.png" for i in range(7)]
    expected = [model(f).probabilities for f in files]
    with ThreadPoolExecutor(8) as pool:
        for i, answer in enumerate(pool.map(model, files * 20)):
            assert np.array_equal(answer.probabilities, expected[i % 7])


def test_predict__explain_draws_where_the_answer_is(exported, folder, tmp_path):
    predict(exported, folder, tmp_path / "x.csv", explain=True)
    rows = rows_of(tmp_path / "x.csv")
    for row in rows:
        assert bool(row["map"]) == (not row["error"])
        if row["map"]:
            with Image.open(tmp_path / row["map"]) as drawn:
                assert drawn.width >= 448
                assert drawn.width / drawn.height == pytest.approx(48 / 32, abs=0.01)
    assert len(list((tmp_path / "x_maps").rglob("*.png"))) == len(GOOD)


def test_predict__explain_of_long_names_and_of_a_pattern_that_matches_the_maps(exported, folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("字" * 80, "字" * 79 + "b", "short"):
        (images / f"{name}.png").write_bytes((folder / "1.png").read_bytes())
    for _ in range(2):
        told = predict(exported, str(tmp_path / "**" / "*.png"), tmp_path / "a.csv", explain=True, overwrite=True)
        assert told["n_images"] == 3
    maps = {row["map"] for row in rows_of(tmp_path / "a.csv")}
    assert len(maps) == 3
    assert all((tmp_path / name).is_file() for name in maps)


def test_predict__a_map_that_cannot_be_drawn_stops_nothing(exported, folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mrl.predict.write_map", full)
    told = predict(exported, folder / "1.png", tmp_path / "a.csv", explain=True)
    assert (told["n_images"], told["n_errors"]) == (1, 0)
    assert "has an answer, but no map" in capsys.readouterr().err


def test_region_map__finds_the_one_region_that_matters(exported):
    """A model that looks at one corner only: no other region changes its answer."""

    class Corner(Predictor):
        def probabilities(self, images):
            bright = torch.sigmoid(images[:, :, :8, :12].mean((1, 2, 3)) - 1).numpy()
            return np.stack([bright, 1 - bright], 1)

    image = torch.zeros(3, 32, 48)
    image[:, :8, :12] = 3
    found = region_map(Corner(exported), image, (4, 4))
    assert found.argmax() == 0
    assert np.abs(np.delete(found.ravel(), 0)).max() == 0


HOSTILE = {
    "one.png": lambda p: Image.new("L", (1, 1), 7).save(p),
    "long.png": lambda p: Image.new("L", (20_000, 10), 7).save(p),
    "cmyk.jpg": lambda p: Image.new("CMYK", (30, 20), (9, 80, 200, 4)).save(p),
    "palette.png": lambda p: Image.new("P", (30, 20), 3).save(p, transparency=3),
    "animated.gif": lambda p: Image.new("P", (30, 20), 3).save(
        p, save_all=True, append_images=[Image.new("P", (30, 20), 9)]
    ),
    "deep.tif": lambda p: Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(p),
    "jpeg_inside.png": lambda p: Image.new("RGB", (30, 20), (9, 80, 200)).save(p, "jpeg"),
}
REPORTED = {
    "nan.tif": lambda p: Image.fromarray(np.full((20, 30), np.nan, np.float32)).save(p),
    "empty.png": lambda p: p.write_bytes(b""),
    "text.png": lambda p: p.write_text("no image"),
    "bomb.png": lambda p: p.write_bytes(bomb()),
}


def bomb(side=60_000):
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return bytes([137, 80, 78, 71, 13, 10, 26, 10]) + parts


def test_predict__hostile_images_are_answered_or_reported(exported, tmp_path):
    (tmp_path / "images").mkdir()
    for name, make in {**HOSTILE, **REPORTED}.items():
        make(tmp_path / "images" / name)
    predict(exported, tmp_path / "images", tmp_path / "x.csv")
    rows = {row["image"]: row for row in rows_of(tmp_path / "x.csv")}
    assert set(rows) == {*HOSTILE, *REPORTED}
    assert {name for name, row in rows.items() if row["error"]} == set(REPORTED)
    assert all(row["prediction"] in CLASSES for name, row in rows.items() if name in HOSTILE)


def test_predict__exif_orientation_is_the_same_as_in_training(exported, folder, tmp_path):
    """A picture that is stored on its side with EXIF 6 gets the answer of the upright one."""
    upright = Image.open(folder / "5.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    model = Predictor(exported)
    assert np.array_equal(model(tmp_path / "turned.png").probabilities, model(folder / "5.png").probabilities)
    assert torch.equal(read_image(tmp_path / "turned.png"), read_image(folder / "5.png"))


@pytest.mark.parametrize("source", ["0.png", "lot 2/grey.jpg", "deep.png"])
def test_predictor__mutated_images_never_crash(exported, folder, source):
    """150 images with bytes changed, cut out or repeated: an answer of finite numbers or a reason, nothing else."""
    model, data, rng = Predictor(exported), (folder / source).read_bytes(), np.random.default_rng(0)
    mutated = []
    for i in range(150):
        part = bytearray(data)
        for at in rng.integers(0, len(part), 1 + i % 8):
            part[at] = rng.integers(256)
        if i % 3 == 0:
            part = part[: rng.integers(1, len(part))]
        if i % 5 == 0:
            part += part[rng.integers(len(part)) :]
        mutated.append(bytes(part))
    for answer in model.predict(mutated, batch_size=16):
        assert bool(answer.error) != (answer.prediction in CLASSES)
        assert answer.error or np.isfinite(answer.probabilities).all()


def test_predict__changed_file_is_refused(exported, folder, tmp_path):
    copy = tmp_path / "model.onnx"
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    (tmp_path / "model.parity.json").write_text((exported.parent / "model.parity.json").read_text())
    with pytest.raises(ParityError, match="is not the file that"):
        predict(copy, folder, tmp_path / "x.csv")
    for damaged in ("{", "[]", "null", '{"files": {}}', '{"files": 3}', ""):
        (tmp_path / "model.parity.json").write_text(damaged)
        with pytest.raises(ParityError, match=r"is damaged.*--unproved"):
            predict(copy, folder, tmp_path / "x.csv")
        assert check_proof(copy, unproved=True) is None


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


def test_predict__names_that_no_table_can_hold(exported, folder, tmp_path, monkeypatch):
    """A NUL (`find -print0`) and bytes that are no text: a row each, escaped, never a crash."""
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(folder / "0.png", os.fsencode(odd) + b"/\xff.png")
    lines = f"{folder}/0.png\0{folder}/1.png\n{folder}/0.png\n".encode() + os.fsencode(odd) + b"/\xff.png\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    for suffix in ("csv", "parquet"):
        assert predict(exported, [f"{odd}/*.png"], tmp_path / f"glob.{suffix}")["n_errors"] == 0
    assert predict(exported, "-", tmp_path / "x.csv")["n_errors"] == 1
    nul, plain, bytes_ = rows_of(tmp_path / "x.csv")
    assert "null byte" in nul["error"]
    assert "\\x00" in nul["image"]
    assert bytes_["image"].endswith("/odd/\\udcff.png")
    assert bytes_["prediction"] == plain["prediction"] == rows_of(tmp_path / "glob.csv")[0]["prediction"]
    (tmp_path / "nul.csv").write_text("path\n3\0.png\n")
    assert predict(exported, tmp_path / "nul.csv", tmp_path / "y.csv")["n_errors"] == 1


def test_predict__the_same_name_in_two_folders_can_be_told_apart(exported, folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / ("0.png" if name == "a" else "1.png"), tmp_path / name / "0.png")
    shutil.copy(folder / "2.png", tmp_path / "a" / "2.png")
    predict(exported, [tmp_path / "a", tmp_path / "b"], tmp_path / "x.csv", explain=True)
    rows = rows_of(tmp_path / "x.csv")
    assert [row["image"] for row in rows] == [f"{tmp_path}/a/0.png", "2.png", f"{tmp_path}/b/0.png"]
    assert len({row["map"] for row in rows}) == 3
    predict(exported, [tmp_path / "b"], tmp_path / "one.csv")
    assert rows_of(tmp_path / "one.csv")[0]["image"] == "0.png"


def test_predict__out_that_cannot_be_written_is_said_before_any_work(exported, folder, tmp_path, monkeypatch):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(ConfigError, match=r"x\.csv: is a folder; give the name of a file"):
        predict(exported, folder, tmp_path / "x.csv", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*: cannot be written \(.*\); mend that"):
        predict(exported, folder, tmp_path / "file" / "y.csv")
    images = shutil.copytree(folder, tmp_path / "images")
    with pytest.raises(ConfigError, match="would be taken for images"):
        predict(exported, images, images / "y.csv", explain=True)

    def full(self):
        raise OSError(28, "No space left on device")

    out = Journal(tmp_path / "z.csv", {})
    out.file.close()
    monkeypatch.setattr(out, "file", type("Full", (), {"write": lambda s, x: None, "flush": full})())
    with pytest.raises(ConfigError, match=r"No space left on device.*what is done stays in z\.csv\.part"):
        out.write([{"image": "a"}])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_predict__pipes_and_devices_do_not_hang(exported, folder, tmp_path):
    os.mkfifo(tmp_path / "camera.png")
    (tmp_path / "list.csv").write_text("path\ncamera.png\n/dev/zero\n")
    predict(exported, tmp_path / "list.csv", tmp_path / "x.csv")
    rows = rows_of(tmp_path / "x.csv")
    assert len(rows) == 2
    assert all("is a pipe or a device, not a file" in row["error"] for row in rows)


def test_predict__an_image_that_goes_before_its_map_is_drawn(exported, folder, tmp_path, monkeypatch, capsys):
    images, real = shutil.copytree(folder, tmp_path / "images"), Predictor.probabilities

    def gone(self, batch):
        (images / "0.png").unlink(missing_ok=True)
        return real(self, batch)

    monkeypatch.setattr(Predictor, "probabilities", gone)
    predict(exported, images / "0.png", tmp_path / "x.csv", explain=True)
    (row,) = rows_of(tmp_path / "x.csv")
    assert (row["map"], row["prediction"] in CLASSES) == ("", True)
    assert "0.png: has an answer, but no map" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [0, -1])
def test_predict__threads(exported, folder, tmp_path, threads):
    with pytest.raises(ConfigError, match=f"--threads {threads}: must be a whole number of at least 1"):
        predict(exported, folder, tmp_path / "x.csv", threads=threads)


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
    (tmp_path / "c.csv").write_text("path\n" + 200_000 * "a")
    with pytest.raises(ConfigError, match=r"c\.csv: is not a CSV \(field larger than field limit"):
        find_images(tmp_path / "c.csv")


def test_predictor__what_travels_in_the_file(exported):
    found = Predictor(exported)
    assert found.classes == tuple(CLASSES)
    assert found.preprocess.to_dict() == PREPROCESS.to_dict()
    assert found.metadata["arm"] == "mrl"
    assert json.loads((exported.parent / "model.parity.json").read_text())["n_images"] == 5
