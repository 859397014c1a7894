import importlib.util

import pytest

from mrl.data.sources import list_images, load_source
from mrl.errors import ConfigError, DataError, MissingExtra
from pictures import class_folders


def table(tmp_path, text, files=("a.png", "b.png"), encoding="utf-8"):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    path = tmp_path / "all.csv"
    path.write_bytes(text.encode(encoding))
    return path


def rows(*lines):
    """A good table of two classes, with these lines after its header."""
    return "path,label\n" + "".join(f"{line}\n" for line in lines)


GOOD = [f"{label}{n}.png" for label in "xy" for n in range(3)]
GOOD_ROWS = [f"{name},{name[0]}" for name in GOOD]


def test_load_source__folder_of_class_folders(tmp_path):
    class_folders(tmp_path, {"good": 3, "crack": 3})
    deep = tmp_path / "good" / "line2" / "monday"
    deep.mkdir(parents=True)
    (deep / "x.JPG").write_bytes(b"")
    source = load_source(tmp_path)
    assert source.classes == ("crack", "good")
    assert [s.image for s in source.samples][-1] == "good/line2/monday/x.JPG"
    assert [s.image for s in source.samples] == sorted(s.image for s in source.samples)
    assert all(s.path == tmp_path / s.image and s.side is None and s.group is None for s in source.samples)


def test_load_source__what_is_no_image_is_listed_and_hidden_files_are_not(tmp_path):
    class_folders(tmp_path, {"good": 3, "crack": 3})
    for name in ("good/notes.txt", "readme.md", "loose.png", "good/.hidden.png", ".DS_Store", "good/Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    source = load_source(tmp_path)
    assert source.unlisted == ("good/notes.txt", "loose.png", "readme.md")
    assert len(source.samples) == 6
    assert source.warnings == ("folder empty holds no image and is no class",)


def test_load_source__a_link_back_does_not_loop(tmp_path):
    class_folders(tmp_path, {"good": 3, "crack": 3})
    (tmp_path / "good" / "again").symlink_to(tmp_path / "good", target_is_directory=True)
    assert len(load_source(tmp_path).samples) == 6


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, r"is empty; expected one folder a class"),
        ({"good": 5}, r"one class only \(good\); a comparison needs at least 2 classes"),
        (
            {"good": 5, "crack": 1},
            r"crack has 1, and each class needs at least 3 \(for training, inner validation and test\)",
        ),
        ({"good": 2, "crack": 0}, r"one class only \(good\)"),
    ],
)
def test_load_source__a_folder_that_cannot_be_compared_on(tmp_path, counts, message):
    class_folders(tmp_path, counts)
    with pytest.raises(DataError, match=message):
        load_source(tmp_path)


def test_load_source__folder_without_class_folders_says_the_layout(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 images lie directly in it and have no label; expected one folder a class"):
        load_source(tmp_path)


def test_load_source__folder_of_sides_is_not_taken_for_classes(tmp_path):
    class_folders(tmp_path / "train", {"good": 3, "crack": 3})
    class_folders(tmp_path / "test", {"good": 3, "crack": 3})
    with pytest.raises(DataError, match=r"sides of a split, not classes; give --data .*train .*--test .*test"):
        load_source(tmp_path)


def test_load_source__folder_with_no_image_names_the_suffixes(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no image.*\.png"):
        load_source(tmp_path)


def test_load_source__what_is_not_there_or_no_csv(tmp_path):
    with pytest.raises(ConfigError, match="not found; give a folder of class folders"):
        load_source(tmp_path / "gone")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file and not a CSV"):
        load_source(tmp_path / "a.png")


def test_load_source__csv(tmp_path):
    text = "\ufeffPath, Label ,group,weight,line\n" + "".join(f"{n},{n[0]},g{n[1]},0.5,B\n" for n in GOOD) + "\n"
    source = load_source(table(tmp_path, text, GOOD))
    first = source.samples[0]
    assert (first.image, first.label, first.group, first.weight, dict(first.meta)) == (
        "x0.png",
        "x",
        "g0",
        0.5,
        {"line": "B"},
    )
    assert first.path.is_file()
    assert source.classes == ("x", "y")


def test_load_source__csv_paths_are_relative_to_it_or_absolute(tmp_path):
    files = ["sub/x0.png", "x1.png", "x2.png", *GOOD[3:]]
    lines = ["sub\\x0.png,x", "./sub/../x1.png,x", f"{tmp_path.resolve()}/x2.png,x", *GOOD_ROWS[3:]]
    source = load_source(table(tmp_path, rows(*lines), files))
    assert [s.image for s in source.samples][:3] == ["sub/x0.png", "x1.png", "x2.png"]
    assert all(s.path.is_file() for s in source.samples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty; it needs a header path,label"),
        ("path,label\n", r"has a header and no rows"),
        ("file,label\na.png,x\n", r"line 1: no column path among file, label"),
        ("a.png,x\n", r"line 1: no column path and no column label"),
        ("path;label\na.png;x\n", r"the separator must be a comma"),
        ("path,label,label\na.png,x,y\n", r"line 1: a column is there twice"),
        (
            rows("a.png,x", "gone.png,x", ",x", "b.png,"),
            r"3 rows to mend:\n.*line 3: gone.png is not there\n.*line 4: no path\n.*line 5: no label",
        ),
        (rows("a.png,x", "a.png,y"), r"line 3: a.png is listed already in line 2"),
        (rows("a,b.png,x"), r"line 2: 3 fields under 2 columns"),
        (rows("sub,x"), r"line 2: sub is a folder"),
        ("path,label,weight\na.png,x,2\nb.png,x,much\n", r"line 2: weight 2 .*\n.*line 3: weight much"),
        ('path,label\n"a.png,x\n', r"is not a CSV"),
    ],
)
def test_load_source__csv_that_is_wrong_names_its_lines(tmp_path, text, message):
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=message):
        load_source(table(tmp_path, text))


def test_load_source__csv_that_is_not_utf8(tmp_path):
    with pytest.raises(DataError, match="is not UTF-8"):
        load_source(table(tmp_path, rows("a.png,良品"), encoding="cp932"))


def test_load_source__csv_with_some_groups_says_so(tmp_path):
    text = "path,label,group\n" + "".join(f"{n},{n[0]},{'' if n == 'x0.png' else 'g'}\n" for n in GOOD)
    source = load_source(table(tmp_path, text, GOOD))
    assert source.warnings == ("1 of 6 rows of all.csv have an empty group; each counts as its own",)


def test_load_source__test_side(tmp_path):
    class_folders(tmp_path / "data", {"good": 2, "crack": 2})
    class_folders(tmp_path / "held", {"good": 1, "crack": 1}, first=50)
    (tmp_path / "held" / "good" / "notes.txt").write_bytes(b"")
    source = load_source(tmp_path / "data", test=tmp_path / "held")
    assert [s.image for s in source.samples if s.side == "test"] == ["test/crack/000.png", "test/good/000.png"]
    assert source.samples[-1].path == tmp_path / "held" / "good" / "000.png"
    assert source.unlisted == ("test/good/notes.txt",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {"good": 1, "dirt": 1},
            r"--test .*: has images of dirt, which .* does not have; use the same labels \(crack, good\)",
        ),
        ({"good": 1}, r"--test: has no image of crack"),
        ({}, r"--test .*: is empty"),
    ],
)
def test_load_source__test_side_of_other_classes(tmp_path, held, message):
    class_folders(tmp_path / "data", {"good": 2, "crack": 2})
    (tmp_path / "held").mkdir()
    class_folders(tmp_path / "held", held)
    with pytest.raises(DataError, match=message):
        load_source(tmp_path / "data", test=tmp_path / "held")


def test_load_source__elpv_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install mrl\[demo\]"):
        load_source("elpv")


@pytest.mark.real
def test_load_source__elpv():
    source = load_source("elpv")
    labels = [s.label for s in source.samples]
    assert (labels.count("defective"), labels.count("functional")) == (821, 1803)
    weights = {s.meta["probability"]: round(s.weight, 9) for s in source.samples}
    assert weights == {"0.000": 1.0, "0.333": 0.333333333, "0.667": 0.333333333, "1.000": 1.0}
    assert {s.meta["cell_type"] for s in source.samples} == {"mono", "poly"}
    assert all(s.path.is_file() and s.group is None for s in source.samples)
    assert "CC BY-NC-SA 4.0" in source.terms
    assert "no module ids" in source.warnings[0]


def test_list_images__refuses_names_that_are_no_text(tmp_path):
    import os

    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(DataError, match="not Unicode text; rename it"):
        list_images(tmp_path)
