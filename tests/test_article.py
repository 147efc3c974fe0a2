"""docs/article.md: its Python runs, its commands are accepted, and what it says of Vitrail is true."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import vitrail.cli
from vitrail import ViT, ViTConfig
from vitrail.cli import COMMANDS, train
from vitrail.cli.options import given_settings, options_of
from vitrail.config import RunConfig, ScheduleConfig
from vitrail.config_schema import all_settings
from vitrail.export.formats import FORMATS
from vitrail.models.config import DECODER_NAMES, ENCODER_NAMES, POSITION_NAMES
from vitrail.models.variants import variant_config
from vitrail.optim.schedules import Schedule
from vitrail.recipes import DatasetFacts, build_config
from vitrail.training.start import parse_model_spec

ROOT = Path(__file__).parents[1]
ARTICLE = ROOT / "docs" / "article.md"
PAGES = (ARTICLE, ROOT / "README.zh-CN.md")
FACTS = DatasetFacts(50_000, 10, 256, False, 3, "", "cpu", False)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (number of the first line, text) of each code block of a page in a language."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in matches]


def commands() -> list[str]:
    """Return every `vitrail` command line in a code block of the pages."""
    texts = [text.replace("\\\n", " ") for page in PAGES for _, text in blocks(page, "sh")]
    return list(dict.fromkeys(line for text in texts for line in text.splitlines() if line.startswith("vitrail ")))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the variables left after the article's Python blocks have run, top to bottom, in an empty folder."""
    torch.manual_seed(0)
    before, names = Path.cwd(), {"__name__": "article"}
    os.chdir(tmp_path_factory.mktemp("article"))
    try:
        for line, text in blocks(ARTICLE, "python"):
            exec(compile("\n" * line + text, str(ARTICLE), "exec"), names)
        names["lines_of_run"] = Path("runs/article/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        os.chdir(before)
    return names


def test_the_data_flow_has_the_shapes_of_the_figure(page):
    assert page["shapes"] == {
        "encoder": (1, 48, 4, 4),
        "blocks.0": (1, 17, 48),
        "blocks.1": (1, 17, 48),
        "transformer": (1, 17, 48),
        "pooled": (1, 48),
        "logits": (1, 10),
    }
    with torch.device("meta"):
        features = ViT(variant_config("b16", depth=1)).features(torch.empty(2, 3, 224, 224))
    assert features["encoder"].shape == (2, 768, 14, 14)
    assert features["transformer"].shape == (2, 197, 768)
    assert features["pooled"].shape == (2, 768)


def test_concat_joins_every_patch_pools_and_has_an_mlp_head(page):
    model = ViT(ViTConfig(**page["small"], decoder="concat")).eval()
    features = model.features(torch.rand(3, 3, 32, 32))
    encoded = model.decoder.norm(features["encoder"].flatten(2).transpose(1, 2))
    joined = torch.cat([encoded, features["transformer"][:, 1:]], dim=2)
    assert joined.shape == (3, 16, 2 * 48)
    pooled = torch.nn.functional.gelu(model.decoder.join(joined.mean(dim=1)))
    assert_close(features["logits"], model.head(pooled))


def test_encoders_and_decoders_are_the_ones_of_the_tables(page):
    text = ARTICLE.read_text(encoding="utf-8")
    assert set(page["maps"].values()) == {torch.Size([1, 192, 14, 14])}
    assert all(f"| `{name}`" in text for name in (*DECODER_NAMES, *ENCODER_NAMES))
    assert all(f"`{name}`" in text for name in POSITION_NAMES)
    assert ViTConfig().decoder == "token"
    assert ViTConfig().positions == "learned"
    config, _ = build_config("auto", FACTS, {})
    assert (config.model.decoder, config.model.positions) == ("mean", "sincos2d")
    assert config.model.positions == build_config("auto", with_num_train(199_999), {})[0].model.positions
    assert build_config("auto", with_num_train(200_000), {})[0].model.positions == "learned"


def with_num_train(num_train: int) -> DatasetFacts:
    return dataclasses.replace(FACTS, num_train=num_train)


def test_patches_and_positions_have_one_vector_per_patch(page):
    assert page["patches"].shape == page["positions"].shape == page["placed"].shape == (1, 768, 14, 14)
    assert page["positions"].numel() == 150_528
    assert 768 * 224 * 224 == 256 * 150_528 == 38_535_168
    assert page["coarse"] == (1, 48, 7, 7)
    assert page["fine"] == (1, 48, 28, 28)
    assert page["logits"].shape == (1, 10)


def test_any_size_is_padded_to_a_multiple_of_the_patch(page):
    model = ViT(ViTConfig(**page["small"])).eval()
    image = torch.rand(1, 3, 30, 44)
    padded = torch.nn.functional.pad(image, (0, 4, 0, 2))
    assert_close(model(image), model(padded))
    assert model.positional_encoding(image.shape).shape == model.encode(image).shape == (1, 48, 4, 6)
    assert page["difference"] < 1e-5


def test_a_dense_mask_grows_with_the_square_of_the_patches(page):
    make, mask = page["neighbourhood_mask"], page["mask"]
    assert mask.shape == (196, 196)
    assert page["mask_bytes"] == 38_416 == 196**2
    assert mask.sum(dim=1).max() == 49
    assert mask.sum(dim=1).min() == 16
    assert round(page["mask_share"].item(), 2) == 0.19
    assert page["scores_bytes"] == 12 * 196**2 * 4 == 1_843_968
    sizes = [make(side, side, k=7).numel() for side in (7, 14, 28)]
    assert sizes[1] == 16 * sizes[0]
    assert sizes[2] == 16 * sizes[1] == 784**2 == 614_656
    assert (1024 // 16) ** 4 == 16_777_216
    assert 224**4 == 2_517_630_976
    assert make(3, 3, k=3)[4].all()
    assert make(3, 3, k=3)[0].view(3, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_masked_attention_reads_nothing_outside_the_neighbourhood(page):
    q, k, v, mask = (page[name] for name in ("q", "k", "v", "mask"))
    near = mask[100]
    alone = torch.softmax(q[:, 100:101] @ k[:, near].transpose(1, 2) / 8, dim=-1) @ v[:, near]
    assert_close(page["local"][:, 100:101], alone)


def test_with_silent_branches_the_transformer_is_the_identity(page):
    assert page["unchanged"] is True
    model = ViT(ViTConfig(**page["small"])).eval()
    tokens = torch.randn(2, 17, 48)

    def transformer(x: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    assert not torch.equal(transformer(tokens), tokens)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    assert torch.equal(transformer(tokens), tokens)


def test_dropout_and_stochastic_depth_are_where_the_text_says(page):
    assert page["drop_rates"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = ViT(ViTConfig(**page["small"], dropout=0.1))
    dropouts = {name.removeprefix("blocks.0.") for name, module in model.named_modules() if is_dropout(module)}
    assert {"pos_drop", "attn.proj_drop", "mlp.drop", "head_drop"} <= dropouts
    assert RunConfig().optim.clip_norm == 1.0


def is_dropout(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Dropout) and module.p == 0.1


def test_vit_b16_is_the_default_configuration(page):
    assert page["config"] == ViTConfig(dropout=0.1, attention_dropout=0.1, num_classes=10)
    assert page["config"] == variant_config("b16", dropout=0.1, attention_dropout=0.1, num_classes=10)
    assert page["config"].hidden_dim == 3072
    assert page["num_parameters"] == 85_806_346


def test_learning_rates_of_the_two_schedules(page):
    assert len(page["losses"]) == 20
    assert all(torch.isfinite(torch.tensor(page["losses"])))
    assert page["lr"] == pytest.approx(1.2e-6)
    linear = ScheduleConfig(decay="linear", warmup="500 steps", final_fraction=0.0)
    ours = Schedule(linear, total_steps=10_000, steps_per_epoch=100)
    assert [ours(step) for step in (1, 20, 499, 500, 5_000, 10_000)] == pytest.approx(
        [page["factor"](step) for step in (1, 20, 499, 500, 5_000, 10_000)]
    )
    assert page["step_lrs"] == pytest.approx([3e-5, 3e-6, 3e-7, 3e-8, 3e-9])
    later, whole = (sum(0.1**epoch for epoch in range(start, 300)) for start in (3, 0))
    assert later / whole == pytest.approx(0.001)
    step = ScheduleConfig(decay="step", warmup="0 steps", step_every="1 epochs")
    stepped = Schedule(step, total_steps=500, steps_per_epoch=100)
    assert [3e-5 * stepped(epoch * 100 + 1) for epoch in range(5)] == pytest.approx(page["step_lrs"])


def test_recipe_article_is_what_the_text_says():
    config, _ = build_config("article", FACTS, {})
    assert config.model == ViTConfig(dropout=0.1, attention_dropout=0.1, num_classes=10)
    assert (config.batch_size, config.optim.lr, config.optim.weight_decay) == (128, 3e-5, 0.05)
    assert config.epochs * FACTS.num_train / config.batch_size == pytest.approx(10_000)
    assert (config.schedule.warmup, config.schedule.decay, config.log.every) == ("500 steps", "linear", "5 steps")
    assert config.schedule.final_fraction == 0.01
    assert config.preprocess.mean == (0.485, 0.456, 0.406)
    assert config.preprocess.crop_fraction * 256 == 224
    assert config.augment.crop_scale < 1
    assert config.augment.flip == 0.5
    assert config.augment.rotation > 0
    mirrored = dataclasses.replace(FACTS, flip_reason="digits")
    assert all(build_config(recipe, mirrored, {})[0].augment.flip == 0 for recipe in ("auto", "article"))
    lr = build_config("auto", FACTS, {"variant": "ti16", "batch_size": 128})[0].optim.lr
    assert lr == pytest.approx(1e-3)


def test_timm_weights_fit_but_for_the_head(page):
    assert page["left_out"].missing_keys == ["head.weight", "head.bias"]
    assert page["left_out"].unexpected_keys == []
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        theirs = page["theirs"].forward_head(page["theirs"].forward_features(image), pre_logits=True)
        assert_close(page["ours"].features(image)["pooled"], theirs, atol=1e-5, rtol=1e-5)


def test_the_run_keeps_the_best_model_by_validation_only(page):
    lines = [json.loads(line) for line in page["lines_of_run"]]
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained[:3] == [5, 10, 15]
    assert all({"step", "epoch", "eval/loss"} <= line.keys() for line in lines if "eval/top1" in line)
    assert len(page["evaluated"]) == 2
    assert page["best"]["top1"] == max(page["evaluated"])
    assert {"top1", "loss", "step", "epoch"} <= page["best"].keys()
    assert page["accuracy"] == page["best"]["top1"]


@pytest.mark.parametrize("line", commands())
def test_commands_on_the_pages_are_accepted(line, monkeypatch):
    arguments = shlex.split(line, comments=True)[1:]
    calls = []
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda options: calls.append(options) or 0)
    assert vitrail.cli.run(arguments) == 0
    if arguments[0] == "train":
        given = given_settings(calls[0], own=train.OwnOptions)
        given |= parse_model_spec(calls[0].model_name) if calls[0].model_name else {}
        if "pretrained" not in given:  # those weights are the reader's
            build_config(calls[0].recipe or "auto", FACTS, given)


def test_settings_on_the_pages_exist():
    own = {field.name for field in dataclasses.fields(options_of(train))} | {"model", "help"}
    known = own | {name for name, _ in all_settings(RunConfig)}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--([a-z][a-z_.-]*[a-z])", page.read_text(encoding="utf-8")))
        # Those of predict, eval, export, check and shard.
        others = {"out", "top", "split", "to", "html", "show_augmentation", "size", "bytes"}
        assert {name.replace("-", "_") for name in named} <= known | others


def test_what_is_not_there_yet_is_not_there_yet():
    why = "docs/article.md and README.zh-CN.md say that this is not there yet; fix both, then this test"
    assert not {"pretrain", "serve", "explain"} & set(COMMANDS), why
    assert not {"onnx", "torch"} & set(FORMATS), why
    with pytest.raises(ValueError, match="unknown model 'hf:google/vit-base-patch16-224'"):
        build_config("auto", FACTS, {"variant": "hf:google/vit-base-patch16-224"})
