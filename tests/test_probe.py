"""Probes: against brute force and scikit-learn; features on disk that are never stale, never of another image."""

import json
import math
import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression

from vitrail.cli import run
from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.cache import rows as row_cache
from vitrail.data.cache.rows import RowCache
from vitrail.data.datasets.keys import image_keys
from vitrail.data.datasets.open import open_dataset
from vitrail.evaluation import linear
from vitrail.evaluation.classifier import load
from vitrail.evaluation.knn import knn_predict, neighbours
from vitrail.evaluation.linear import GRID, fit_logistic, fit_ridge
from vitrail.evaluation.pca import principal_axes
from vitrail.evaluation.probe import probe
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights.model_file import load_model, save_model

CPU = torch.device("cpu")


def probed(model, source, **options) -> dict:
    return probe(str(model), str(source), device=CPU, console=Console(quiet=True), **options)


def blobs(count: int, width: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of classes that overlap, at scales that differ by thousands, with a constant and a doubled column."""
    random = np.random.default_rng(seed)
    targets = random.permutation(np.arange(count) % classes)
    centres = random.normal(size=(classes, width)) * 0.7
    values = (centres[targets] + random.normal(size=(count, width))) * 10 ** random.uniform(-2, 2, width) + 30
    values[:, 1], values[:, 2] = 5.0, values[:, 3]
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(targets)


# --- k nearest neighbours


def test_neighbours_vote_by_hand():
    known = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    targets = torch.tensor([0, 1, 1, 2, 1])
    asked = torch.tensor([[3.0, 0.0]])
    # Cosines: 1, 0.995, 0, -1, 0.707. Votes e^(c/0.07): class 0 gets e^0 = 1, class 1 e^(-0.07) + e^(-4.2) = 0.95.
    votes = [1.0, math.exp((10 / math.sqrt(101) - 1) / 0.07) + math.exp((math.sqrt(0.5) - 1) / 0.07)]
    assert votes[0] > votes[1] > 0.9
    assert knn_predict(known, targets, asked, k=3, num_classes=3).tolist() == [0]
    # Two more votes like the second tip it, and only when they are asked.
    known, targets = torch.cat([known, known[1:2] * 7]), torch.cat([targets, targets[1:2]])
    assert knn_predict(known, targets, asked, k=1, num_classes=3).tolist() == [0]
    assert knn_predict(known, targets, asked, k=3, num_classes=3).tolist() == [1]
    assert knn_predict(known, targets, asked, k=99, num_classes=3).tolist() == [1]


def test_votes_do_not_depend_on_the_chunks(monkeypatch):
    known, targets = blobs(300, 12)
    asked, _ = blobs(101, 12, seed=1)
    whole = knn_predict(known, targets, asked, k=20, num_classes=4)
    monkeypatch.setattr("vitrail.evaluation.knn._CHUNK_BYTES", 4 * 300 * 7)
    assert torch.equal(knn_predict(known, targets, asked, k=20, num_classes=4), whole)
    cosines = torch.nn.functional.cosine_similarity(asked[:, None], known[None], dim=2)
    for row, answer in zip(cosines, whole, strict=True):
        places = row.argsort(descending=True)[:20]
        votes = torch.bincount(targets[places], weights=torch.exp(row[places] / 0.07).double(), minlength=4)
        assert int(votes.argmax()) == int(answer)


def test_no_more_neighbours_than_a_usual_class_has_images():
    assert neighbours(torch.arange(10).repeat(50)) == 20
    assert neighbours(torch.arange(10).repeat(5)) == 5
    assert neighbours(torch.tensor([0] * 500 + [1] * 7 + [2] * 6)) == 7
    assert neighbours(torch.tensor([0, 2])) == 1


# --- ridge regression


@pytest.mark.parametrize(("count", "width"), [(60, 9), (24, 40), (20, 20)])
def test_leave_one_out_equals_leaving_one_out(count, width):
    features, targets = blobs(count, width)
    spectrum = principal_axes(features, targets, 4)
    ridge = fit_ridge(features, targets, spectrum)
    inputs = spectrum.standardise(features).numpy()
    answers = np.eye(4)[targets.numpy()]
    for penalty, error, top1 in list(zip(GRID, ridge.errors, ridge.top1, strict=True))[::4]:
        squares, right = 0.0, 0
        for left in range(count):
            rest = np.arange(count) != left
            x, y = inputs[rest], answers[rest]
            mean, level = x.mean(axis=0), y.mean(axis=0)
            gram = (x - mean).T @ (x - mean) + penalty * count * np.eye(width)
            weight = np.linalg.solve(gram, (x - mean).T @ (y - level))
            predicted = level + (inputs[left] - mean) @ weight
            squares += ((answers[left] - predicted) ** 2).sum()
            right += predicted.argmax() == targets[left]
        assert error == pytest.approx(squares / count, rel=1e-6)
        assert top1 == pytest.approx(right / count)
    assert ridge.penalty == GRID[int(np.argmin(ridge.errors))] * count


@pytest.mark.parametrize(("count", "width"), [(500, 12), (30, 64)])
def test_the_spectrum_is_that_of_standardised_features(count, width, monkeypatch):
    features, targets = blobs(count, width)
    monkeypatch.setattr("vitrail.evaluation.pca._ROWS", 77)
    spectrum = principal_axes(features, targets, 4)
    x = features.double()
    deviation = x.std(dim=0, correction=0)
    deviation[1] = 1.0  # constant
    wanted = (x - x.mean(dim=0)) / deviation
    torch.testing.assert_close(spectrum.standardise(features), wanted)
    torch.testing.assert_close(spectrum.axes.T @ spectrum.axes, torch.eye(len(spectrum.energy)).double())
    torch.testing.assert_close((wanted @ spectrum.axes).square().sum(dim=0), spectrum.energy)
    assert len(spectrum.energy) == min(count - 1, width - 2)
    answers = torch.nn.functional.one_hot(targets, 4).double()
    torch.testing.assert_close(spectrum.answers, (wanted @ spectrum.axes).T @ answers)
    weight, bias = torch.randn(len(spectrum.energy), 4).double(), torch.randn(4).double()
    raw, level = spectrum.to_linear_layer(weight, bias)
    torch.testing.assert_close(x @ raw.T + level, wanted @ spectrum.axes @ weight + bias)


# --- logistic regression


@pytest.mark.parametrize(("count", "width", "classes"), [(400, 12, 4), (40, 64, 4), (300, 10, 2), (300, 10, 17)])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2])
def test_logistic_regression_equals_scikit_learns(count, width, classes, penalty, monkeypatch):
    features, targets = blobs(count, width, classes)
    monkeypatch.setattr(linear, "TOLERANCE", 1e-9)
    spectrum = principal_axes(features, targets, classes)
    ours = fit_logistic(features, targets, spectrum, fit_ridge(features, targets, spectrum), penalty=penalty)
    inputs = spectrum.standardise(features).numpy()
    strength = 1 / (penalty * count)
    if classes == 2:  # scikit-learn has one weight for two classes, w = w1 - w0: half the penalty
        strength *= 2
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=20_000).fit(inputs, targets.numpy())
    weight, bias = spectrum.to_linear_layer(ours.weight, ours.bias)
    probabilities = (features.double() @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities.numpy(), theirs.predict_proba(inputs), atol=2e-5)


def test_the_usual_tolerance_is_enough_and_few_steps_reach_it():
    features, targets = blobs(600, 40, 5)
    spectrum = principal_axes(features, targets, 5)
    ridge = fit_ridge(features, targets, spectrum)
    found = fit_logistic(features, targets, spectrum, ridge)
    assert found.gradient <= linear.TOLERANCE
    assert found.steps < 60
    assert found.penalty == pytest.approx(0.2 * 0.8 * ridge.penalty / 600)
    inputs = spectrum.standardise(features) @ spectrum.axes

    def loss(logistic) -> float:
        logits = inputs @ logistic.weight + logistic.bias
        cross_entropy = torch.nn.functional.cross_entropy(logits, targets)
        return float(cross_entropy + logistic.penalty / 2 * logistic.weight.square().sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "TOLERANCE", 1e-9)
        best = fit_logistic(features, targets, spectrum, ridge)
    assert 0 <= loss(found) - loss(best) < 1e-5


def test_coordinates_in_float32_give_nearly_the_same(monkeypatch):
    features, targets = blobs(600, 20, 5)
    spectrum = principal_axes(features, targets, 5)
    ridge = fit_ridge(features, targets, spectrum)
    double = fit_logistic(features, targets, spectrum, ridge)
    monkeypatch.setattr(linear, "_DOUBLE_BYTES", 0)
    single = fit_logistic(features, targets, spectrum, ridge)
    assert single.weight.dtype == torch.float64
    assert single.gradient <= linear.TOLERANCE
    torch.testing.assert_close(single.weight, double.weight, rtol=1e-2, atol=1e-3)


def test_features_that_are_all_constant_give_the_frequent_class():
    features, targets = torch.full((30, 6), 2.5), torch.tensor([0, 1, 1] * 10)
    spectrum = principal_axes(features, targets, 2)
    logistic = fit_logistic(features, targets, spectrum, fit_ridge(features, targets, spectrum))
    weight, bias = spectrum.to_linear_layer(logistic.weight, logistic.bias)
    assert (features.double() @ weight.T + bias).argmax(dim=1).tolist() == [1] * 30
    torch.testing.assert_close(bias.softmax(dim=0), torch.tensor([1 / 3, 2 / 3]).double(), rtol=1e-3, atol=1e-3)


# --- rows on disk


def keys_of(*numbers: int) -> np.ndarray:
    return np.asarray([[number] * 16 for number in numbers], dtype=np.uint8).view("V16").reshape(-1)


def test_rows_are_kept_under_their_keys(tmp_path):
    kept = RowCache(tmp_path / "rows", 3, np.float32)
    values, found = kept.read(keys_of(1, 2))
    assert not found.any() and values.shape == (2, 3)
    kept.add(keys_of(1, 2), np.arange(6, dtype=np.float32).reshape(2, 3))
    kept.add(keys_of(3), np.full((1, 3), 7, dtype=np.float32))
    values, found = kept.read(keys_of(3, 9, 1))
    assert found.tolist() == [True, False, True]
    assert values[[0, 2]].tolist() == [[7, 7, 7], [0, 1, 2]]
    assert RowCache(tmp_path / "rows", 4, np.float32).read(keys_of(1))[1].tolist() == [False]
    assert RowCache(tmp_path / "rows", 3, np.int32).read(keys_of(1))[1].tolist() == [False]


@pytest.mark.parametrize("harm", ["empty", "cut", "cut short", "flipped", "text", "other"])
def test_a_broken_file_counts_as_absent(tmp_path, harm):
    kept = RowCache(tmp_path, 64, np.float32)
    kept.add(keys_of(*range(50)), np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32))
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    flipped = content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]
    harmed = {"empty": b"", "cut": content[: len(content) // 2], "cut short": content[:-1], "flipped": flipped}
    path.write_bytes(harmed.get(harm, b"I am a text"))
    if harm == "other":
        save_model(path, ViT(tiny_config()).state_dict(), load("nano8").header)
    assert not kept.read(keys_of(*range(50)))[1].any()
    kept.add(keys_of(3), np.ones((1, 64), np.float32))
    assert kept.read(keys_of(3, 4))[1].tolist() == [True, False]


def test_many_files_are_joined_into_one(tmp_path):
    kept = RowCache(tmp_path, 2, np.float32)
    for number in range(100):
        kept.add(keys_of(number), np.full((1, 2), number, np.float32))
        if number == 50:
            next(iter(tmp_path.glob("*.safetensors"))).write_bytes(b"broken")
    assert len(list(tmp_path.iterdir())) <= row_cache._MOST_FILES + 1
    values, found = kept.read(keys_of(*range(100)))
    assert found.sum() >= 99 - row_cache._MOST_FILES  # all but what was in the broken file
    assert (values[found] == np.arange(100)[found][:, None]).all()


def add_many(folder: Path, start: int) -> None:
    kept = RowCache(folder, 2, np.float32)
    for number in range(start, start + 60):
        kept.add(keys_of(number), np.full((1, 2), number, np.float32))


def test_two_processes_add_at_once(tmp_path):
    context = get_context("fork")
    workers = [context.Process(target=add_many, args=(tmp_path, start)) for start in (0, 60)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    values, found = RowCache(tmp_path, 2, np.float32).read(keys_of(*range(120)))
    # A row may be lost to a reader that joined files meanwhile, and is then computed again; none is wrong.
    assert (values[found] == np.arange(120)[found][:, None]).all()
    assert found.mean() > 0.5


def test_a_image_is_known_by_its_file_or_its_pixels(make_folder, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "data", count=3)
    source = open_dataset(str(root))
    before = image_keys(source, np.arange(9), "RGB")
    assert len(set(before.tolist())) == 9
    monkeypatch.chdir(tmp_path)
    assert (image_keys(open_dataset("data"), np.arange(9), "RGB") == before).all(), "a relative path is the same file"
    path = root / source.paths[4]
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    changed = image_keys(source, np.arange(9), "RGB") != before
    assert np.flatnonzero(changed).tolist() == [4]
    other, state = root / source.paths[7], (root / source.paths[7]).stat()
    other.write_bytes(other.read_bytes()[::-1])
    os.utime(
        other, ns=(state.st_atime_ns, state.st_mtime_ns)
    )  # as `cp -p` and `tar` leave it: of the same size and time
    changed = image_keys(source, np.arange(9), "RGB") != before
    assert np.flatnonzero(changed).tolist() == [4, 7]
    # The digits are no files: a file that happens to have their name is not meant.
    digits = open_dataset("digits")
    own = image_keys(digits, np.arange(1797), "L")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "0000").write_bytes(b"another")
    assert (image_keys(digits, np.arange(1797), "L") == own).all()
    assert len(set(own.tolist())) == 1797


# --- the command


def tiny_config(**changes) -> ViTConfig:
    return ViTConfig(
        **{"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3} | changes
    )


@pytest.fixture
def model(tmp_path) -> Path:
    """A model file with a head for other classes than the data's."""
    config = tiny_config(num_classes=5)
    header = load("nano4").header
    changes = {"architecture": config, "labels": tuple("abcde"), "preprocess": small(header.preprocess)}
    path = tmp_path / "own.safetensors"
    save_model(path, ViT(config).state_dict(), replace(header, **changes))
    return path


def replace(header, **changes):
    import dataclasses

    return dataclasses.replace(header, **changes)


def small(preprocess):
    return replace(preprocess, image_size=16, channels=3, crop_fraction=1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_probe_of_digits(tmp_path, cache, capsys):
    out = tmp_path / "p.json"
    assert run(["probe", "nano2", "digits", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["ridge"] > 0.8 and found["logistic"] > 0.8 and found["knn"] > 0.2
    assert (found["num_train"], found["num_images"], found["split"]) == (1438, 359, "val")
    assert (found["from_cache"], found["computed"], found["k"]) == (0, 1797, 20)
    assert set(found["seconds_each"]) == {"model", "data", "features", "knn", "ridge", "logistic"}
    assert found["seconds"] == pytest.approx(sum(found["seconds_each"].values()), abs=0.2)
    assert found["labels"] == list("0123456789")
    assert found["converged"] is True
    assert "random weights" in text and found["cache"] in text and "next:    vitrail probe nano2 digits --save" in text
    assert Path(found["cache"]).parent == cache / "features"
    # Once more: the same figures, and nothing computed.
    again = probed("nano2", "digits")
    assert (again["from_cache"], again["computed"]) == (1797, 0)
    same = ("knn", "ridge", "logistic", "lambda", "alpha", "fingerprint")
    assert {key: again[key] for key in same} == {key: found[key] for key in same}


def test_only_what_changed_is_computed(model, make_folder, tmp_path, cache):
    data = make_folder(tmp_path / "data")
    assert probed(model, data)["computed"] == 60
    PIL.Image.new("RGB", (16, 16), (250, 1, 1)).save(data / "flat" / "004.png")
    for number in range(10):
        shutil.copy(data / "steep" / f"{number:03d}.png", data / "steep" / f"new{number}.png")
    found = probed(model, data)
    assert (found["from_cache"], found["computed"]) == (59, 11)
    assert probed(model, data)["computed"] == 0
    assert probed(model, data, fresh=True)["computed"] == 70
    assert probed(model, data)["computed"] == 0


def test_features_from_the_cache_are_those_of_the_model(model, make_folder, tmp_path, cache):
    data = make_folder(tmp_path / "data", count=5)
    probed(model, data)
    classifier, source = load(model), open_dataset(str(data))
    (folder,) = (cache / "features").iterdir()
    keys = image_keys(source, np.arange(15), "RGB")
    rows, found = RowCache(folder, 24, np.float32).read(keys)
    assert found.all()
    pixels = [classifier.preprocess.apply(source.read(i, "RGB")) for i in range(15)]
    images = classifier.preprocess.normalise(torch.from_numpy(np.stack(pixels)))
    with torch.inference_mode():
        wanted = classifier.model.features(images)["pooled"]
    torch.testing.assert_close(torch.from_numpy(rows), wanted, rtol=1e-5, atol=1e-5)


def test_other_weights_sizes_and_preprocessing_are_kept_apart(model, make_folder, tmp_path, cache):
    data = make_folder(tmp_path / "data")
    first = probed(model, data)
    assert probed(model, data, image_size=24)["computed"] == 60
    vit, header = load_model(model)
    preprocess = replace(header.preprocess, mean=(0.4, 0.5, 0.5))
    save_model(tmp_path / "mean.safetensors", vit.state_dict(), replace(header, preprocess=preprocess))
    assert probed(tmp_path / "mean.safetensors", data)["computed"] == 60
    # Another head: the same features.
    torch.nn.init.normal_(vit.head.weight)
    save_model(tmp_path / "head.safetensors", vit.state_dict(), header)
    other = probed(tmp_path / "head.safetensors", data)
    assert (other["computed"], other["cache"]) == (0, first["cache"])
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias[3] += 1e-3
    save_model(tmp_path / "weight.safetensors", vit.state_dict(), header)
    assert probed(tmp_path / "weight.safetensors", data)["computed"] == 60
    assert len(list((cache / "features").iterdir())) == 4


@pytest.mark.parametrize("kind", ["features", "scans"])
def test_a_truncated_cache_is_computed_again(model, make_folder, tmp_path, cache, kind):
    data = make_folder(tmp_path / "data")
    first = probed(model, data)
    (path,) = (cache / kind).rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    again = probed(model, data)
    assert again["computed"] == (60 if kind == "features" else 0)
    assert (again["knn"], again["fingerprint"]) == (first["knn"], first["fingerprint"])


def test_a_cache_that_cannot_be_written_is_a_warning(model, make_folder, tmp_path, monkeypatch, capsys):
    data = make_folder(tmp_path / "data", count=6)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file" / "cache"))
    assert run(["probe", str(model), str(data)]) == 0
    assert "the features could not be cached" in capsys.readouterr().out


def test_a_kept_look_finds_what_a_look_finds(model, make_folder, tmp_path, cache, capsys):
    data = make_folder(tmp_path / "data")
    shutil.copy(data / "flat" / "001.png", data / "flat" / "zzz.png")
    shutil.copy(data / "flat" / "002.png", data / "slant" / "zzz.png")
    words = ["probe", str(model), str(data), "--out", str(tmp_path / "p.json")]
    assert run(words) == 0
    first, found = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "the same image is in two classes" in first
    assert run(words) == 0
    second = capsys.readouterr().out
    assert [line for line in first.splitlines() if "warning" in line] == [
        line for line in second.splitlines() if "warning" in line
    ]
    assert json.loads((tmp_path / "p.json").read_text())["fingerprint"] == found["fingerprint"]
    # A file that is broken now is named, though it was whole at the first look.
    path = data / "steep" / "007.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert run(words) == 1
    assert "steep/007.png" in capsys.readouterr().err
    for _ in range(2):  # also when its look could have been kept
        assert run([*words, "--data.damaged", "keep"]) == 0
        assert "steep/007.png" in capsys.readouterr().out
    assert run([*words, "--data.damaged", "drop"]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["num_left_out"] == 1


def test_a_model_without_a_head_works(make_folder, tmp_path, cache):
    config = tiny_config(num_classes=0, decoder="token_mean")
    header = replace(
        load("nano4").header, architecture=config, labels=(), preprocess=small(load("nano4").header.preprocess)
    )
    save_model(tmp_path / "bare.safetensors", ViT(config).state_dict(), header)
    found = probed(tmp_path / "bare.safetensors", make_folder(tmp_path / "data"), save=tmp_path / "new.safetensors")
    assert found["num_features"] == 48
    made, header = load_model(tmp_path / "new.safetensors")
    assert made.head.weight.shape == (3, 48) and header.labels == ("flat", "slant", "steep")


def test_the_saved_model_is_the_logistic_regression(model, make_folder, tmp_path, cache, capsys):
    data, saved, out = make_folder(tmp_path / "data", count=40), tmp_path / "new.safetensors", tmp_path / "e.json"
    assert run(["probe", str(model), str(data), "--save", str(saved), "--out", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert f"vitrail eval {saved} {data}" in capsys.readouterr().out
    assert run(["eval", str(saved), str(data), "--out", str(out)]) == 0
    judged = json.loads(out.read_text())
    assert judged["top1"] == found["logistic"]
    assert (judged["split"], judged["fingerprint"]) == (found["split"], found["fingerprint"])
    assert judged["labels"] == ["flat", "slant", "steep"]
    assert run(["probe", str(saved), str(data)]) == 0  # a probe of it: the same features
    assert "0 images computed, 120 from the cache" in capsys.readouterr().out


def test_the_runs_own_division_is_kept(tiny_run, tmp_path, cache):
    done, data = tiny_run
    split = json.loads((done / "split.json").read_text())
    found = probed(done, data, save=tmp_path / "new.safetensors")
    assert (found["fingerprint"], found["split"]) == (split["fingerprint"], "val")
    assert found["num_images"] == len(split["splits"]["val"])
    assert load_model(tmp_path / "new.safetensors")[1].split["fingerprint"] == split["fingerprint"]


def photographs(root: Path, *, train: int, test: int, shift: int = 0) -> Path:
    """Crops of two photographs as two classes, in parts of their own."""
    for label, photo in zip(("china", "flower"), load_sample_images()["images"], strict=True):
        for part, count in (("train", train), ("test", test)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                left, top = (number * 37 + shift) % 500, (number * 53 + 7 * (part == "test")) % 300
                crop = PIL.Image.fromarray(photo[top : top + 100, left : left + 120])
                crop.save(root / part / label / f"{number}.jpg")
    return root


def test_photographs_in_their_own_parts(tmp_path, cache, capsys):
    data, saved = photographs(tmp_path / "photos", train=30, test=21), tmp_path / "new.safetensors"
    found = probed("nano16", data, image_size=64, save=saved)
    assert (found["split"], found["num_train"], found["num_images"]) == ("test", 60, 42)
    assert found["logistic"] > 0.7
    assert run(["eval", str(saved), str(data), "--out", str(tmp_path / "e.json")]) == 0
    judged = json.loads((tmp_path / "e.json").read_text())
    assert (judged["top1"], judged["split"]) == (found["logistic"], "test")


def test_what_is_evaluated_was_never_fitted(model, make_folder, tmp_path, cache, monkeypatch):
    from vitrail.evaluation import probe as module

    data = make_folder(tmp_path / "data")
    for number in range(20):  # every image twice: the copies must stay on one side
        for label in ("flat", "steep", "slant"):
            shutil.copy(data / label / f"{number:03d}.png", data / label / f"copy{number:03d}.png")
    seen = {}
    monkeypatch.setattr(
        module, "fit_classifiers", lambda *given: seen.update(given=given) or ({"logistic": 0.0}, None, None)
    )
    found = probed(model, data)
    known, asked = seen["given"][0], seen["given"][2]
    assert (len(known), len(asked)) == (found["num_train"], found["num_images"]) == (96, 24)
    assert torch.cdist(known, asked).min() > 1e-4, "an image that is evaluated was fitted"


def test_the_parts_that_are_not_reported_change_nothing(model, tmp_path, cache):
    data = photographs(tmp_path / "photos", train=12, test=10)
    without = probed(model, data)
    shutil.copytree(data / "test", data / "val")
    for path in (data / "val").rglob("*.jpg"):  # a val/ of images that contradict everything
        PIL.Image.open(path).rotate(90).resize((100, 100)).save(path)
    (data / "val" / "china").rename(data / "val" / "x")
    (data / "val" / "flower").rename(data / "val" / "china")
    (data / "val" / "x").rename(data / "val" / "flower")
    found = probed(model, data)
    same = ("knn", "ridge", "logistic", "lambda", "alpha", "num_train", "num_images", "split")
    assert {key: found[key] for key in same} == {key: without[key] for key in same}
    assert found["computed"] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no classes", "no class folders found"),
        ("one class", "only one class ('cat')"),
        ("one image", "no images for validation"),
        ("empty class", "class 'dog' has no images"),
        ("unknown class", "unknown class 'bird'"),
        ("no train", "no images to train on"),
        ("broken", "--data.damaged drop"),
        ("missing", "no such folder"),
    ],
)
def test_bad_data_gets_one_clear_message(spoil, message, model, tmp_path, cache, capsys):
    root = tmp_path / "data"
    part = {"unknown class": "train", "no train": "val"}.get(spoil, ".")
    names = {"no classes": (), "one class": ("cat",)}.get(spoil, ("cat", "dog"))
    counts = {"one image": 1, "empty class": 4}
    root.mkdir()
    for number, name in enumerate(names):
        (root / part / name).mkdir(parents=True)
        for index in range(0 if spoil == "empty class" and name == "dog" else counts.get(spoil, 6)):
            colour = (number * 99, index * 40 % 256, 9)
            PIL.Image.new("RGB", (16, 16), colour).save(root / part / name / f"{index}.png")
    if spoil == "unknown class":
        shutil.copytree(root / "train" / "cat", root / "val" / "bird")
    if spoil == "no train":
        shutil.copytree(root / "val", root / "test")
    if spoil == "broken":
        (root / "cat" / "3.png").write_bytes(b"no image")
    data = tmp_path / "nowhere" if spoil == "missing" else root
    assert run(["probe", str(model), str(data)]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error


def test_bad_words_get_one_clear_message(model, make_folder, tmp_path, cache, capsys):
    data = make_folder(tmp_path / "data", count=4)
    for words, code, message in (
        (["nano4"], 2, "DATA"),
        (["/no/run", str(data)], 1, "/no/run: no such run folder or model file"),
        ([str(model), str(data), "--save", str(tmp_path / "a.pt")], 1, "ends in .safetensors"),
        ([str(model), str(data), "--save", str(tmp_path / "no" / "a.safetensors")], 1, "there is no folder"),
        ([str(model), str(data), "--save", str(model)], 1, "is the file of the probed model itself"),
        ([str(model), str(data), "--out", str(tmp_path / "no" / "a.json")], 1, "there is no folder"),
        ([str(model), str(data), "--data.damaged", "maybe"], 1, "data.damaged"),
        ([str(model), str(data), "--image-size", "2"], 1, "smaller than a patch"),
    ):
        assert run(["probe", *words]) == code
        said = capsys.readouterr()
        assert message in " ".join((said.out + said.err).split())


def test_a_class_with_one_image_is_fitted_and_named(model, make_folder, tmp_path, cache, capsys):
    data = make_folder(tmp_path / "data", count=8)
    (data / "lone").mkdir()
    PIL.Image.new("RGB", (16, 16), (9, 200, 90)).save(data / "lone" / "1.png")
    assert run(["probe", str(model), str(data), "--out", str(tmp_path / "p.json")]) == 0
    assert "val has no image of 1 classes: lone" in capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["labels"] == ["flat", "lone", "slant", "steep"]


def test_broken_weights_are_named(model, make_folder, tmp_path, cache):
    vit, header = load_model(model)
    with torch.no_grad():
        vit.norm.bias[0] = float("nan")
    save_model(tmp_path / "nan.safetensors", vit.state_dict(), header)
    with pytest.raises(ValueError, match="features are not finite"):
        probed(tmp_path / "nan.safetensors", make_folder(tmp_path / "data", count=4))
    assert not list((cache / "features").rglob("*.safetensors"))


def test_changed_training_data_is_refused(tiny_run, tmp_path, cache):
    done, data = tiny_run
    copy = tmp_path / data.name
    shutil.copytree(data, copy)
    alone = tmp_path / "model.safetensors"
    shutil.copy(done / "model.safetensors", alone)
    (copy / "flat" / "000.png").unlink()
    with pytest.raises(ValueError, match="its files have changed"):
        probed(alone, copy)


def test_data_settings_reach_the_division(model, make_folder, tmp_path, cache):
    found = probed(model, make_folder(tmp_path / "data"), data=DataConfig(val_fraction=0.1, test_fraction=0.3))
    assert (found["split"], found["num_train"], found["num_images"]) == ("test", 36, 18)
