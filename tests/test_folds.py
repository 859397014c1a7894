"""Runs of folds end to end on generated images: whole, resumable by fold, the same for both arms, and without a leak."""

import csv
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrl import folds, results, steps
from mrl.cli import main
from mrl.curve import curve_spaces
from mrl.data import ImageSet
from mrl.data.subsets import SHARES
from mrl.errors import ConfigError, DataError
from mrl.fit_config import FitConfig
from mrl.fit_loop import Loop
from mrl.protocol import Protocol
from mrl.report.words import Words
from mrl.stats import nadeau_bengio, quality_verdict
from mrl.workspace import FoldSpace, Workspace, spaces_of
from test_poc import draw

TINY = [
    "--model",
    "test_vit",
    "--region",
    "2",
    "--image-size",
    "32",
    "--min-updates",
    "4",
    "--epochs",
    "1",
    "--validations",
    "1",
    "--calibration.min-updates",
    "2",
    "--calibration.epochs",
    "0.1",
    "--calibration.feature-epochs",
    "0.1",
]


class Stop(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Two folds, twice, and a frozen test set from 40 images on; short measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl.data.folds.PRESETS", {"standard": (2, 2), "full": (2, 1)})
        patch.setattr("mrl.data.folds.FROZEN_FROM", 40)
        patch.setattr("mrl.results.MEASURE_SECONDS", 3.0)
        patch.setattr("mrl.results.OTHER_SIZES", ())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "data", classes=("blank", "dot"))


def poc(data: Path, out: Path, *more: str) -> int:
    return main(["poc", "--data", str(data), "--out", str(out), *TINY, *more])


@pytest.fixture(scope="module")
def standard(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert poc(data, out, "--preset", "standard") == 0
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    images = draw(tmp_path_factory.mktemp("more") / "data", classes=("blank", "dot"), n=22)
    out = tmp_path_factory.mktemp("runs") / "full"
    assert poc(images, out, "--preset", "full") == 0
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_standard__predictions_have_repeat_and_fold_and_follow_the_manifest(standard):
    rows = rows_of(standard / "predictions.csv")
    manifest = {row["image"]: row for row in rows_of(standard / "split.csv")}
    assert Counter((row["image"], row["arm"], row["repeat"]) for row in rows) == {
        (image, arm, repeat): 1 for image in manifest for arm in ("baseline", "mrl") for repeat in "01"
    }
    assert all(manifest[row["image"]][f"fold_r{row['repeat']}"] == row["fold"] for row in rows)
    about = json.loads((standard / "folds.json").read_text())
    assert (about["k"], about["repeats"], about["n_frozen"], len(about["folds"])) == (2, 2, 0, 4)
    assert len(about["split_sha256"]) == 64


@pytest.mark.slow
def test_standard__verdict_is_that_of_the_corrected_test(standard):
    found = json.loads((standard / "comparison.json").read_text())
    rows = rows_of(standard / "predictions.csv")
    hits: dict = {}
    for row in rows:
        answer = max(("blank", "dot"), key=lambda c: float(row[f"p_{c}"]))
        hits.setdefault((row["repeat"], row["fold"]), {}).setdefault(row["arm"], []).append(answer == row["target"])
    gaps = [np.mean(hits[key]["mrl"]) - np.mean(hits[key]["baseline"]) for key in sorted(hits)]
    expected = nadeau_bengio(gaps, 2)
    assert found["difference"]["estimate"] == pytest.approx(np.mean(gaps))
    if found["method"] == "corrected_t":
        assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx((expected.low, expected.high))
    else:
        assert found["difference"]["low"] <= np.nan_to_num(expected.low, nan=1.0)
    assert found["verdict"] == quality_verdict(found["difference"]["low"], found["difference"]["high"], 0.03)
    report = json.loads((standard / "report.json").read_text())
    assert report["verdict"]["quality"] == found["verdict"]
    assert report["folds"]["n_fits"] == 4
    assert report["bayes"] == found["bayes"]


@pytest.mark.slow
def test_standard__both_arms_have_the_same_seeds_budget_and_start(standard):
    seeds = set()
    for fold in ("r0f0", "r0f1", "r1f0", "r1f1"):
        one, two = (
            json.loads((standard / f"folds/{fold}/arms/{arm}/fit.json").read_text()) for arm in ("baseline", "mrl")
        )
        assert one["config"] == two["config"]
        assert one["seed"] == two["seed"]
        assert one["inner"]["updates"] == two["inner"]["updates"]
        assert (one["n_train"], one["n_val"]) == (16, 0)
        assert one["inner"]["n_train"] + one["inner"]["n_val"] == 16
        seeds.add(one["seed"])
    assert len(seeds) == 4
    run = Workspace(standard)
    fold = FoldSpace(run, 0, 1)
    first, again = fold.new_classifier().state_dict(), fold.new_classifier().state_dict()
    assert all((first[k] == again[k]).all() for k in first)


@pytest.mark.slow
def test_standard__weights_stay_at_one_fold_only_and_it_is_exported(standard):
    kept = sorted(p.relative_to(standard).as_posix() for p in standard.rglob("model.safetensors"))
    assert {p for p in kept if "/model/" in p} == {
        f"folds/r0f0/arms/{arm}/model/model.safetensors" for arm in ("baseline", "mrl")
    }
    assert not list(standard.rglob("start.safetensors"))
    assert not list(standard.rglob("features.safetensors"))
    assert (standard / "model.onnx").is_file()
    assert Workspace(standard).arm("mrl") == standard / "folds/r0f0/arms/mrl"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lang", "fits", "method"), [("en", "4 fits an arm", "Nadeau and Bengio"), ("ja", "各モデル 4 回", "Nadeau–Bengio")]
)
def test_standard__report_names_the_method_and_the_fits(standard, tmp_path, lang, fits, method):
    out = shutil.copytree(standard, tmp_path / "run")
    assert main(["report", "--out", str(out), "--lang", lang, "--overwrite"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    front, quality = page.split('<nav class="sheet"')[0], page.split('id="statistics"')[1]
    for text in (fits, method):
        assert text in front
    assert method in quality
    assert Words(lang)("folds.one_repeat") in page
    assert "folds/r0f0/arms/baseline/model" in page or "model.onnx" in page


@pytest.mark.slow
def test_standard__single_commands_give_the_numbers_of_poc(standard, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["split", "--data", str(data), "--out", str(out), *TINY[:6], "--preset", "standard"]) == 0
    assert (out / "split.csv").read_text() == (standard / "split.csv").read_text()
    assert main(["evaluate", "--out", str(out)]) == 1
    assert "its test images stay shut" in capsys.readouterr().err
    assert main(["fit", "--out", str(out), "--fold", "r9f9"]) == 1
    assert "r0f0, r0f1, r1f0, r1f1" in capsys.readouterr().err
    again = shutil.copytree(standard, tmp_path / "again")
    for name in ("predictions.csv", "comparison.json", "report.html", "report.json"):
        (again / name).unlink()
    for verb in ("evaluate", "compare", "report"):
        assert main([verb, "--out", str(again)]) == 0
    for name in ("predictions.csv", "comparison.json"):
        assert (again / name).read_text() == (standard / name).read_text()


@pytest.mark.slow
def test_standard__a_changed_manifest_is_refused(standard, tmp_path, capsys):
    out = shutil.copytree(standard, tmp_path / "run")
    text = (out / "split.csv").read_text()
    (out / "split.csv").write_text(text.replace(",folds,0,", ",folds,1,", 1))
    with pytest.raises(DataError, match="was changed after it was written"):
        Workspace(out).folds  # noqa: B018


def opened(data: Path, out: Path, preset: str = "standard", **budget) -> Workspace:
    """A run with its protocol and split, and nothing fitted."""
    request = steps.Request(
        model="test_vit",
        data=str(data),
        image_size=32,
        preset=preset,
        budget=FitConfig(**{"epochs": 1, "min_updates": 4, "validations": 1, **budget}),
        calibration=steps.CalibrateConfig(epochs=0.1, feature_epochs=0.1, min_updates=2),
    )
    return steps.begin(Workspace(out), request)


@pytest.mark.slow
def test_fold__killed_in_either_fit_goes_on_to_the_same_predictions(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mrl.fit_loop.CHECKPOINT_SECONDS", 0.0)
    step, made = Loop._step, {}
    for name, kills in (("whole", ()), ("killed", (2, 6))):
        space, count = spaces_of(opened(data, tmp_path / name))[1], 0

        def stop(self, batch, kills=kills):
            nonlocal count
            count += 1
            if count in kills:
                raise Stop
            step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_step", stop)
            for arm in ("baseline", "mrl"):
                for _ in range(3):
                    try:
                        folds.fit_fold(space, arm)
                    except Stop:
                        continue
        assert not kills or count >= 6
        folds.score_fold(space)
        made[name] = (space.out / "predictions.csv").read_text()
    assert made["whole"] == made["killed"]


@pytest.mark.slow
def test_full__frozen_images_are_tested_once_and_by_the_last_fit_only(full):
    manifest = rows_of(full / "split.csv")
    frozen = {row["image"] for row in manifest if row["split"] == "test"}
    assert len(frozen) == 9
    assert not frozen & {row["image"] for row in rows_of(full / "predictions.csv")}
    last = rows_of(full / "predictions-frozen.csv")
    assert Counter((row["image"], row["arm"]) for row in last) == {
        (i, a): 1 for i in frozen for a in ("baseline", "mrl")
    }
    for path in full.glob("folds/r*/split.csv"):
        assert not frozen & {row["image"] for row in rows_of(path)}
    found = json.loads((full / "comparison.json").read_text())
    assert found["frozen"]["n"] == 9
    assert found["n"] == 35
    assert Workspace(full).arm("mrl") == full / "folds/last/arms/mrl"
    assert (full / "folds/last/arms/mrl/model").is_dir()
    assert not (full / "folds/r0f0/arms/mrl/model").exists()
    assert "Frozen test set" in (full / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_full__learning_curve_tests_the_images_of_the_whole_and_is_reported(full):
    run, found = Workspace(full), json.loads((full / "curve.json").read_text())
    spaces = curve_spaces(run)
    k, arms = run.protocol.folds["k"], run.protocol.arms
    drawn = [*dict.fromkeys(space.share for space in spaces), 1.0]
    assert [size["share"] for size in found["sizes"]] == drawn
    assert sorted([*found["left_out"], *drawn]) == list(SHARES)
    assert found["left_out"] == [0.1, 0.2]  # of 18 images: fewer than 4 to calibrate with
    assert Counter(row["share"] for row in found["rows"]) == dict.fromkeys(drawn, k)
    for space in spaces:
        rows, whole = rows_of(space.file("predictions.csv")), rows_of(space.whole.file("predictions.csv"))
        assert [(row["image"], row["arm"]) for row in rows] == [(row["image"], row["arm"]) for row in whole]
        assert not list(space.out.rglob("model.safetensors"))
    whole = {row["fold"]: row for row in found["rows"] if row["share"] == 1.0}
    for row in found["rows"]:
        assert set(row["arms"]) == set(arms)
        for arm, one in row["arms"].items():
            assert one["updates"] == whole[row["fold"]]["arms"][arm]["updates"]
            assert row["n_train"] <= whole[row["fold"]]["n_train"]
    scores = {arm: [row["arms"][arm]["score"] for row in whole.values()] for arm in arms}
    assert found["sizes"][-1]["arms"]["mrl"]["estimate"] == pytest.approx(np.mean(scores["mrl"]))
    page = (full / "report.html").read_text(encoding="utf-8").split('id="curve"')[1].split("</section>")[0]
    assert Words("en").points(found["sizes"][0]["differences"]["mrl"]["estimate"]) in page
    assert Words("en")("curve.scope", folds=str(k)) in page
    assert json.loads((full / "report.json").read_text())["curve"]["sizes"] == found["sizes"]


# No leak


@pytest.mark.parametrize("preset", ["quick", "standard"])
def test_leak__test_images_stay_shut_until_the_fits_are_done(data, tmp_path, preset):
    space = spaces_of(opened(data, tmp_path / "run", preset))[0]
    with pytest.raises(ConfigError, match="its test images stay shut until the fits are done"):
        space.image_set("test")
    with pytest.raises(ConfigError, match="its test images stay shut"):
        space.image_set("train", "test")
    steps.fit_step(space, "baseline")
    with pytest.raises(ConfigError, match="arm mrl is not fitted yet"):  # not even begun
        space.image_set("test")
    space.alone = "mrl"
    with pytest.raises(ConfigError, match="arm mrl is not fitted yet"):
        space.image_set("test")
    space.alone = "baseline"  # of one hold-out that has no other fit
    if preset == "quick":
        assert len(space.image_set("test"))
    (space.arm("mrl")).mkdir(parents=True, exist_ok=True)  # begun, not done
    with pytest.raises(ConfigError, match="arm mrl is not fitted yet"):
        space.image_set("test")


def planted(folder: Path, groups=14, size=3, seed=0) -> Path:
    """Labels that only a leak can tell: by group, at random, in a pattern of the group's own; and copies across rows.

    Every image of a group shows the same bright pixels and has the group's label. Who trains on one image of a group
    knows the others; who does not, knows nothing. Some images are copied under another name without a group.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir()
    lines = ["path,label,group"]
    for group in range(groups):
        label = "ab"[group % 2]
        pattern = rng.random((32, 32)) < 0.15
        for i in range(size):
            pixels = np.where(pattern, 250, rng.integers(90, 110, (32, 32))).astype(np.uint8)
            name = f"g{group}_{i}.png"
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name},{label},g{group}")
            if group % 5 == 0 and i == 1:
                shutil.copy(folder / name, folder / f"copy_{name}")
                lines.append(f"copy_{name},{label},")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder / "images.csv"


class Memory:
    """A probe that knows by heart the planted pattern and the label of every image that is loaded while it looks on.

    It answers the label of a pattern that it saw, else "a": right on every test image whose group reached it, and as good
    as a guess where none did.
    """

    def __init__(self, monkeypatch):
        self.labels, self.images, loaded = {}, set(), ImageSet.resized
        self.load = lambda images, i: loaded(images, i)

        def resized(images, i):
            self.images.add(images.samples[i].image)
            self.labels[self.pattern(images, i)] = images.samples[i].label
            return loaded(images, i)

        monkeypatch.setattr(ImageSet, "resized", resized)

    def pattern(self, images, i):
        return (self.load(images, i)[0] > 0.7).numpy().tobytes()

    def forget(self):
        self.labels.clear()
        self.images.clear()

    def accuracy(self, space, side="test"):
        """On a side of the split, read past every guard."""
        samples = {s.image: s for s in space.audit.kept}
        kept = [samples[row.image] for row in space.rows if row.split == side]
        images = ImageSet(kept, space.source.classes, space.preprocess)
        return np.mean([self.labels.get(self.pattern(images, i), "a") == s.label for i, s in enumerate(kept)])


@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_leak__no_step_before_the_test_looks_at_a_test_image(tmp_path, monkeypatch, preset):
    """Audit done, every image that calibration, probe, early stopping and fits load is known by heart, fold by fold."""
    run = opened(planted(tmp_path / "data"), tmp_path / "run", preset)
    memory = Memory(monkeypatch)
    spaces = spaces_of(run)
    for space in dict.fromkeys((spaces[0], spaces[-1])):
        sides = {side: {row.image for row in space.rows if row.split == side} for side in ("train", "val", "test")}
        labels = [row.label for row in space.rows if row.split == "test"]
        guess = labels.count("a") / len(labels)
        assert 0.3 <= guess <= 0.7
        for arm in ("baseline", "mrl"):
            memory.forget()
            steps.fit_step(space, arm, overwrite=True)
            assert sides["train"] <= memory.images
            assert not memory.images & sides["test"], "a fit looked at its test side"
            assert memory.accuracy(space, "train") == 1
            assert memory.accuracy(space) == guess, "a group or a copy is on both sides"
        memory.forget()
        results.evaluate_step(space, overwrite=True)
        assert memory.images == sides["test"]
        assert memory.accuracy(space) == 1  # so it would have been found


@pytest.mark.parametrize("arm", ["baseline", "mrl"])
def test_leak__a_split_that_ignores_groups_and_copies_is_found(tmp_path, monkeypatch, arm):
    """The same probe on a split with every third image of a group on the test side: it knows all of them."""
    (space,) = spaces_of(opened(planted(tmp_path / "data"), tmp_path / "run", "quick"))
    memory, sides = Memory(monkeypatch), {"0": "train", "1": "val", "2": "test"}
    leaky = [replace(row, split=sides[Path(row.image).stem[-1]]) for row in space.rows]
    space.__dict__["rows"] = leaky
    steps.fit_step(space, arm)
    assert memory.accuracy(space) == 1


def test_leak__planted_groups_tell_their_labels_only_where_folds_ignore_them(tmp_path):
    """The nearest image knows the label of its own group: right on naive folds, at chance on ours."""
    source = planted(tmp_path / "data", groups=60, seed=1)
    run = opened(source, tmp_path / "run")
    images = [s for s in run.audit.kept if not s.image.startswith("copy_")]
    pixels = np.stack([np.asarray(Image.open(s.path), dtype=float).ravel() for s in images])
    labels = np.array([s.label for s in images])
    place = {row.image: row.folds for row in run.folds.rows}
    ours = np.array([place[s.image][0] for s in images])
    naive = np.random.default_rng(0).permutation(len(images)) % 2

    def accuracy(fold):
        right = []
        for f in range(2):
            train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
            apart = ((pixels[test][:, None] - pixels[train][None]) ** 2).sum(-1)
            right += list(labels[train][apart.argmin(1)] == labels[test])
        return np.mean(right)

    assert accuracy(naive) > 0.75
    assert accuracy(ours) < 0.62


def test_protocol__of_quick_has_the_hash_it_always_had():
    told = Protocol(data={"n": 4}, model="test_vit")
    assert told.sha256() == "03623f379b0c3c351412b9a451596474f1a9b06aacc4fd56717339c5474ed712"
    assert "folds" not in told.to_dict()
    assert Protocol(data={"n": 4}, model="test_vit", folds={"k": 5}).sha256() != told.sha256()


def test_protocol__of_folds_says_what_was_fixed_and_what_can_be_detected(data, tmp_path):
    from dataclasses import asdict

    from mrl.data import make_folds
    from mrl.request import FOLD_CALIBRATION, make_protocol
    from mrl.stats import detectable_by_folds
    from mrl.swap import CalibrateConfig

    run = opened(data, tmp_path / "run")
    assert run.protocol.folds == {"k": 2, "repeats": 2, "n_frozen": 0, "test": "corrected_t"}
    assert run.protocol.calibration["max_images"] == CalibrateConfig().max_images  # flags were given: they stand
    request = steps.Request(model="test_vit", data=str(data), image_size=32, preset="standard")
    made = make_protocol(request, run.audit, make_folds(run.audit))
    assert made.calibration == asdict(FOLD_CALIBRATION)
    assert made.calibration["max_images"] == 640
    assert {FOLD_CALIBRATION.updates(stage, 576) for stage in ("layers", "features")} == {0}
    assert made.mde["n_test"] == 32
    expected = detectable_by_folds(32, 0.1, k=2, repeats=2)
    assert made.mde["by_disagreement"]["0.1"] == pytest.approx(expected)


def sides_of(folder, counts, size, group):
    """A CSV of noise images: so many of each class; in groups of `group`, or alone."""
    rng, lines = np.random.default_rng(0), ["path,label" + ",group" * (group > 1)]
    folder.mkdir()
    for label, n in counts.items():
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(folder / f"{label}{i}.png")
            lines.append(f"{label}{i}.png,{label}" + f",{label}{i // group}" * (group > 1))
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder / "images.csv"


@pytest.mark.parametrize(
    ("counts", "group", "preset"),
    [({"a": 80, "b": 16}, 1, "quick"), ({"a": 80, "b": 16}, 1, "standard"), ({"a": 80, "b": 16}, 4, "standard")]
    + [({"a": 48, "b": 48}, 4, "quick"), ({"a": 48, "b": 48}, 1, "quick")],
)
def test_protocol__detectable_effect_counts_groups_and_the_rarest_class(tmp_path, capsys, counts, group, preset):
    from mrl.stats import detectable_by_folds, minimum_detectable_effect

    run = opened(sides_of(tmp_path / "data", counts, 16, group), tmp_path / "run", preset)
    told = capsys.readouterr().err
    protocol = run.protocol
    tested = [row for row in (run.folds.rows if protocol.folds else run.rows) if protocol.folds or row.split == "test"]
    units = [len({row.group or row.image for row in tested if row.label == label}) for label in counts]
    balanced = protocol.metric == "balanced_accuracy"
    assert balanced == (max(counts.values()) > 3 * min(counts.values()))
    n = int(4 / (1 / units[0] + 1 / units[1])) if balanced else sum(units)
    assert protocol.mde["n_test"] == len(tested)
    assert protocol.mde.get("n_effective", len(tested)) == n
    assert (n < len(tested)) == (balanced or group > 1)
    if protocol.folds:
        expected = detectable_by_folds(n, 0.1, k=2, repeats=2)
    else:
        exact = minimum_detectable_effect(n, 0.1, exact=True)
        expected = exact if exact == exact else minimum_detectable_effect(n, 0.1)
    assert protocol.mde["by_disagreement"]["0.1"] == pytest.approx(expected)
    assert (f"as good as {n} independent ones{' in equal classes' * balanced}, can show" in told) == (n < len(tested))


def test_begin__a_run_whose_effects_were_counted_otherwise_goes_on(data, tmp_path):
    from mrl.protocol import load_protocol, write_protocol

    run = opened(data, tmp_path / "run")
    write_protocol(run.out, replace(run.protocol, mde={"n_test": 32, "by_disagreement": {"0.1": 0.2}}))
    there = load_protocol(run.out).sha256()
    assert opened(data, run.out).protocol.sha256() == there
    with pytest.raises(ConfigError, match="another protocol"):
        opened(data, run.out, lr=1e-3)


@pytest.mark.slow
def test_benchmark__sums_a_standard_run(standard, tmp_path, monkeypatch):
    import standard as benchmark

    asked = {}
    monkeypatch.setattr(benchmark, "poc", lambda **more: asked.update(more))
    benchmark.main(["--out", str(standard), "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    found, compared = json.loads(path.read_text()), json.loads((standard / "comparison.json").read_text())
    assert (asked["preset"], asked["out"]) == ("standard", str(standard))
    assert found["verdict"] == compared["verdict"]
    assert found["difference"] == compared["difference"]
    for arm in ("baseline", "mrl"):
        assert len(found["arms"][arm]["folds"]) == 4
        assert found["arms"][arm][found["protocol"]["metric"]]["estimate"] == pytest.approx(
            np.mean(found["arms"][arm]["folds"])
        )
    seconds = found["seconds"]
    assert len(seconds["calibrations"]) == 4
    assert all(each > 0 for arm in ("baseline", "mrl") for each in seconds["fits"][arm])
    assert (asked["workers"], seconds["workers"]) == (2, 2)


def test_benchmark__counts_the_calls_that_were_cut_off(tmp_path, monkeypatch):
    import standard as benchmark

    out = tmp_path / "runs" / "a"

    def cut(out: str, **asked: object) -> None:
        Path(out).mkdir(parents=True)
        (Path(out) / "plan.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "poc", cut)
    with pytest.raises(KeyboardInterrupt):
        benchmark.timed(out)
    record = out.with_name("a.calls.json")
    (call,) = json.loads(record.read_text())
    assert call["seconds"] is None
    os.utime(out / "plan.json", (call["started"] + 100, call["started"] + 100))
    monkeypatch.setattr(benchmark, "poc", lambda **asked: None)
    assert 100 <= benchmark.timed(out) < 110
    assert 100 <= benchmark.timed(out) < 110  # and once more: what was counted stays
    shutil.rmtree(out)
    assert benchmark.timed(out) < 10  # a new folder: a new count
