"""Mixup and cutmix: pairs of neighbours, labels in proportion to the pixels shown, the loss of soft labels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import v2

from vitrail import distributed
from vitrail.api import check_runnable, train
from vitrail.config import AugmentConfig, RunConfig
from vitrail.console import Console
from vitrail.data.augment.mixup import MixTargets, beta, cut_boxes, mix_pairs_
from vitrail.data.augment.random_changes import draw_changes
from vitrail.data.loading.train_loader import Batch
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.objectives.classification import Classification

QUIET = Console(quiet=True)
SIZE, CLASSES = (12, 9), 5


def make_batch(count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *SIZE, generator=random)
    targets = torch.randint(CLASSES, (count,), generator=random)
    return images, targets, draw_changes(seed, np.zeros(count, int), np.arange(count))


def mixed(config: AugmentConfig, count: int = 16, seed: int = 0) -> tuple[Tensor, MixTargets]:
    images, targets, drawn = make_batch(count, seed)
    out, mix = mix_pairs_(images.clone(), targets, np.arange(count), config, drawn)
    assert mix is not None
    return out, mix


def soft(targets: Tensor, mix: MixTargets) -> Tensor:
    """Return the soft labels [B, classes]."""
    own, other = (F.one_hot(each, CLASSES).float() for each in (targets, mix.labels_b))
    return mix.lam[:, None] * own + (1 - mix.lam[:, None]) * other


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0])
def test_lam_is_beta_distributed(alpha):
    drawn = draw_changes(1, np.zeros(4000, int), np.arange(4000))
    assert stats.kstest(beta(alpha, drawn), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_a_tiny_alpha_mixes_nothing_but_is_finite():
    shares = beta(1e-3, draw_changes(0, np.zeros(200, int), np.arange(200)))
    assert np.isfinite(shares).all()
    assert (np.minimum(shares, 1 - shares) < 1e-6).mean() > 0.95


def test_without_mixing_images_stay_and_there_are_no_mix_targets():
    images, targets, drawn = make_batch()
    out, mix = mix_pairs_(images.clone(), targets, np.arange(16), AugmentConfig(), drawn)
    assert torch.equal(out, images)
    assert mix is None


def test_mixup_is_torchvisions_of_a_pair():
    """torchvision rolls the batch by one; of two images that is the partner."""
    images, targets, drawn = make_batch()
    out, mix = mixed(AugmentConfig(mixup=0.8))
    for first in range(0, 16, 2):
        pair = slice(first, first + 2)
        share = float(beta(0.8, {name: values[first : first + 1] for name, values in drawn.items()})[0])
        theirs = v2.MixUp(num_classes=CLASSES)
        theirs.make_params = lambda flat, share=share: {"lam": share}
        mixed_images, labels = theirs(images[pair], targets[pair])
        torch.testing.assert_close(out[pair], mixed_images)
        torch.testing.assert_close(soft(targets, mix)[pair], labels)


def test_cutmix_is_torchvisions_of_a_pair_with_the_share_of_the_real_box():
    images, targets, drawn = make_batch()
    out, mix = mixed(AugmentConfig(cutmix=1.0))
    boxes = cut_boxes(beta(1.0, drawn), drawn, SIZE).astype(int)
    for first in range(0, 16, 2):
        pair, (left, top, right, bottom) = slice(first, first + 2), boxes[first].tolist()
        share = 1 - (right - left) * (bottom - top) / (SIZE[0] * SIZE[1])
        theirs = v2.CutMix(num_classes=CLASSES)
        box = (left, top, right, bottom)
        theirs.make_params = lambda flat, box=box, share=share: {"box": box, "lam_adjusted": share}
        mixed_images, labels = theirs(images[pair], targets[pair])
        assert torch.equal(out[pair], mixed_images)
        torch.testing.assert_close(soft(targets, mix)[pair], labels)


def test_a_cut_box_is_that_of_torchvision(monkeypatch):
    """The same share and the same centre give the same box and the same corrected share."""
    shares = np.linspace(0, 1, 60)
    drawn = draw_changes(2, np.zeros(60, int), np.arange(60))
    ours = cut_boxes(shares, drawn, SIZE)
    for position, share in enumerate(shares):
        centre = iter([int(drawn["mix_left"][position] * SIZE[1]), int(drawn["mix_top"][position] * SIZE[0])])
        theirs = v2.CutMix(num_classes=CLASSES)
        theirs._dist = SimpleNamespace(sample=lambda _, share=share: share)  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(torch, "randint", lambda *_, centre=centre, **__: torch.tensor([next(centre)]))
        found = theirs.make_params([torch.zeros(1, 3, *SIZE)])
        assert tuple(ours[position].astype(int).tolist()) == found["box"]


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.8, cutmix=1.0)]
)
def test_label_mass_is_conserved(config):
    """Two images hold two labels' worth in all, each as much of one as of the other."""
    images, targets, _ = make_batch(64)
    out, mix = mixed(config, 64)
    before, after = F.one_hot(targets, CLASSES).float(), soft(targets, mix)
    torch.testing.assert_close(after.sum(1), torch.ones(64))
    torch.testing.assert_close(after.view(32, 2, CLASSES).sum(1), before.view(32, 2, CLASSES).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.view(32, 2, -1).sum(1), images.view(32, 2, -1).sum(1), atol=1e-5, rtol=0)
    assert (mix.lam < 0.9).any()


def test_with_both_on_each_takes_about_half_and_the_chance_leaves_the_rest_alone():
    count = 2000
    images, targets, drawn = make_batch(count)
    out, mix = mix_pairs_(
        images.clone(), targets, np.arange(count), AugmentConfig(mixup=1.0, cutmix=1.0, mix_chance=0.6), drawn
    )
    assert mix is not None
    drawn = {name: np.repeat(values[::2], 2) for name, values in drawn.items()}
    chosen, cut = torch.from_numpy(drawn["mix"] < 0.6), torch.from_numpy(drawn["mix_way"] < 0.5)
    assert 0.55 < chosen.float().mean() < 0.65
    assert 0.45 < cut.float().mean() < 0.55
    assert torch.equal(out[~chosen], images[~chosen])
    assert (mix.lam[~chosen] == 1).all()
    assert torch.equal(mix.labels_b[~chosen], targets[~chosen])
    kept = (out == images).all(dim=1).flatten(1).float().mean(1)  # cutmix keeps its own pixels, mixup none
    torch.testing.assert_close(kept[chosen & cut], mix.lam[chosen & cut], atol=1e-6, rtol=0)
    assert (kept[chosen & ~cut] < 0.01).all()


def test_an_image_whose_partner_failed_stays_as_it_is():
    images, targets, drawn = make_batch(8)
    whole, wanted = mixed(AugmentConfig(mixup=1.0), 8)
    for lost in range(8):
        left = np.delete(np.arange(8), lost)
        some_draws = {name: values[left] for name, values in drawn.items()}
        out, mix = mix_pairs_(images[left], targets[left], left, AugmentConfig(mixup=1.0), some_draws)
        assert mix is not None
        for row, position in enumerate(left):
            alone = position == lost ^ 1
            assert torch.equal(out[row], images[position] if alone else whole[position])
            assert mix.lam[row] == (1 if alone else wanted.lam[position])
            assert mix.labels_b[row] == (targets if alone else wanted.labels_b)[position]


class FixedLogits(nn.Module):
    """A model that returns the logits it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor, patch_size: int | None) -> Tensor:
        return self.logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_soft_labels(smoothing):
    images, targets, _ = make_batch(32)
    _, mix = mixed(AugmentConfig(mixup=0.8, cutmix=1.0), 32)
    logits = torch.randn(32, CLASSES, requires_grad=True)
    objective = Classification(FixedLogits(logits), label_smoothing=smoothing)  # pyright: ignore[reportArgumentType]
    found = objective(Batch(images, targets, np.arange(32), mix=mix))
    wanted = F.cross_entropy(logits, soft(targets, mix), label_smoothing=smoothing)
    torch.testing.assert_close(found["loss"], wanted)
    ours, theirs = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (found["loss"], wanted))
    torch.testing.assert_close(ours, theirs)
    heavier = torch.where(mix.lam < 0.5, mix.labels_b, targets)
    assert found["top1"] == (logits.argmax(1) == heavier).sum()


def test_unmixed_pairs_give_the_plain_loss():
    images, targets, _ = make_batch(32)
    logits = torch.randn(32, CLASSES)
    objective = Classification(FixedLogits(logits), label_smoothing=0.1)  # pyright: ignore[reportArgumentType]
    plain = objective(Batch(images, targets, np.arange(32)))
    mix = MixTargets(targets, torch.ones(32))
    found = objective(Batch(images, targets, np.arange(32), mix=mix))
    torch.testing.assert_close(found["loss"], plain["loss"])
    assert found["top1"] == plain["top1"]


def test_sub_batches_hold_their_rows_of_the_mix_targets():
    _, targets, _ = make_batch(16)
    out, mix = mixed(AugmentConfig(mixup=0.8))
    batch = Batch(out, targets, np.arange(16), mix=mix)
    model = ViT(ViTConfig(image_size=12, patch_size=4, embed_dim=16, depth=1, num_heads=1, num_classes=CLASSES))
    square = replace(batch, images=F.interpolate(out, (12, 12)))
    objective = Classification(model.eval())
    whole = objective(square)
    losses = [objective(square.take(start, stop)) for start, stop in ((0, 5), (5, 16))]
    torch.testing.assert_close(whole["loss"], (losses[0]["loss"] * 5 + losses[1]["loss"] * 11) / 16)
    assert whole["top1"] == sum(each["top1"] for each in losses)


@pytest.mark.parametrize(("batch_size", "size", "fits"), [(7, 1, False), (6, 2, False), (8, 2, True), (6, 1, True)])
def test_a_process_must_hold_whole_pairs(batch_size, size, fits):
    config = RunConfig(batch_size=batch_size, augment=AugmentConfig(cutmix=1.0), device="cpu")
    world = distributed.World(0, size, 0, size)
    if fits:
        return check_runnable(config, 100, world, schedule=False)
    with pytest.raises(ValueError, match=rf"of batch_size {batch_size}; try --batch-size {batch_size + size}"):
        check_runnable(config, 100, world, schedule=False)
    check_runnable(replace(config, augment=AugmentConfig()), 100, world, schedule=False)


def test_an_odd_batch_leaves_no_folder_behind(make_folder, tmp_path, tiny):
    odd = tiny | {"batch_size": 15, "augment.mixup": 0.8}
    with pytest.raises(ValueError, match="try --batch-size 16"):
        train(make_folder(tmp_path / "data"), out=tmp_path / "run", console=QUIET, **odd)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_objective_computes_mixed_batches_in_one_graph():
    # In a process of its own: the executed shape annotations of the tests are no part of what users compile.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


COMPILED = """
import numpy as np, torch
from vitrail.data.augment.mixup import MixTargets
from vitrail.data.loading.train_loader import Batch
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.objectives.classification import Classification

torch.manual_seed(0)
model = ViT(ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3))
torch.nn.init.normal_(model.head.weight)
plain, compiled = Classification(model, label_smoothing=0.1), Classification(model, label_smoothing=0.1)
graphs = []
def counting(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled.compile(backend=counting, fullgraph=True)
for step in range(3):
    targets = torch.randint(3, (8,))
    mix = MixTargets(targets.flip(0), torch.rand(8))
    batch = Batch(torch.randn(8, 3, 16, 16), targets, np.arange(8), mix=mix)
    torch.testing.assert_close(compiled(batch), plain(batch))
assert len(graphs) == 1, len(graphs)
"""
