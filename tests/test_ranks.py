"""Ranks agree: nothing waits for a rank that does something else, and what a run says is of all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vitrail.data.datasets.open import digits_dataset
from vitrail.data.setup import refuse_other_listings
from vitrail.distributed import World
from vitrail.training.meter import Meter

pytestmark = pytest.mark.slow

TRAIN = {
    "model.depth": 1, "model.embed_dim": 24, "model.num_heads": 2, "model.image_size": 32, "epochs": 2.0, "batch_size": 8,
    "precision": "fp32", "device": "cpu", "log.every": "1 steps",
}  # fmt: skip
PROLOGUE = """
import json, math, sys
from pathlib import Path
import numpy as np
import torch
from vitrail import distributed
from vitrail.api import train
from vitrail.console import Console
world = distributed.init()
settings = json.loads(sys.argv[3])
"""


# FSDP's meshes leave threads of gloo behind, some of which abort a process that ends in the usual way.
EPILOGUE = """
import os
world.barrier()
sys.stdout.flush()
os._exit(0)
"""


def on_two_ranks(tmp_path: Path, program: str, *given: str) -> subprocess.CompletedProcess[str]:
    """Run a program on two ranks; a deadlock is an error after a while."""
    path = tmp_path / "program.py"
    path.write_text(PROLOGUE + program + EPILOGUE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(path)]
    words = [*launch, *given, *[""] * (2 - len(given)), json.dumps(TRAIN)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=180, env=env)


@pytest.fixture
def photos(tmp_path) -> Path:
    """24 images that are too large to stay in memory."""
    for label in ("fine", "coarse"):
        for number in range(12):
            random = np.random.default_rng([number, len(label)])
            coarse = random.integers(0, 256, (6, 8, 3) if label == "coarse" else (26, 32, 3), dtype=np.uint8)
            path = tmp_path / "photos" / label / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(coarse).resize((320, 260), PIL.Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def test_a_sharded_model_is_evaluated_and_diagnosed_by_all_ranks(tmp_path):
    """FSDP2: each forward pass gathers weights from all ranks, so all must compute as many batches, whatever they find."""
    program = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vitrail.data.datasets.open import digits_dataset
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.reader import ImageReader
from vitrail.distributed import World, whole_tensors
from vitrail.evaluation import predict_logits as module
from vitrail.evaluation.diagnosis import first_broken
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT

module.BATCH = 2
torch.manual_seed(0)
model = ViT(ViTConfig(image_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2, num_classes=10))
weights = {name: value.clone() for name, value in model.state_dict().items()}
digits, preprocess = digits_dataset(), Preprocess(image_size=8, channels=1, mean=(0.5,), std=(0.5,), resize="squash")
reader = ImageReader(digits, digits.targets, preprocess, None, workers=1)
indices, cpu = np.arange(5), torch.device("cpu")  # three images on rank 0, in two batches; two on rank 1, in one
wanted = module.predict_logits(model, reader, indices, device=cpu)
mesh = init_device_mesh("cpu", (2,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
found = module.predict_logits(model, reader, indices, device=cpu, world=world)
np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
assert found.indices.tolist() == indices.tolist()
gathered = whole_tensors(model.state_dict())
assert all(torch.equal(gathered[name], weights[name]) for name in weights)
images = torch.full((2, 1, 8, 8), math.nan if world.rank == 1 else 0.5)
cause = first_broken(model, images, lambda: model(images))
assert cause == ("The input images themselves hold such numbers" if world.rank == 1 else ""), cause
print("alike")
"""
    done = on_two_ranks(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alike") == 2


def test_ranks_that_list_other_images_stop_with_the_reason():
    class Differing(World):
        def gather(self, value):
            return [value, (value[0] + 1, "other")]

    refuse_other_listings(digits_dataset(), World())
    with pytest.raises(ValueError, match="digits: not all processes find the same images"):
        refuse_other_listings(digits_dataset(), Differing(0, 2, 0, 2))


def test_a_file_that_fails_on_another_rank_is_told(photos, tmp_path):
    program = """
from vitrail.data.loading.reader import ImageReader
real = ImageReader.read_crop
lost = []
def failing(self, index, box_sampler):
    if world.rank == 1 and (not lost or lost[0] == index):
        lost[:] = [index]
        raise OSError(5, "Input/output error")
    return real(self, index, box_sampler)
ImageReader.read_crop = failing
train(sys.argv[1], out=sys.argv[2], model="nano8", console=Console(quiet=world.rank > 0), **settings)
"""
    done = on_two_ranks(tmp_path, program, str(photos), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    problems = json.loads((tmp_path / "run" / "run.json").read_text())["problems"]
    (failed,) = [problem for problem in problems if problem["message"] == "failed during the run"]
    assert len(failed["paths"]) == 1
    assert failed["paths"][0].endswith(".jpg")
    assert "1 files can no longer be read" in done.stdout


def test_a_loss_that_breaks_on_one_rank_ends_all_with_one_diagnosis(photos, tmp_path):
    program = """
from vitrail.evaluation.diagnosis import NotFinite
from vitrail.models.vit import ViT
real = ViT.forward
calls = []
def broken(self, images, *more):
    out = real(self, images, *more)
    if self.training and world.rank == 1:
        calls.append(1)
        if len(calls) >= 3:
            return out * math.nan
    return out
ViT.forward = broken
try:
    train(sys.argv[1], out=sys.argv[2], model="nano8", console=Console(quiet=True), **settings)
except NotFinite as error:
    Path(sys.argv[2], f"error{world.rank}").write_text(str(error))
"""
    done = on_two_ranks(tmp_path, program, str(photos), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    zero, one = ((tmp_path / "run" / f"error{rank}").read_text() for rank in (0, 1))
    assert zero == one
    assert zero.startswith("step 3: the loss is nan")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2, "nothing of the broken step is logged"


def test_figures_add_up_over_ranks():
    """The meter of a rank whose world sums as two equal ranks would."""
    import torch

    class Doubled(World):
        def sum(self, rows):
            return [[2 * value for value in row] for row in rows]

    meter = Meter({}, Doubled(0, 2, 0, 2))
    meter.images, meter.waited_s = 8, 0.5
    figures = {
        "loss": torch.tensor(0.5),
        "top1": torch.tensor(3),
        "count": torch.tensor(8),
        "grad_norm": torch.tensor(2.0),
    }
    meter.add(figures)
    flushed = meter.flush()
    assert (flushed.losses, flushed.norms) == ([0.5], [2.0])
    assert meter.means() == {"train/loss": 0.5, "train/top1": 3 / 8, "train/grad_norm": 2.0}
    assert meter.images_of_all == 16
    assert meter.waited_s_of_all == 0.5
