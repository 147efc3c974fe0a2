"""The contact sheet of `vitrail check --show-augmentation`: it shows exactly what training sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import run as vitrail
from vitrail.config import AugmentConfig, DataConfig, PreprocessConfig, RunConfig
from vitrail.console import Console
from vitrail.data.loading.train_loader import TrainLoader
from vitrail.data.setup import build_train_data, load_data
from vitrail.models.config import ViTConfig
from vitrail.report.contact_sheet import chosen_positions, views

ALL = AugmentConfig(
    crop_scale=0.4,
    flip=0.5,
    rotation=10.0,
    brightness=0.2,
    policy="randaugment",
    erasing=0.4,
    erasing_fill="noise",
    mixup=0.8,
    cutmix=1.0,
    mix_chance=0.7,
)


def prepared(root: Path, augment: AugmentConfig):
    data = DataConfig(source=str(root), near_duplicates=False)
    model = ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3)
    config = RunConfig(data=data, model=model, augment=augment, preprocess=PreprocessConfig(), seed=3, batch_size=6)
    checked = load_data(data, Console(quiet=True))
    return checked, build_train_data(checked, config), config


def test_the_sheet_shows_what_training_shows(make_folder, tmp_path):
    """Pixel for pixel the batches of a training with batches of six, mixed pairs over the end of an epoch included."""
    checked, data, config = prepared(make_folder(tmp_path / "data", count=9), ALL)
    indices = data.splits.indices["train"]
    assert len(indices) % 2 == 1
    loader = TrainLoader(data.reader, indices, batch_size=6, seed=3, augment=config.augment, device=torch.device("cpu"))
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for step, batch in enumerate(loader.batches(0, -(-3 * len(indices) // 6))):
        for position, image in enumerate(batch.images):
            seen[(step * 6 + position) // len(indices), int(batch.indices[position])] = image
    for epoch in range(3):
        for position, view in enumerate(views(checked, data, config, list(range(len(indices))), epoch)):
            wanted = (seen[epoch, int(indices[position])] / 2 + 0.5).clamp(0, 1) * 255
            assert np.abs(view.pixels - wanted.numpy()).max() <= 0.51


def test_captions_name_the_random_changes(make_folder, tmp_path):
    checked, data, config = prepared(make_folder(tmp_path / "data", count=9), ALL)
    captions = " ".join(
        " ".join(view.lines) for epoch in range(4) for view in views(checked, data, config, [0, 1, 2], epoch)
    )
    for word in ("crop ", "mirrored", "turned ", "light ×", "erased", "with "):
        assert word in captions
    plain = replace(config, augment=AugmentConfig())
    assert [view.lines for view in views(checked, data, plain, [0], 0)] == [()]


def test_rows_are_spread_over_the_classes(make_folder, tmp_path):
    few = prepared(make_folder(tmp_path / "few"), AugmentConfig())[1]
    targets = few.dataset.targets[few.splits.indices["train"][chosen_positions(few)]]
    assert targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    many = make_folder(tmp_path / "many", classes=tuple(f"c{number:02d}" for number in range(15)), count=4)
    data = prepared(many, AugmentConfig())[1]
    targets = data.dataset.targets[data.splits.indices["train"][chosen_positions(data)]]
    assert targets.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_check_writes_the_sheet(make_folder, tmp_path, capsys):
    data, file = make_folder(tmp_path / "data", count=6), tmp_path / "sheet.png"
    arguments = ["check", str(data), "--show-augmentation", "--out-sheet", str(file)]
    assert vitrail([*arguments, "--augment.policy", "trivialaugment"]) == 0
    assert f"what training would see: {file}" in " ".join(capsys.readouterr().out.split())
    first = pixels_of(file)
    assert first.shape[1] > 1000
    unchanged = first[:, 24 : 24 + 144]
    assert (unchanged != 255).any(axis=2).mean() > 0.3
    assert vitrail(arguments) == 0
    second = pixels_of(file)
    assert not np.array_equal(first, second)


def test_the_sheet_of_an_earlier_runs_settings(tiny_run, tmp_path):
    run, data = tiny_run
    file = tmp_path / "sheet.png"
    recipe = str(run / "config.json")
    assert vitrail(["check", str(data), "--show-augmentation", "--out-sheet", str(file), "--recipe", recipe]) == 0
    with Image.open(file) as sheet:
        assert sheet.size[0] > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--augment.flip", "0.5"], "--augment.flip 0.5 is for the contact sheet; add --show-augmentation"),
        (["--recipe", "auto"], "--recipe auto is for the contact sheet"),
        (["--out-sheet", "a.png"], "--out-sheet a.png is for the contact sheet"),
        (
            ["--show-augmentation", "--out-sheet", "missing/a.png"],
            "--out-sheet missing/a.png: there is no folder missing",
        ),
        (["--show-augmentation", "--recipe", "autp"], "unknown recipe 'autp'; did you mean 'auto'"),
        (["--show-augmentation", "--augment.policy-ops", "3"], "augment.policy_ops 3 has no effect"),
        (["--show-augmentation", "--augment.policy", "rand"], "unknown augment.policy 'rand'; did you mean"),
    ],
)
def test_settings_without_effect_on_the_sheet_are_refused(
    arguments, message, make_folder, tmp_path, capsys, monkeypatch
):
    data = make_folder(tmp_path / "data", count=6)
    monkeypatch.chdir(tmp_path)
    assert vitrail(["check", str(data), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "augmentation.png").exists()
