"""CNN encoders and patch sizes through a whole training: frozen modules, statistics, weights, resume, evaluation."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitrail.api import train
from vitrail.cli import run as vitrail
from vitrail.config import RunConfig, save_config
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.data.images.preprocess import Preprocess
from vitrail.evaluation.classifier import load
from vitrail.evaluation.evaluate import evaluate
from vitrail.models.cnns import build_cnn, feature_strides, load_pretrained
from vitrail.models.config import ViTConfig
from vitrail.models.cost import num_macs, num_parameters
from vitrail.models.variants import variant_config
from vitrail.models.vit import ViT
from vitrail.recipes import DatasetFacts, build_config
from vitrail.training.frozen import freeze, running_statistics, scale_bn_momentum
from vitrail.weights.model_file import ModelHeader, load_model, save_model

QUIET = Console(quiet=True)
SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=3, embed_dim=24, depth=1, num_heads=3)
FACTS = DatasetFacts(2000, 3, 32, True, 3, "", "cpu", False)


@pytest.fixture
def settings(tiny):
    return {name: value for name, value in tiny.items() if name != "variant"} | {"model": "nano8-resnet18"}


@pytest.fixture
def cnn_file(tmp_path):
    """Weights of a whole timm CNN, as its trainer would have left them."""
    torch.manual_seed(5)
    net = timm.create_model("resnet18", num_classes=11)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    save_file(net.state_dict(), tmp_path / "resnet18.safetensors")
    return tmp_path / "resnet18.safetensors"


def backbone_of(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    start = f"{prefix}patch_embed.backbone."
    return {name.removeprefix(start): each for name, each in load_file(path).items() if name.startswith(start)}


@pytest.mark.slow
def test_a_frozen_encoder_keeps_weights_and_statistics_to_the_bit(make_folder, tmp_path, settings, cnn_file):
    data = make_folder(tmp_path / "data")
    freezing = {"optim.freeze": ("patch_embed.backbone",), "encoder_weights": str(cnn_file), "optim.ema_decay": 0.5}
    run = train(data, out=tmp_path / "run", console=QUIET, **settings, **freezing).folder
    source = load_file(cnn_file)
    for prefix, path in (("", run / "model.safetensors"), ("objective.model.", run / "last" / "state.safetensors")):
        weights = backbone_of(path, prefix)
        assert len(weights) > 10
        assert all(torch.equal(tensor, source[name]) for name, tensor in weights.items())
    before, after = ViT(load(run).model.config), load(run).model
    assert not torch.equal(before.patch_embed.proj.weight, after.patch_embed.proj.weight), "the projection learns"
    assert load(run).preprocess.mean == (0.485, 0.456, 0.406), "pretrained nets expect ImageNet's normalisation"


@pytest.mark.slow
def test_a_trained_encoder_moves_weights_and_statistics(make_folder, tmp_path, settings, cnn_file):
    data = make_folder(tmp_path / "data")
    run = train(data, out=tmp_path / "run", console=QUIET, encoder_weights=str(cnn_file), **settings).folder
    source, trained = load_file(cnn_file), backbone_of(run / "model.safetensors")
    assert not torch.equal(trained["conv1.weight"], source["conv1.weight"])
    assert not torch.equal(trained["bn1.running_mean"], source["bn1.running_mean"])
    metrics = evaluate(str(run), str(data), split="val", device=torch.device("cpu"), console=QUIET)
    recorded = json.loads((run / "evaluation.json").read_text())["val"]
    assert metrics["top1"] == recorded["top1"]
    assert metrics["loss"] == recorded["loss"], "the averaged statistics are in the model file"


@pytest.mark.slow
def test_resume_with_batch_norm_average_and_accumulation_is_bit_identical(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=24)
    arguments = [sys.executable, "-m", "vitrail", "train", str(data), "--out"]
    more = ["--model", "nano8-resnet18", "--model.depth", "1", "--batch-size", "16", "--optim.accumulate", "2"]
    more += ["--optim.ema-decay", "0.9", "--log.save-minutes", "0.0001", "--epochs", "4"]
    subprocess.run([*arguments, str(tmp_path / "whole"), *more], check=True, capture_output=True)
    cut = tmp_path / "cut"
    process = subprocess.Popen([*arguments, str(cut), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (cut / "last" / "state.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert json.loads((cut / "run.json").read_text())["status"] != "finished"
    subprocess.run([*arguments, str(cut), "--resume"], check=True, capture_output=True)
    for name in ("model.safetensors", "last/state.safetensors"):
        ours, theirs = load_file(tmp_path / "whole" / name), load_file(cut / name)
        assert ours.keys() == theirs.keys()
        assert any("running_mean" in key for key in ours)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.slow
def test_two_processes_keep_one_set_of_statistics(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=24)
    program = """
import sys, torch
import torch.distributed as dist
from vitrail import distributed
from vitrail.training import loop
from vitrail.console import Console
from vitrail.api import train
seen = {}
original = loop.evaluate_and_save_best
def spy(session, state, *rest):
    seen.update({name: each.clone() for name, each in state.objective.model.named_buffers() if "running" in name})
    return original(session, state, *rest)
loop.evaluate_and_save_best = spy
settings = {"model.depth": 1, "epochs": 1.0, "batch_size": 16, "model.drop_path": 0.0}
train(sys.argv[1], out=sys.argv[2], model="nano8-resnet18", console=Console(quiet=True), **settings)
assert len(seen) > 4
all_seen = [None, None]
dist.all_gather_object(all_seen, seen)
assert all(torch.equal(all_seen[0][name], all_seen[1][name]) for name in seen)
assert not torch.equal(seen["patch_embed.backbone.bn1.running_mean"], torch.zeros(64))
distributed.shutdown()
print("alike")
"""
    (tmp_path / "two.py").write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    done = subprocess.run(
        [*launcher, str(data), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("alike") == 2, done.stderr[-3000:]


def test_statistics_move_per_step_as_without_accumulation():
    torch.manual_seed(0)
    whole, in_steps = (nn.Sequential(nn.BatchNorm2d(3)).train() for _ in range(2))
    scale_bn_momentum(in_steps, 4)
    image = torch.randn(1, 3, 4, 4).expand(8, -1, -1, -1)  # all alike, so that each step has the batch's statistics
    whole(image)
    for _ in range(4):
        in_steps(image)
    torch.testing.assert_close(running_statistics(in_steps)[0], running_statistics(whole)[0])


def test_freezing_by_name():
    model = ViT(SMALL).train()
    freeze(model, ("blocks", "pos_embed"))
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"blocks", "pos_embed"}
    assert not model.blocks[0].training
    assert model.patch_embed.training
    with pytest.raises(ValueError, match="unknown part in optim.freeze 'block'; did you mean 'blocks'"):
        freeze(model, ("block",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model, tuple({name.split(".")[0] for name, _ in model.named_parameters()}))


def test_a_misspelt_module_leaves_no_run_behind(make_folder, tmp_path, settings):
    with pytest.raises(ValueError, match="patch_embed"):
        train(
            make_folder(tmp_path / "data"),
            out=tmp_path / "run",
            console=QUIET,
            **settings,
            **{"optim.freeze": ("patch_embd",)},
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_that_cannot_be_had_are_refused(make_folder, tmp_path, settings, cnn_file, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # its variable is read at import only
    data = make_folder(tmp_path / "data", count=4)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(cnn_file.read_bytes()[:5000])
    other = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, other)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (touched,))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    cases = {
        str(tmp_path / "none.pth"): "no such file",
        str(cut): "not a whole safetensors file",
        str(other): "are not the weights of timm's resnet18",
        str(tmp_path / "evil.pth"): "holds Python objects or code besides tensors, which is never run",
        "timm": "needs the network once",
    }
    for weights, message in cases.items():
        with pytest.raises(ValueError, match=message):
            train(data, out=tmp_path / "run", console=QUIET, encoder_weights=weights, **settings)
        assert not (tmp_path / "run").exists()
    assert not touched.exists(), "a pickle's code ran"
    with pytest.raises(ValueError, match="is for a CNN of timm as encoder"):
        override(RunConfig(), {"encoder_weights": "timm"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet5"}, "did you mean 'resnet50'"),
        ({"encoder": "con"}, "unknown model.encoder 'con'; did you mean 'conv'"),
        ({"encoder": "vit_tiny_patch16_224"}, "is no CNN"),
        (
            {"encoder": "resnet18", "image_size": 35, "patch_size": 7},
            "stride 2, 4, 8, 16, 32, not 7; try --model.patch_size 8",
        ),
        ({"encoder": "maxvit_tiny_rw_224", "image_size": 96, "patch_size": 16}, "cannot take images of 96 px"),
        ({"encoder": "hrnet_w18_small", "image_size": 64, "patch_size": 16}, "layers behind the map"),
    ],
)
def test_encoders_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ViT(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "conv", "image_size": 36, "patch_size": 12}, "patch_size must be a power of two"),
        ({"encoder": "conv", "embed_dim": 27, "patch_size": 8}, "multiple of 4 at model.patch_size 8, got 27"),
        ({"encoder": "r50"}, "stride 16 or 32, got model.patch_size 8"),
        ({"encoder": "conv", "patch_sizes": (4, 8)}, "patch_sizes is for model.encoder 'patch'"),
        ({"patch_sizes": (4, 16)}, "not among model.patch_sizes 4 16; add it, or try --model.patch_size 16"),
        ({"patch_sizes": (4, 5)}, "these divide it: 2 4 8 16"),
        ({"patch_sizes": (4, 4)}, "stand once"),
        ({"patch_sizes": (4, 8), "patch_norm": True}, "leave one of them out"),
        ({"positions": "rope2d", "embed_dim": 18}, "a head's width must be a multiple of 4"),
        ({"fc_norm": False}, "fc_norm has no effect with model.decoder 'token'"),
        ({"decoder": "token_mean", "class_token": False}, "reads the class token"),
        ({"mlp": "swigl"}, "did you mean 'swiglu'"),
        ({"init": "mimetik"}, "did you mean 'mimetic'"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_published_sizes_of_the_hybrid_and_of_h14():
    r50 = variant_config("b16-r50", num_classes=0)
    assert num_parameters(r50) == 97_890_112  # timm's vit_base_r50_s16_224 without head
    assert num_macs(r50) == pytest.approx(21.66e9, rel=0.007)
    h14 = variant_config("h14", num_classes=0)
    assert num_parameters(h14) == pytest.approx(630.8e6, rel=1e-3)
    assert num_macs(h14) == pytest.approx(167.4e9, rel=0.002)


def test_a_cnn_is_cut_after_its_map_and_takes_grey_images():
    assert feature_strides("efficientnet_b0") == (2, 4, 8, 16, 32)
    whole = sum(parameter.numel() for parameter in timm.create_model("efficientnet_b0", num_classes=0).parameters())
    net, channels = build_cnn("efficientnet_b0", 4, 1)
    assert channels == 24
    assert sum(parameter.numel() for parameter in net.parameters()) < whole / 50
    assert net(torch.rand(1, 1, 64, 64))[-1].shape == (1, 24, 16, 16)


def test_names_of_variants_reach_the_configuration():
    config, _ = build_config("auto", FACTS, {"variant": "micro4-resnet18-concat-rope2d"})
    assert (config.model.encoder, config.model.decoder, config.model.positions) == ("resnet18", "concat", "rope2d")
    assert config.preprocess.mean == (0.485, 0.456, 0.406)
    assert build_config("auto", FACTS, {"variant": "micro4-conv"})[0].preprocess.mean == (0.5, 0.5, 0.5)
    flexible, _ = build_config("auto", dataclasses.replace(FACTS, side=30), {"model.patch_sizes": (4, 8)})
    assert flexible.model.image_size == 32
    with pytest.raises(ValueError, match="unknown suffix in model 's16-resnet5': 'resnet5'; did you mean 'resnet50'"):
        variant_config("s16-resnet5")


@pytest.mark.slow
def test_many_patch_sizes_one_set_of_weights(make_folder, tmp_path, tiny, capsys):
    data = make_folder(tmp_path / "data", count=40)
    many = tiny | {"model.patch_sizes": (4, 8, 16), "epochs": 40.0, "variant": "nano4", "model.embed_dim": 48}
    run = train(data, out=tmp_path / "run", console=QUIET, **many).folder
    fixed = train(data, out=tmp_path / "fixed", console=QUIET, **{**many, "model.patch_sizes": ()}).folder
    for patch in (4, 8, 16):
        out = tmp_path / f"{patch}.json"
        flags = ["--split", "all", "--patch-size", str(patch), "--out", str(out)]
        assert vitrail(["eval", str(run), str(data), *flags]) == 0
        metrics = json.loads(out.read_text())
        assert metrics["patch_size"] == patch
        assert metrics["top1"] >= 0.7, f"patches of {patch}"  # a third by chance
        if patch > 4:
            assert vitrail(["eval", str(fixed), str(data), *flags]) == 0
            assert json.loads(out.read_text())["top1"] < 0.55, "one trained size does not carry to others"
    capsys.readouterr()
    assert vitrail(["eval", str(run), str(data), "--patch-size", "2"]) == 0
    assert "trained with patches of 4 8 16 px, not 2" in " ".join(capsys.readouterr().out.split())
    assert vitrail(["eval", str(run), str(data), "--image-size", "100000"]) == 1
    assert "expected at most 1024" in " ".join(capsys.readouterr().err.split())
    other = train(data, out=tmp_path / "other", console=QUIET, **{**tiny, "variant": "nano8-conv"}).folder
    assert vitrail(["eval", str(other), str(data), "--patch-size", "4"]) == 1
    assert "patches of 8 only" in capsys.readouterr().err


def test_every_step_has_its_patch_size(make_folder, tmp_path, tiny):
    from vitrail.data.loading.train_loader import TrainLoader
    from vitrail.data.setup import build_train_data, load_data

    data = make_folder(tmp_path / "data", count=8)
    config, _ = build_config("auto", FACTS, {**tiny, "data.source": str(data), "model.patch_sizes": (4, 8)})
    ready = build_train_data(load_data(config.data, QUIET), config)

    def sizes(start: int, stop: int, rank: int = 0) -> list[int | None]:
        stream = TrainLoader(
            ready.reader,
            ready.splits.indices["train"],
            batch_size=4,
            seed=1,
            augment=config.augment,
            device=torch.device("cpu"),
            patch_sizes=(4, 8),
            rank=rank,
            ranks=2,
        )
        return [batch.patch_size for batch in stream.batches(start, stop)]

    whole = sizes(0, 40)
    assert 8 < whole.count(4) < 32
    assert whole.count(4) + whole.count(8) == 40
    assert sizes(17, 40) == whole[17:], "a resumed run goes on with the same"
    assert sizes(0, 40, rank=1) == whole, "all processes cut alike"


def test_whole_images_in_their_own_aspect_ratio(tmp_path, make_folder, tiny, capsys):
    run = train(make_folder(tmp_path / "data"), out=tmp_path / "run", console=QUIET, **tiny).folder
    random, folder = np.random.default_rng(0), tmp_path / "mixed"
    for number, (width, height) in enumerate([(40, 20), (16, 16), (20, 40), (300, 3), (40, 20)]):
        (folder / ("flat", "steep", "slant")[number % 3]).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / ("flat", "steep", "slant")[number % 3] / f"{number}.png")
    wide = load(run).at(resize="aspect", image_size=32)
    paths = sorted(folder.rglob("*.png"))
    shapes = {wide.preprocess.apply(PIL.Image.open(path)).shape for path in paths}
    assert len(shapes) > 2
    assert all(side % 8 == 0 for shape in shapes for side in shape[1:])
    together = wide.predict(paths)
    for path, row in zip(paths, together, strict=True):
        assert row.probability == pytest.approx(wide.predict([path])[0].probability, abs=1e-5)
    metrics = evaluate(
        str(run), str(folder), split="all", device=torch.device("cpu"), console=QUIET, resize="aspect", image_size=32
    )
    right = sum(row.label == path.parent.name for row, path in zip(together, paths, strict=True))
    assert metrics["top1"] == pytest.approx(right / 5)
    assert metrics["resize"] == "aspect"
    assert vitrail(["predict", str(run), str(folder), "--resize", "aspect", "--image-size", "32"]) == 0
    assert vitrail(["predict", str(run), str(folder), "--resize", "aspekt"]) == 1
    assert "did you mean 'aspect'" in capsys.readouterr().err
    assert vitrail(["predict", str(run), str(folder), "--image-size", "4"]) == 1
    assert "smaller than a patch of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        ((400, 100), 16, (448, 112)),
        ((100, 400), 16, (112, 448)),
        ((224, 224), 16, (224, 224)),
        ((5000, 1), 16, (6272, 16)),
    ],
)
def test_aspect_sizes_by_hand(size, multiple, expected):
    preprocess = Preprocess(image_size=224, resize="aspect", multiple=multiple)
    assert preprocess.aspect_size(*size) == expected


def test_packing_is_for_evaluation():
    with pytest.raises(ValueError, match="call model.eval"):
        ViT(SMALL).train().forward_packed([torch.rand(3, 32, 32)])
    assert ViT(SMALL).eval().forward_packed([]).shape == (0, 3)


@pytest.mark.slow
def test_a_drawing_has_the_shapes_and_sums_of_the_model(capsys):
    for name in ("s16-resnet50-concat", "b16-r50", "ti4-conv-rope2d-attention", "nano4-swiglu-token_mean"):
        assert vitrail(["models", name]) == 0
        text = capsys.readouterr().out
        config = variant_config(name)
        counts = [
            int(word.replace(",", ""))
            for line in text.splitlines()
            if "parameters" in line
            for word in line.split()
            if word.replace(",", "").isdigit() and "," in word
        ]
        assert sum(counts) == pytest.approx(num_parameters(config), abs=1000)
        assert f"[B, {config.embed_dim}, {config.grid[0]}, {config.grid[1]}]" in text
        assert f"[B, {config.num_prefix + config.grid[0] * config.grid[1]}, {config.embed_dim}]" in text
    assert vitrail(["models", "s16-conca"]) == 1
    assert "did you mean 'concat'" in capsys.readouterr().err


def spoilt(state, how):
    if how == "prefix":
        return {f"backbone.{name}": value for name, value in state.items()}
    if how == "half":
        return {name: value for name, value in state.items() if "layer2" not in name and "blocks.2" not in name}
    return {"foo": torch.zeros(3)}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto", "mobilenetv3_small_050"])
def test_a_cnns_own_file_loads_whole_and_others_are_refused(name, tmp_path):
    net = timm.create_model(name, num_classes=5)
    for value in (*net.parameters(), *net.buffers()):  # values that no fresh net has
        if value.is_floating_point():
            value.data = torch.rand_like(value) + 0.5
    config = dataclasses.replace(SMALL, encoder=name)
    model, path = ViT(config), tmp_path / "net.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, path)
    load_pretrained(model.patch_embed.backbone, config, str(path))
    loaded = [each for each in model.patch_embed.backbone.state_dict().values() if each.is_floating_point()]
    assert len(loaded) > 5
    assert all(float(each.min()) >= 0.5 for each in loaded), "something stayed as it was"
    grey = dataclasses.replace(config, in_channels=1)
    load_pretrained(ViT(grey).patch_embed.backbone, grey, str(path))
    other = "resnet34" if name == "resnet18" else "resnet18"
    for how in ("prefix", "half", "other", "foo"):
        state = timm.create_model(other).state_dict() if how == "other" else spoilt(net.state_dict(), how)
        save_file(state, tmp_path / f"{how}.safetensors")
        with pytest.raises(ValueError, match=f"are not the weights of timm's {name}"):
            load_pretrained(model.patch_embed.backbone, config, str(tmp_path / f"{how}.safetensors"))


def test_constants_that_stand_in_no_file_are_there_after_loading(tmp_path):
    config = dataclasses.replace(SMALL, encoder="resnetblur50")
    model, images = ViT(config).eval(), torch.rand(2, 3, 32, 32)
    save_model(
        tmp_path / "model.safetensors", model.state_dict(), ModelHeader(config, tuple("abc"), Preprocess(image_size=32))
    )
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), model(images))


def test_weights_bring_their_normalisation_into_every_recipe(tmp_path, tiny_run):
    given = {"variant": "b16-xception41", "encoder_weights": "timm"}
    assert build_config("article", FACTS, given)[0].preprocess.mean == (0.5, 0.5, 0.5)
    earlier = str(tiny_run[0] / "config.json")
    given = {"variant": "micro4-resnet18", "encoder_weights": "timm"}
    assert build_config(earlier, FACTS, given)[0].preprocess.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="belong together"):
        build_config("auto", FACTS, {**given, "preprocess.mean": (0.1, 0.1, 0.1)})
    config, _ = build_config("auto", FACTS, {**given, "optim.freeze": ("patch_embed.backbone",)})
    save_config(config, tmp_path / "cnn.json")
    plain, _ = build_config(str(tmp_path / "cnn.json"), FACTS, {"variant": "micro4"})
    assert (plain.encoder_weights, plain.optim.freeze) == ("", ()), "they belong to the earlier encoder"
    same, _ = build_config(str(tmp_path / "cnn.json"), FACTS, {})
    assert (same.encoder_weights, same.optim.freeze) == ("timm", ("patch_embed.backbone",))
    own = {"preprocess.mean": (0.1, 0.1, 0.1), "preprocess.std": (0.2, 0.2, 0.2)}
    save_config(build_config("auto", FACTS, {**given, **own})[0], tmp_path / "own.json")
    assert build_config(str(tmp_path / "own.json"), FACTS, {})[0].preprocess.mean == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.encoder", "resnet5"], "did you mean 'resnet50'"),
        (["--model.encoder", "resnet18", "--model.patch_size", "7"], "not 7; try --model.patch_size 8"),
        (["--model.patch_sizes", "0", "8"], "model.patch_sizes is 0; expected 1 or more"),
        (["--model.patch_sizes", "7", "9", "11"], "choose sizes that are multiples of each other"),
        (["--model", "nano4", "--model.patch_sizes", "8", "16"], "not among model.patch_sizes 8 16"),
        (["--model", "s16-mean-concat"], "names its decoder twice: 'mean' and 'concat'"),
        (["--model", "nano16-resnet18", "--batch-size", "4", "--optim.accumulate", "4"], "needs more than one value"),
    ],
)
def test_bad_arguments_for_encoders_and_patches(arguments, message, make_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", count=6)
    assert vitrail(["train", str(data), "--out", str(tmp_path / "run"), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_sizes_of_nothing_are_refused(tiny_run):
    classifier = load(tiny_run[0])
    for wrong in ({"image_size": 0}, {"patch_size": 0}, {"patch_size": -3}):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            classifier.at(**wrong)
    with pytest.raises(ValueError, match="patch_size is 0"):
        classifier.model(torch.rand(1, 3, 16, 16), 0)


def test_a_resized_kernel_in_bf16():
    model = ViT(dataclasses.replace(SMALL, patch_sizes=(8, 16))).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images, 16)
    assert (model.bfloat16()(images.bfloat16(), 16).float() - expected).abs().max() < 0.1
