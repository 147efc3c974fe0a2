"""Folders of transformers: the logits of the image file are transformers' own, and nothing is left out unsaid."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import transformers
from hf_folders import FAMILIES, save_family, their_answer, their_pixels, write_images
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import vitrail
from vitrail.cli import run
from vitrail.data.images.decode import read_image
from vitrail.data.images.preprocess import Preprocess
from vitrail.weights.formats.hf_image_processor import from_processor, to_processor
from vitrail.weights.resolve import open_weights
from vitrail.weights.user_spec import parse_description


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_alone() -> Iterator[None]:
    """No progress bars; and tensors this small gain nothing from a second thread."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    save_family("vit", folder)
    return folder


@pytest.fixture
def broken(vit_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the folder with settings changed; None takes one out."""

    def change(file: str = "config.json", **settings: object) -> Path:
        folder = Path(shutil.copytree(vit_folder, tmp_path / "broken"))
        merged = {**json.loads((folder / file).read_text()), **settings}
        (folder / file).write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
        return folder

    return change


def answer(classifier: vitrail.Classifier, path: Path) -> torch.Tensor:
    return classifier.logits([classifier.preprocess.apply(read_image(path))])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_image_files_are_transformers(name, tmp_path, images):
    model = save_family(name, tmp_path / "model")
    classifier = vitrail.load(f"hf:{tmp_path / 'model'}")
    assert len(images) == 10
    for path in images:
        wanted = their_answer(model, their_pixels(tmp_path / "model", path, backend="pil"))
        assert_close(answer(classifier, path), wanted, atol=1e-4, rtol=0)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_a_processor_called_fast_is_torchvisions(name, tmp_path, images):
    model = save_family(name, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["image_processor_type"] += "Fast"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    classifier = vitrail.load(tmp_path)
    assert classifier.preprocess.resampler == "torchvision"
    for path in images:
        wanted = their_answer(model, their_pixels(tmp_path, path, backend="torchvision"))
        assert_close(answer(classifier, path), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_transformers_turns_it(orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (13, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    theirs = transformers.image_utils.load_image(str(tmp_path / "turned.png"))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.asarray(theirs))


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "dinov3"])
def test_shards_pickles_and_names_of_version_5_hold_the_same_model(name, tmp_path):
    model = save_family(name, tmp_path / "whole")
    save_family(name, tmp_path / "shards", max_shard_size="6KB")
    model.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for kind, tensors in (
        ("pickle", load_file(tmp_path / "whole" / "model.safetensors")),
        ("memory", {key: value.clone() for key, value in model.state_dict().items()}),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / kind)
        (tmp_path / kind / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / kind / "pytorch_model.bin")
    whole = open_weights(tmp_path / "whole").weights
    for kind in ("shards", "pickle", "memory"):
        weights = open_weights(tmp_path / kind).weights
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weights[key], whole[key]) for key in whole)


def test_half_precision_is_read_as_float32_and_told(vit_folder, tmp_path):
    folder = Path(shutil.copytree(vit_folder, tmp_path / "half"))
    tensors = {key: value.bfloat16() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    opened = open_weights(folder)
    assert {value.dtype for value in opened.weights.values()} == {torch.float32}
    assert "stored as bfloat16, read as float32" in opened.report.notes


def test_the_report_names_what_is_left_out_and_what_is_resized(tmp_path):
    save_family("dinov2-registers", tmp_path)
    report = open_weights(tmp_path).report
    assert report.unexpected == ("embeddings.mask_token",)
    assert report.resized == ("pos_embed: 10×10 → 4×4 patches (bicubic, antialiased, as transformers)",)
    assert report.origin == str(tmp_path)
    assert report.loaded == 45


def test_labels_are_the_folders_or_numbered(vit_folder, broken):
    assert vitrail.load(vit_folder).labels == ("cat", "dog", "unknown bird")
    assert vitrail.load(broken(id2label=None)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_training_settings_and_doubtful_labels_are_told(broken):
    labels = {"0": "crane", "1": "crane", "2": "dog"}
    folder = broken(id2label=labels, hidden_dropout_prob=0.1, problem_type="multi_label_classification")
    notes = "\n".join(open_weights(folder).report.lines())
    assert "hidden_dropout_prob 0.1" in notes
    assert "labels that stand for several classes: crane" in notes
    assert "sigmoid" in notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 48}, r"q?.*is \(24, 3, 8, 8\), config.json wants \(48, 3, 8, 8\)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but its weights are of 2 layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers in config.json is '2'"),
        ({"qkv_bias": False}, "unknown: encoder.layer.0.attention.attention.key.bias"),
        ({"hidden_act": "gelu_10"}, "unknown hidden_act in config.json: 'gelu_10'; did you mean 'gelu'"),
        ({"image_size": [32, 64]}, r"image_size in config.json is \[32, 64\]; only squares"),
        ({"image_size": 64}, r"position_embeddings is \(1, 17, 24\), config.json wants \(1, 65, 24\)"),
        ({"image_size": 10**6}, "expected at most 8192"),
        ({"image_size": 0}, "image_size in config.json is 0"),
        ({"patch_size": 7}, "not a multiple of model.patch_size 7"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps in config.json is nan"),
        ({"num_channels": 4}, "in_channels is 4"),
        ({"model_type": "dinov4"}, "did you mean 'dinov2'"),
        ({"model_type": "deit"}, "are not those of the model_type"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map in config.json names code of its own"),
        ({"quantization_config": {"bits": 8}}, "quantised weights cannot be read"),
        ({"id2label": {"0": "cat", "1": "dog"}}, "id2label names 2 classes, expected 0 to 2"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(broken, settings, message):
    with pytest.raises(ValueError, match=message):
        open_weights(broken(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "SegformerImageProcessor"}, "unknown image processor 'SegformerImageProcessor'"),
        ({"do_pad": True}, "do_pad is true"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True, a step that is unknown"),
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 9}, "resample is 9"),
        ({"size": {"height": 32, "width": 48}}, "expected a square"),
        ({"size": {"longest_edge": 48}}, "expected height and width, or shortest_edge alone"),
        ({"size": {"shortest_edge": 48}}, "shortest_edge without a centre crop"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": 40}, "black border"),
        ({"size": 10**7}, "expected pixels"),
        ({"size": 36}, "image_size 36 is not a multiple of model.patch_size 8"),
        ({"image_mean": [0.5]}, None),
        ({"image_mean": [0.5, 0.5]}, "expected 3 numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "every std above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
    ],
)
def test_preprocessing_that_cannot_be_done_is_refused(broken, settings, message):
    folder = broken("preprocessor_config.json", **settings)
    if message is None:
        assert vitrail.load(folder).preprocess.mean == (0.5, 0.5, 0.5)
        return
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(folder)
    assert str(folder) in str(caught.value)


def test_settings_of_rotary_positions_that_cannot_be_expressed_are_refused(tmp_path):
    save_family("dinov3", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"rope_theta": 10000.0}, "rope_theta"), ({"rope_scaling": {"factor": 2}}, "rope_scaling")):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path)


def test_a_folder_without_preprocessor_wants_a_description(broken):
    folder = broken()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config.json: no such file.*--describe mean=0.5"):
        open_weights(folder)
    with pytest.raises(ValueError, match="describe resize, interpolation too"):
        open_weights(folder, parse_description(["mean=0.5", "std=0.5"]))
    arguments = [
        "mean=0.1,0.2,0.3",
        "std=0.5",
        "resize=crop",
        "crop_fraction=0.8",
        "interpolation=bilinear",
        "labels=a,b,c",
    ]
    header = open_weights(folder, parse_description(arguments)).header
    assert header.labels == ("a", "b", "c")
    assert header.preprocess == Preprocess(
        image_size=32, channels=3, resize="crop", crop_fraction=0.8, interpolation="bilinear", mean=(0.1, 0.2, 0.3)
    )
    with pytest.raises(ValueError, match="embed_dim cannot be described"):
        open_weights(folder, {"embed_dim": 24})


def _spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "rubbish":
        weights.write_bytes(b"\x00" * 64)
    elif how == "no weights":
        weights.unlink()
    elif how == "no json":
        (folder / "config.json").write_text("{'model_type': 'vit'")
    elif how == "a tensor gone":
        tensors = load_file(weights)
        del tensors["vit.layernorm.bias"], tensors["vit.encoder.layer.0.attention.attention.key.bias"]
        save_file({**tensors, "vit.extra": torch.zeros(1)}, weights)
    elif how == "a tensor twice":
        save_file({**load_file(weights), "layernorm.bias": torch.zeros(24)}, weights)
    elif how == "quantised":
        save_file({key: value.to(torch.int8) for key, value in load_file(weights).items()}, weights)
    elif how == "shard outside":
        weights.rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"a": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "shard gone":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how.startswith("a tensor in"):
        tensors = load_file(weights)
        weights.unlink()
        one, two = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
        save_file(tensors, folder / one)
        save_file({"vit.layernorm.bias": torch.ones(24)} if "two" in how else {"vit.more": torch.ones(2)}, folder / two)
        index = {
            "weight_map": {**dict.fromkeys(tensors, one), "vit.layernorm.bias" if "two" in how else "vit.extra": two}
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "cut pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:500])
        weights.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("rubbish", "not a whole safetensors file"),
        ("no weights", "has no weights; expected one of model.safetensors"),
        ("no json", "is not JSON"),
        ("a tensor gone", "missing: encoder.layer.0.attention.attention.key.bias, layernorm.bias"),
        ("a tensor gone", "unknown: extra"),
        ("a tensor twice", "has both vit.layernorm.bias and layernorm.bias"),
        ("quantised", "quantised weights cannot be read"),
        ("shard outside", "expected weights beside it"),
        ("shard gone", "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
        ("cut pickle", "not a whole file of PyTorch weights"),
        ("a tensor in two shards", "holds vit.layernorm.bias, which another shard holds as well"),
        ("a tensor in no shard", "has no vit.extra, which model.safetensors.index.json says it holds"),
    ],
)
def test_a_broken_folder_is_one_clear_error(broken, capsys, images, how, message):
    folder = broken()
    _spoil(folder, how)
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(f"hf:{folder}")
    assert str(folder) in str(caught.value)
    assert run(["predict", str(folder), str(images[0])]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message.split(";")[0].split(":")[0] in error


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(broken, tmp_path, zipped):
    folder, executed = broken(), tmp_path / "executed"
    weights = {**load_file(folder / "model.safetensors"), "bomb": _Bomb(executed)}
    (folder / "model.safetensors").unlink()
    if zipped:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: holds Python objects or code besides tensors, which is never run"
    ):
        open_weights(folder)
    assert not executed.exists()


def test_a_model_without_classifier_says_so(tmp_path, images, make_folder, capsys):
    save_family("dinov2-swiglu", tmp_path / "model")
    data = make_folder(tmp_path / "data", count=2)
    assert answer(vitrail.load(tmp_path / "model"), images[0]).shape == (1, 24)
    for words in (["predict", str(images[0])], ["eval", str(data)]):
        assert run([words[0], str(tmp_path / "model"), *words[1:]]) == 1
        assert "this model has no classifier" in capsys.readouterr().err


def test_what_is_resized_and_left_out_is_said_by_predict(tmp_path, images, capsys):
    save_family("dinov2", tmp_path)
    assert run(["predict", f"hf:{tmp_path}", str(images[0])]) == 0
    told = "".join(capsys.readouterr())
    assert "10×10 → 4×4 patches" in told
    assert "unexpected (left out): embeddings.mask_token" in told


def test_predict_and_eval_take_a_folder(vit_folder, tmp_path, make_folder, capsys):
    data = make_folder(tmp_path / "data", classes=("cat", "dog", "unknown bird"), count=4)
    assert run(["eval", f"hf:{vit_folder}", str(data), "--out", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["num_images"] == 12
    assert figures["labels"] == ["cat", "dog", "unknown bird"]
    assert run(["predict", str(vit_folder), str(data), "--out", str(tmp_path / "rows.csv")]) == 0
    assert "unknown bird" in (tmp_path / "rows.csv").read_text()


@pytest.mark.parametrize("name", ["vit", "vit-gelu-tanh", "deit", "dinov2", "dinov3"])
def test_preprocessing_goes_there_and_back(name, tmp_path):
    save_family(name, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    preprocess, _ = from_processor(settings, "", 3)
    written, _ = to_processor(preprocess)
    assert from_processor(written, "", 3)[0] == preprocess


@pytest.mark.parametrize(
    ("settings", "kind", "wanted"),
    [
        ({"size": 224, "feature_extractor_type": "ViTFeatureExtractor"}, "", ("squash", 224, "bilinear")),
        (
            {"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"},
            "",
            ("squash_crop", 224, "bicubic"),
        ),
        ({"size": {"shortest_edge": 256}, "image_processor_type": "BitImageProcessor"}, "", ("crop", 224, "bicubic")),
        ({}, "BitImageProcessor", ("crop", 224, "bicubic")),
    ],
)
def test_older_forms_of_preprocessing_are_known(settings, kind, wanted):
    preprocess, _ = from_processor(settings, kind, 3)
    assert (preprocess.resize, preprocess.image_size, preprocess.interpolation) == wanted


ASK = """
import sys
from vitrail.weights.resolve import open_weights
for model_spec in sys.argv[1:]:
    try:
        report = open_weights(model_spec).report
        print(report.origin, *report.notes, sep="|")
    except ValueError as error:
        print("ERROR", error)
"""
COMMIT = "0123456789" * 4


def ask(model_specs: list[str], **environment: str) -> list[str]:
    """Open models in a process of its own, since huggingface_hub reads its settings once; return a line for each."""
    package_folder = str(Path(vitrail.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", ASK, *model_specs],
        env={"PATH": "", "PYTHONPATH": package_folder, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip().splitlines()


@pytest.mark.slow
def test_without_a_network_the_cache_is_used_or_one_message_says_what_to_do(vit_folder, tmp_path):
    model = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(vit_folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    model_specs = ["hf:owner/tiny", f"hf:owner/tiny@{COMMIT}", "hf:owner/other"]
    newest, pinned, missing = ask(model_specs, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert newest == f"hf:owner/tiny@{COMMIT}|no network: the cached copy of commit {COMMIT} is used"
    assert pinned == f"hf:owner/tiny@{COMMIT}"
    assert missing.startswith("ERROR hf:owner/other: HF_HUB_OFFLINE is set, and the cache at")
    assert missing.endswith("it has owner/tiny. Load it once with a network, or name a folder: hf:FOLDER")


class _Hub(BaseHTTPRequestHandler):
    """A hub with one model; every other name is answered as the hub answers what cannot be had."""

    folder: Path
    asked: ClassVar[list[str]] = []
    refusals: ClassVar[dict[str, tuple[int, str]]] = {
        "gated": (403, "GatedRepo"),
        "nobody": (404, "RepoNotFound"),
        "v1": (404, "RevisionNotFound"),
        "down": (503, ""),
    }

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        for name, (status, code) in self.refusals.items():
            if name in self.path.split("/"):
                return self.answer(b"", status, {"X-Error-Code": code})
        names = [path.name for path in self.folder.iterdir()]
        if "/resolve/" in self.path:
            content = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes()
            return self.answer(content, 200, {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT})
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        tree = [{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in names]
        info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self.answer(json.dumps(tree if "/tree/" in self.path else info).encode(), 200, {})

    def answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.slow
def test_a_hub_is_asked_once_for_what_is_needed_and_its_refusals_are_one_message(vit_folder, tmp_path):
    _Hub.folder = Path(shutil.copytree(vit_folder, tmp_path / "served"))
    (_Hub.folder / "README.md").write_text("not needed")
    (_Hub.folder / "pytorch_model.bin").write_text("nor this, beside safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    model_specs = [
        "hf:owner/tiny",
        f"hf:owner/tiny@{COMMIT}",
        "hf:owner/gated",
        "hf:owner/nobody",
        "hf:owner/tiny@v1",
        "hf:owner/down",
    ]
    try:
        answers = ask(model_specs, **environment)
    finally:
        server.shutdown()
        server.server_close()
    assert answers[:2] == [f"hf:owner/tiny@{COMMIT}"] * 2
    fetched = [path.rsplit("/", 1)[1] for path in _Hub.asked if "/resolve/" in path]
    assert set(fetched) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert sum(COMMIT in path and "/resolve/" not in path and "/tree/" not in path for path in _Hub.asked) == 0
    for answer, message in zip(
        answers[2:],
        (
            "hf:owner/gated: is gated; accept its terms at https://huggingface.co/owner/gated",
            "hf:owner/nobody: no such model on the hub, or it is private",
            "hf:owner/tiny@v1: has no such revision; expected a branch, a tag or a commit",
            "hf:owner/down: the hub is not reached",
        ),
        strict=True,
    ):
        assert answer.startswith(f"ERROR {message}")
    (unreached,) = ask(["hf:owner/other"], **environment)
    assert unreached.startswith("ERROR hf:owner/other: the hub is not reached")
    assert unreached.endswith("it has owner/tiny. Load it once with a network, or name a folder: hf:FOLDER")


@pytest.mark.parametrize(
    ("model_spec", "message"),
    [
        ("hf:./nowhere", "nowhere: no such folder"),
        ("hf:/no/where", "/no/where: no such folder"),
        ("hf:a b", "expected OWNER/NAME"),
        ("hf:owner/name@", "expected OWNER/NAME"),
        ("hf:", "hf: needs a name or a folder"),
        ("timm:", "timm: needs a name or a folder"),
        ("hf:a/b/c", "hf:a/b/c: no such folder, and names on the hub are OWNER/NAME"),
        ("timm:hf-hub:a b", "timm:hf-hub:a b: expected OWNER/NAME"),
    ],
)
def test_model_specs_that_name_nothing_are_refused(model_spec, message):
    with pytest.raises(ValueError, match=message):
        open_weights(model_spec)


def test_a_folder_may_be_at_home(vit_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(vit_folder.parent))
    assert open_weights("hf:~/vit").header == open_weights(vit_folder).header


def test_a_file_that_is_no_model_is_told(tmp_path):
    for name in ("a.jpg", "config.json"):
        (tmp_path / name).write_bytes(b"\x89" * 100)
        with pytest.raises(ValueError, match=f"{name}: is no model; expected a run folder, a model file"):
            open_weights(tmp_path / name)


def test_descriptions_have_the_types_of_their_fields(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    arguments = ["embed_dim=24", "qkv_bias=false", "mlp=relu", "std=0.5,0.25,1", f"labels={tmp_path / 'names.txt'}"]
    assert parse_description(arguments) == {
        "embed_dim": 24, "qkv_bias": False, "mlp": "relu", "std": (0.5, 0.25, 1.0), "labels": ("cat", "dog")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mean", "expected KEY=VALUE"),
        ("maen=0.5", "did you mean 'mean'"),
        ("embed_dim=wide", "expected int"),
        ("qkv_bias=1", "expected true or false"),
        ("labels=names.txt", "no such file"),
        ("labels=a,,b", "a label is empty"),
    ],
)
def test_impossible_descriptions_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        parse_description([argument])
    with pytest.raises(ValueError, match="given twice"):
        parse_description(["mean=0.5", "mean=0.5"])
