import json

import numpy as np
import pytest
from PIL import Image

from mrl.data.audit import Audit, audit, audit_source, changed_files, load_audit
from mrl.data.hashing import near_pairs, perceptual_hash, pixel_hash
from mrl.data.images import Decoded, decode
from mrl.data.sources import load_source
from mrl.errors import ConfigError, DataError
from pictures import class_folders, draw, scene, wide_png

BAD = ("crack/cut.jpg", "crack/text.png", "crack/twin.png", "good/twin.bmp")


@pytest.fixture
def folder(tmp_path):
    """Three classes with a truncated JPEG, a text named .png, one picture under two labels and a 16-bit PNG."""
    root = class_folders(tmp_path / "data", {"crack": 5, "dirt": 5, "good": 5})
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "crack" / "cut.jpg")
    data = (root / "crack" / "cut.jpg").read_bytes()
    (root / "crack" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (root / "crack" / "text.png").write_text("not a picture")
    Image.fromarray(draw(900)).save(root / "crack" / "twin.png")
    Image.fromarray(draw(900)).save(root / "good" / "twin.bmp")
    wide = np.random.default_rng(1).integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    (root / "good" / "wide.png").write_bytes(wide_png(wide))
    return root


def test_audit_source__one_error_names_every_bad_file(folder):
    with pytest.raises(DataError) as caught:
        audit_source(load_source(folder))
    text = str(caught.value)
    assert "4 of 20 images cannot be used" in text
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:-1]] == list(BAD)
    assert "cut.jpg: is truncated" in text
    assert "text.png: is not an image" in text
    assert "crack/twin.png: contradictory labels: labelled crack, and the same picture as good/twin.bmp (good)" in text
    assert "good/twin.bmp: contradictory labels: labelled good, and the same picture as crack/twin.png (crack)" in text
    assert text.endswith("or say --on-bad skip to go on without them (the report lists them).")


def test_audit_source__skip_leaves_them_out_and_keeps_the_list(folder):
    found = audit_source(load_source(folder), on_bad="skip")
    stored = found.to_dict()
    assert found.skipped == BAD
    assert stored["skipped"] == list(BAD)
    assert {b["action"] for b in stored["bad"]} == {"skipped"}
    assert stored["conflicts"] == [{"images": ["crack/twin.png", "good/twin.bmp"], "labels": ["crack", "good"]}]
    assert (stored["n_files"], stored["n_kept"]) == (20, 16)
    assert stored["class_counts"] == {"crack": 5, "dirt": 5, "good": 6}
    assert stored["modes"] == {"L": 15, "RGB;16": 1}
    assert stored["bit_depths"] == {"8": 15, "16": 1}
    assert stored["sizes"] == {"16x16": 16}
    assert any("4 bad images were skipped" in warning for warning in stored["warnings"])
    assert "good/wide.png" in found.sha256


def test_audit_source__classes_are_counted_again_after_skipping(tmp_path):
    root = class_folders(tmp_path, {"crack": 3, "good": 3})
    (root / "crack" / "000.png").write_text("broken")
    with pytest.raises(
        DataError, match=r"crack has 2, and each class needs at least 3 .*1 bad images were skipped: crack/000.png"
    ):
        audit_source(load_source(root), on_bad="skip")


def test_audit_source__a_class_that_is_all_bad(tmp_path):
    root = class_folders(tmp_path, {"crack": 3, "dirt": 3, "good": 3})
    for n in range(3):
        (root / "crack" / f"{n:03d}.png").write_text("broken")
    with pytest.raises(DataError, match=r"every image of crack is bad"):
        audit_source(load_source(root), on_bad="skip")


def test_audit_source__unknown_on_bad(tmp_path):
    with pytest.raises(ConfigError, match=r"--on-bad ignore: unknown; use error or skip"):
        audit_source(load_source(class_folders(tmp_path, {"a": 3, "b": 3})), on_bad="ignore")


def test_audit_source__bit_depth_is_checked_on_every_file(tmp_path):
    root = class_folders(tmp_path, {"a": 3, "b": 3})
    Image.fromarray(np.full((4, 4), 5000, np.uint16)).save(root / "a" / "bright.png")
    with pytest.raises(DataError, match=r"a/bright.png: has a value of 5000, above the 4095"):
        audit_source(load_source(root), bit_depth=12)
    assert audit_source(load_source(root)).bit_depth is None


def test_audit_source__exact_copies_are_found_across_formats(tmp_path):
    root = class_folders(tmp_path, {"a": 3, "b": 3})
    grey = draw(0)
    Image.fromarray(grey).save(root / "a" / "copy.bmp")
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(root / "a" / "copy.tif")
    (root / "a" / "copy16.png").write_bytes(wide_png(grey[..., None].astype(np.uint16) * 257))
    found = audit_source(load_source(root))
    assert found.exact_duplicates == (("a/000.png", "a/copy.bmp", "a/copy.tif", "a/copy16.png"),)
    assert len(found.kept) == 9
    assert found.near == ()
    assert "3 images are exact copies of others; copies stay on one side of the split" in found.warnings


def test_audit_source__near_duplicates(tmp_path):
    root = class_folders(tmp_path, {"a": 4, "b": 4})
    big = Image.fromarray(scene(77))
    big.save(root / "a" / "big.png")
    big.resize((90, 100)).save(root / "a" / "small.jpg", quality=80)
    Image.fromarray((scene(77) * 0.8).astype(np.uint8)).save(root / "b" / "dark.png")
    found = audit_source(load_source(root))
    pairs = {(a, b) for a, b, _ in found.near}
    assert pairs == {("a/big.png", "a/small.jpg"), ("a/big.png", "b/dark.png"), ("a/small.jpg", "b/dark.png")}
    assert all(d <= 4 for *_, d in found.near)
    assert any("3 pairs of images look alike" in w and "2 of them with different labels" in w for w in found.warnings)


def test_audit_source__test_side_leaks_go_out_of_training(tmp_path):
    data = class_folders(tmp_path / "data", {"a": 4, "b": 4})
    held = class_folders(tmp_path / "held", {"a": 2, "b": 2}, first=100)
    Image.fromarray(draw(100)).save(data / "a" / "leak.bmp")
    source = load_source(data, test=held)
    with pytest.raises(DataError, match=r"a/leak.bmp: the same picture as test/a/000.png of --test"):
        audit_source(source)
    found = audit_source(source, on_bad="skip")
    assert found.skipped == ("a/leak.bmp",)
    assert sum(s.side == "test" for s in found.kept) == 4


def test_audit_source__test_side_that_shares_a_group(tmp_path):
    class_folders(tmp_path / "data", {"a": 4, "b": 4})
    class_folders(tmp_path / "held", {"a": 1, "b": 1}, first=100)
    lines = {"data": [], "held": []}
    for side, n in (("data", 4), ("held", 1)):
        for label in "ab":
            lines[side] += [f"{label}/{i:03d}.png,{label},{label}{i}" for i in range(n)]
        (tmp_path / side / "all.csv").write_text("path,label,group\n" + "\n".join(lines[side]) + "\n")
    found = audit_source(load_source(tmp_path / "data" / "all.csv", test=tmp_path / "held" / "all.csv"), on_bad="skip")
    assert found.skipped == ("a/000.png", "b/000.png")
    assert "of group a0, as test/a/000.png of --test" in found.bad[0].reason
    assert found.n_groups == 8


def test_audit_source__copies_with_contradictory_labels_on_both_sides_go_out_on_both(tmp_path):
    data = class_folders(tmp_path / "data", {"a": 4, "b": 4})
    held = class_folders(tmp_path / "held", {"a": 2, "b": 2}, first=100)
    Image.fromarray(draw(100)).save(data / "b" / "leak.png")
    found = audit_source(load_source(data, test=held), on_bad="skip")
    assert found.skipped == ("b/leak.png", "test/a/000.png")


def test_audit__writes_its_file_and_reads_it_back(folder, tmp_path, capsys):
    out = tmp_path / "run"
    found = audit(folder, out, on_bad="skip")
    assert "audit: 16 of 20 images (crack 5, dirt 5, good 6); 4 bad" in capsys.readouterr().err
    again = load_audit(out, folder)
    assert again.to_dict() == found.to_dict()
    assert (again.kept, again.near, again.fingerprint) == (found.kept, found.near, found.fingerprint)
    assert load_audit(out, load_source(folder)).fingerprint == found.fingerprint
    stored = json.loads((out / "audit.json").read_text())
    assert set(stored["files"]["good/000.png"]) >= {"sha256", "pixels", "phash", "size", "mode"}
    with pytest.raises(ConfigError, match=r"audit.json exists"):
        audit(folder, out, on_bad="skip")
    assert audit(folder, out, on_bad="skip", overwrite=True).fingerprint == found.fingerprint


def test_audit__an_error_writes_nothing(folder, tmp_path):
    with pytest.raises(DataError):
        audit(folder, tmp_path / "run")
    assert not (tmp_path / "run" / "audit.json").exists()


def test_load_audit__notices_images_that_came_or_went_and_labels_that_changed(tmp_path):
    data = class_folders(tmp_path / "data", {"a": 4, "b": 4})
    audit(data, tmp_path / "run")
    (data / "a" / "000.png").rename(data / "a" / "new.png")
    with pytest.raises(DataError, match=r"1 images came and 1 went \(a/000.png, a/new.png\) since the audit"):
        load_audit(tmp_path / "run", data)
    (data / "a" / "new.png").rename(data / "a" / "000.png")
    table = data / "all.csv"
    names = [f"{label}/{n:03d}.png" for label in "ab" for n in range(4)]
    table.write_text("path,label\n" + "".join(f"{n},{n[0]}\n" for n in names))
    audit(table, tmp_path / "other")
    table.write_text("path,label\n" + "".join(f"{n},{'b' if n == names[0] else n[0]}\n" for n in names))
    with pytest.raises(DataError, match=r"labels or groups changed since the audit"):
        load_audit(tmp_path / "other", table)


def test_changed_files__other_bytes_and_gone(tmp_path):
    root = class_folders(tmp_path, {"a": 4, "b": 4})
    found = audit_source(load_source(root))
    assert changed_files(found) == ()
    Image.fromarray(draw(500)).save(root / "a" / "001.png")
    (root / "b" / "002.png").unlink()
    assert changed_files(found) == ("a/001.png", "b/002.png")


def test_fingerprint__depends_on_labels_groups_and_files_only(tmp_path):
    first = audit_source(load_source(class_folders(tmp_path / "one", {"a": 3, "b": 3})))
    moved = audit_source(load_source(class_folders(tmp_path / "two", {"a": 3, "b": 3})))
    other = audit_source(load_source(class_folders(tmp_path / "three", {"a": 3, "b": 3}, first=1)))
    assert first.fingerprint == moved.fingerprint != other.fingerprint


def test_to_dict__names_unlisted_files_and_counts_meta(tmp_path):
    root = class_folders(tmp_path, {"a": 3, "b": 3})
    (root / "a" / "notes.txt").write_text("x")
    assert any(
        "1 files are not images of a class and were left out: a/notes.txt" in w
        for w in audit_source(load_source(root)).warnings
    )
    lines = "".join(f"{c}/{n:03d}.png,{c},line{n % 2},{n}\n" for c in "ab" for n in range(3))
    (root / "all.csv").write_text("path,label,line,serial\n" + lines)
    stored = audit_source(load_source(root / "all.csv")).to_dict()
    assert stored["meta_counts"] == {"line": {"line0": 4, "line1": 2}, "serial": {"0": 2, "1": 2, "2": 2}}
    assert stored["n_groups"] is None


def test_near_pairs__against_loops():
    rng = np.random.default_rng(0)
    codes = [int(c) for c in rng.integers(0, 2**63, 60)]
    codes += [c ^ (1 << int(b)) ^ 1 for c, b in zip(codes[:20], rng.integers(1, 60, 20), strict=True)] + [
        None,
        codes[0],
    ]
    wanted = [
        (i, j, (codes[i] ^ codes[j]).bit_count())
        for i in range(len(codes))
        for j in range(i + 1, len(codes))
        if None not in (codes[i], codes[j]) and (codes[i] ^ codes[j]).bit_count() <= 4
    ]
    assert near_pairs(codes) == wanted
    assert len(wanted) >= 21
    assert near_pairs(codes, limit=3) == wanted[:3]


def test_near_pairs__many_blocks():
    codes = [int(c) for c in np.random.default_rng(0).integers(0, 2**63, 9000)]
    codes[8999] = codes[5] ^ 0b111
    assert (5, 8999, 3) in near_pairs(codes)


def test_perceptual_hash__against_scipy():
    from scipy.fft import dctn

    image = Image.fromarray(scene(3, 320))
    small = np.asarray(image.convert("F").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64)
    wanted = dctn(small, norm="ortho")[1:9, 1:9].ravel()
    code = perceptual_hash(Decoded(np.asarray(image), 255.0, "L", 8))
    assert np.array_equal(np.array(list(f"{code:064b}")) == "1", wanted > np.median(wanted))


def test_perceptual_hash__flat_pictures_have_none():
    assert perceptual_hash(Decoded(np.full((40, 40, 3), 9, np.uint8), 255.0, "RGB", 8)) is None


def test_pixel_hash__one_value_makes_another():
    values = draw(0).copy()
    first = pixel_hash(Decoded(values, 255.0, "L", 8))
    values[3, 3] ^= 1
    assert pixel_hash(Decoded(values, 255.0, "L", 8)) != first
    assert pixel_hash(Decoded(values.reshape(8, 32), 255.0, "L", 8)) != pixel_hash(Decoded(values, 255.0, "L", 8))


@pytest.mark.real
def test_audit_source__elpv():
    found = audit_source(load_source("elpv"))
    assert isinstance(found, Audit)
    assert len(found.kept) == 2624
    assert found.class_counts == {"defective": 821, "functional": 1803}
    assert found.to_dict()["sizes"] == {"300x300": 2624}
    assert found.exact_duplicates == ()
    assert found.to_dict()["meta_counts"]["cell_type"] == {"poly": 1550, "mono": 1074}
    assert decode(found.kept[0].path.read_bytes()).mode == "L"
