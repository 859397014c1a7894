"""Every format and precision: what is written runs, equals its model as far as it says, or is refused with the reason."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mrl
from mrl.data import Preprocess
from mrl.deploy import formats, quantise
from mrl.deploy.formats import FORMATS, NOT_OFFERED, PRECISIONS, write_format
from mrl.deploy.parity import check_parity, check_proof, metric_drop
from mrl.deploy.runtimes import files_of, open_runtime
from mrl.errors import ConfigError, ParityError
from mrl.export import Lossy, export_model, file_name
from mrl.swap import SETTINGS

CLASSES = ["good", "crack", "stain"]
LOSSLESS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
slow = pytest.mark.slow
PAIRS = [
    pytest.param(
        f, p, marks=() if (f, p) in (("onnx", "fp16"), ("openvino", "bf16"), ("torch-export", "fp32")) else slow
    )
    for f in FORMATS
    for p in LOSSLESS
    if (f, p) not in NOT_OFFERED
]


def photos(n, size=(32, 48), seed=0):
    """Blurred noise: something of a picture."""
    coarse = torch.randn(n, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size, mode="bicubic")


def network(name="test_mrl", region=None, size=(32, 48)):
    torch.manual_seed(0)
    more = {} if name == "test_mrl" else {"img_size": size}
    model = timm.create_model(name, num_classes=3, **more).eval()
    head = model.get_classifier()
    nn.init.normal_(head.weight, std=0.8)
    if region:
        mrl.swap_(model, mrl.plan(model, region=region, config=SETTINGS["faithful"]))
    return model


@torch.no_grad()
def reference(model, images):
    return torch.softmax(model(images), -1).numpy()


def exported(tmp_path, format="onnx", model=None, **more):
    model = network() if model is None else model
    path = tmp_path / file_name(format, more.get("precision", "fp32"))
    given = {
        "preprocess": Preprocess((32, 48)),
        "classes": CLASSES,
        "images": photos(600 if more else 24),
        "lossy": Lossy(**more),
    }
    return path, export_model(model, path, **given)


@pytest.mark.parametrize(("format", "precision"), PAIRS)
def test_write_format__runs_as_the_model(format, precision, tmp_path):
    model, images = network(), photos(9)
    path = write_format(
        model, tmp_path / f"m{FORMATS[format]}", (32, 48), precision=precision, metadata={"classes": CLASSES}
    )
    runtime = open_runtime(path)
    assert runtime.metadata["classes"] == CLASSES
    assert (runtime.metadata["precision"], runtime.metadata["format"], runtime.format) == (precision, format, format)
    for batch in (images, images[:1], images[:4]):
        assert np.abs(runtime(batch) - reference(model, batch)).max() < LOSSLESS[precision]
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("format", "setting"),
    [
        ("torch-export", "cheap"),
        pytest.param("openvino", "faithful", marks=slow),
        pytest.param("onnx", "paper", marks=slow),
        pytest.param("openvino", "cheap", marks=slow),
        pytest.param("torch-export", "faithful", marks=slow),
    ],
)
def test_export_model__ragged_regions_in_every_format(format, setting, tmp_path):
    """A grid of 2 x 5 tokens in regions of 2 x 2: one row of regions, the last one half empty."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", img_size=(32, 80), num_classes=3).eval()
    mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    given = {"preprocess": Preprocess((32, 80)), "classes": CLASSES, "images": photos(11, (32, 80))}
    facts = export_model(model, tmp_path / file_name(format, "fp32"), **given)
    assert facts["parity"]["max_abs_diff"] <= 1e-5
    assert facts["parity"]["same_decisions"]


@slow
@pytest.mark.parametrize("format", FORMATS)
def test_export_model__a_folded_model(format, tmp_path):
    model = network("test_vit")
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    handle.fold_()
    _, facts = exported(tmp_path, format, model)
    assert facts["parity"]["max_abs_diff"] <= 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_export_model__no_path_of_this_machine_in_any_file(format, tmp_path):
    path, _ = exported(tmp_path, format)
    data = b"".join(part.read_bytes() for part in files_of(path))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data = b"".join(archive.read(name) for name in archive.namelist())
    for word in (b"site-packages", b"/timm/", str(tmp_path).encode(), b"/src/mrl"):
        assert word not in data


@pytest.mark.parametrize("format", ["openvino", pytest.param("onnx", marks=slow)])
def test_export_model__int8_is_judged_by_its_metric(format, tmp_path):
    model, images = network(), photos(700, seed=3)
    target = reference(model, images).argmax(1)
    more = {"calibration": list(images[:64]), "targets": target[100:], "precision": "int8", "max_drop": 0.1}
    path = tmp_path / file_name(format, "int8")
    given = {"preprocess": Preprocess((32, 48)), "classes": CLASSES, "images": images[100:]}
    facts = export_model(model, path, lossy=Lossy(**more), **given)
    parity = facts["parity"]
    assert (parity["precision"], parity["metric"], parity["n_images"]) == ("int8", "accuracy", 600)
    assert parity["drop"]["low"] <= parity["drop"]["estimate"] <= parity["drop"]["high"] <= 0.1
    found = open_runtime(path)(images[100:]).argmax(1)
    assert (
        abs(parity["flips"] - int((found != target[100:]).sum())) <= 2
    )  # batches of 8 and of 600 may round differently
    proof = json.loads((tmp_path / f"model-{format}-int8.parity.json").read_text())
    assert set(proof["files"]) == {part.name for part in files_of(path)}


def test_export_model__too_much_loss_is_refused_and_names_the_layers(tmp_path, monkeypatch):
    """A broken int8 graph: half of the decisions change, and nothing is left behind."""
    model, images = network(), photos(640, seed=3)
    broken = network()
    nn.init.normal_(broken.get_classifier().weight, std=0.8)

    def bad(source, kind, images, accuracy):
        formats.to_onnx(broken, source, (32, 48))
        accuracy.returned.extend(["stages.0.patch_embed.proj"])
        import onnx

        return onnx.load(str(source))

    monkeypatch.setattr(quantise, "quantise", bad)
    more = {"validation": list(images[:8]), "validation_targets": [0] * 8, "calibration": list(images[:8])}
    with pytest.raises(
        ParityError, match=r"int8 drops accuracy by .* points .*layers that hurt: stages.0.patch_embed.proj"
    ):
        exported(tmp_path, model=model, precision="int8", **more)
    assert list(tmp_path.iterdir()) == []


def test_export_model__too_few_images_cannot_show_half_a_point(tmp_path):
    given = {"preprocess": Preprocess((32, 48)), "classes": CLASSES, "images": photos(60)}
    with pytest.raises(ParityError, match=r"0 decisions changed.*about 5\d0 images would be needed"):
        export_model(network(), tmp_path / "m.xml", lossy=Lossy("fp16"), **given)
    assert list(tmp_path.iterdir()) == []


@slow
def test_quantise__accuracy_control_gives_layers_back(tmp_path):
    """With a score that falls for any change at all, every layer has to go back, and the listener has their names."""
    model, images = network(), photos(16)
    source = formats.to_onnx(model, tmp_path / "m.onnx", (32, 48))
    expected = open_runtime(source)(images)
    control = quantise.Accuracy(list(images), lambda p: float(np.exp(-np.abs(p - expected).sum() * 1e3)), 1e-6)
    found = quantise.quantise(source, "onnx", list(images), control)
    assert "stages.0.patch_embed.proj" in control.returned
    assert all("/" not in name for name in control.returned)
    assert found.graph.node


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("onnx", "bf16"), "use --format openvino or torch-export"),
        (("torch-export", "int8"), "use --format openvino or onnx"),
        (("tflite", "fp32"), "unknown; use onnx, openvino, torch-export"),
        (("onnx", "fp8"), "unknown; use fp32, fp16, bf16, int8"),
    ],
)
def test_check_choice__what_is_not_offered(words, message):
    with pytest.raises(ConfigError, match=message):
        formats.check_choice(*words)
    assert words[1] not in PRECISIONS or words[0] not in FORMATS or words in NOT_OFFERED


@pytest.mark.parametrize("format", FORMATS)
def test_check_proof__every_part_of_the_file_is_compared(format, tmp_path):
    path, _ = exported(tmp_path, format)
    assert check_proof(path)["format"] == format
    for part in files_of(path):
        data = part.read_bytes()
        part.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        with pytest.raises(ParityError, match=f"{part.name} is not the file that"):
            check_proof(path)
        part.write_bytes(data)
    if len(files_of(path)) == 2:
        path.with_suffix(".bin").unlink()
        with pytest.raises(ParityError, match="copy all files"):
            check_proof(path)
        with pytest.raises(ConfigError, match="are not beside it"):
            open_runtime(path)


def test_check_proof__a_name_in_capitals_hides_no_weights(tmp_path):
    path, _ = exported(tmp_path, "openvino")
    loud = path.with_suffix(".XML")
    path.rename(loud)
    assert check_proof(loud)["format"] == "openvino"
    weights = loud.with_suffix(".bin")
    data = weights.read_bytes()
    weights.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ParityError, match=f"{weights.name} is not the file that"):
        check_proof(loud)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return print, ("BOMB",)


def swapped_texts(old, new):
    return lambda files: {name: data.replace(old, new) for name, data in files.items()}


def and_also(entry, data):
    return lambda files: {**files, f"{next(iter(files)).partition('/')[0]}/{entry}": data}


def constant_of(kind):
    """A constant that torch would unpickle, whatever its table says."""

    def change(files):
        root = next(iter(files)).partition("/")[0]
        table = {"config": {"c": {"path_name": kind, "is_param": False, "use_pickle": False, "tensor_meta": None}}}
        files[f"{root}/data/constants/model_constants_config.json"] = json.dumps(table).encode()
        return and_also(f"data/constants/{kind}", pickle.dumps(Bomb()))(files)

    return change


HOSTILE = {
    "says so": (swapped_texts(b'"use_pickle": false', b'"use_pickle": true'), "pickled tensors"),
    "in other letters": (swapped_texts(b'"use_pickle": false', b'"use_pickl\\u0065":  true'), "pickled tensors"),
    "sample inputs": (and_also("data/sample_inputs/model.pt", pickle.dumps(Bomb())), "pickled sample inputs"),
    "legacy weights": (and_also("data/weights/model.pt", pickle.dumps(Bomb())), "an entry 'data/weights/model.pt'"),
    "legacy constants": (and_also("data/constants/model.pt", pickle.dumps(Bomb())), "an entry"),
    "opaque object": (constant_of("opaque_obj_0"), "an entry|pickled tensors"),
    "custom object": (constant_of("custom_obj_0"), "an entry|pickled tensors"),
    "library": (and_also("data/aotinductor/model/a.so", b"code"), "an entry 'data/aotinductor/model/a.so'"),
    "operator": (
        swapped_texts(b'"torch.ops.aten.linear.default"', b'"torch.hub.load"'),
        "an operator 'torch.hub.load'",
    ),
    "expression": (swapped_texts(b"Symbol(", b"__import__('os').system("), "an expression"),
    "another root": (lambda files: {**files, "b/models/model.json": b"{}"}, "more than one model"),
    "no graph": (lambda files: {n: d for n, d in files.items() if not n.endswith("models/model.json")}, "damaged"),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path, _ = exported(tmp_path_factory.mktemp("archive"), "torch-export")
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_open_runtime__an_archive_that_can_run_code_is_refused(archive, tmp_path, case, capfd):
    change, reason = HOSTILE[case]
    with zipfile.ZipFile(archive) as whole:
        files = {name: whole.read(name) for name in whole.namelist()}
    changed = change(dict(files))
    assert changed != files
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(bad, "w") as out:
        for name, data in changed.items():
            out.writestr(name, data)
    with pytest.raises(ConfigError, match=reason):
        open_runtime(bad)
    assert "BOMB" not in capfd.readouterr().out


def test_open_runtime__not_an_archive(tmp_path):
    cut = tmp_path / "cut.pt2"
    with zipfile.ZipFile(cut, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/data/weights/model_weights_config.json", b"{}" * 99)
    data = bytearray(cut.read_bytes())
    data[80:90] = b"\xff" * 10  # inside what is packed: zlib's own error
    cut.write_bytes(data)
    with pytest.raises(ConfigError, match="or is damaged"):
        open_runtime(cut)
    (tmp_path / "none.pt2").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"not a torch\.export archive"):
        open_runtime(tmp_path / "none.pt2")


def test_metric_drop__balanced_accuracy_counts_classes_alike():
    target = np.repeat([0, 1], [900, 100])
    after = target.copy()
    after[900:910] = 0
    assert metric_drop(target, target, after).estimate == pytest.approx(0.01)
    assert metric_drop(target, target, after, "balanced_accuracy").estimate == pytest.approx(0.05)
    better = metric_drop(target, after, target)
    assert (better.estimate, better.high < 0) == (pytest.approx(-0.01), True)


@pytest.mark.parametrize("batches", [(1,), (3,), (1, 3, 1, 2), (2, 1)])
def test_compile_openvino__one_image_has_a_graph_of_its_own(batches, tmp_path, monkeypatch):
    """Compiled when needed: once for single images, once for all other batches; the answers are the model's, in threads too."""
    from concurrent.futures import ThreadPoolExecutor

    import openvino

    model, images, shapes = network(), photos(6), []
    path = write_format(model, tmp_path / "m.xml", (32, 48))
    real = openvino.Core.compile_model

    def spy(self, graph, *more):
        shapes.append(str(graph.input(0).partial_shape))
        return real(self, graph, *more)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    runtime = open_runtime(path)
    for batch in batches:
        assert np.abs(runtime(images[:batch]) - reference(model, images[:batch])).max() < 1e-5
    assert sorted(shapes) == sorted({"[1,3,32,48]" if batch == 1 else "[?,3,32,48]" for batch in batches})
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(runtime, [images[: batches[0]]] * 8):
            assert np.abs(answer - reference(model, images[: batches[0]])).max() < 1e-5
    assert len(shapes) == len(set(shapes))


def test_check_parity__openvino_is_told_its_precision(tmp_path):
    """Without the hint a processor with bf16 computes float32 files in it, and 1e-4 would not hold."""
    model, images = network("vit_tiny_patch16_224", size=(64, 64)), photos(16, (64, 64))
    path = write_format(model, tmp_path / "m.xml", 64)
    assert check_parity(path, model, images)["max_abs_diff"] < 1e-5
