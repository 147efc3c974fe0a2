"""A tiny objective that is no classification, and a program that trains it through the one loop.

    python tests/agreement.py DATA OUT [--setting value …]     (or under torchrun; goes on where OUT holds a run)

Two views of each image, no labels: a student's prediction of one view should agree with a teacher's vector of the other,
and the teacher is the running average of the student (Grill et al. 2020, BYOL, in the smallest form).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail import distributed
from vitrail.config import RunConfig
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch
from vitrail.data.setup import build_train_data, load_data
from vitrail.distributed import World
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.models.vit import ViT
from vitrail.objectives.base import Objective
from vitrail.optim.average import Average
from vitrail.training.loop import train_steps
from vitrail.training.run_folder import Run, create_run, open_run
from vitrail.training.session import Session
from vitrail.weights.adapt import Start

SETTINGS = {
    "model.image_size": 32, "model.patch_size": 8, "model.embed_dim": 24, "model.depth": 2, "model.num_heads": 2,
    "model.in_channels": 3, "model.dropout": 0.1, "device": "cpu", "precision": "fp32", "epochs": 4.0, "batch_size": 16,
    "augment.crop_scale": 0.4, "augment.flip": 0.5, "log.every": "2 steps", "kernels.global_attention": "fused",
    "optim.lr": 2e-3, "seed": 5,
}  # fmt: skip


class Agreement(Objective):
    """The student's prediction of one view and the teacher's vector of the other, one minus their cosine."""

    num_views = 2

    def __init__(self, student: ViT, decay: float) -> None:
        super().__init__()
        self.student, self.teacher = student, Average(student, decay)
        self.predictor = nn.Linear(student.config.embed_dim, student.config.embed_dim)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        cosine = self.cosine(first, second) + self.cosine(second, first)
        return {
            "loss": 1 - cosine.mean() / 2,
            "cosine": cosine.detach().sum() / 2,
            "count": cosine.new_tensor(len(first)),
        }

    def cosine(self, ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher.model(theirs)
        return F.cosine_similarity(self.predictor(self.student(ours)), wanted)

    def after_step(self, step: int) -> None:
        self.teacher.update(self.student, step)

    def vits(self) -> Iterator[ViT]:
        yield self.student
        assert isinstance(self.teacher.model, ViT)
        yield self.teacher.model

    def model_to_save(self) -> ViT:
        assert isinstance(self.teacher.model, ViT)
        return self.teacher.model

    def evaluate(self, reader: ImageReader, indices: np.ndarray, world: World) -> dict[str, float]:
        """Return how far the vectors of different images spread (a collapse is 0), and how many images that is of."""
        outputs = predict_logits(self.model_to_save(), reader, indices, device=torch.device("cpu"), world=world)
        return {"spread": float(outputs.logits.std(axis=0).mean()), "num_images": len(outputs.indices)}

    def better(self, new: Mapping[str, float], best: Mapping[str, float]) -> bool:
        return new["spread"] > best["spread"]


def build_agreement(config: RunConfig, start: Start, fresh: bool) -> Agreement:
    """Return the objective before the first step."""
    torch.manual_seed(config.seed)
    return Agreement(ViT(dataclasses.replace(config.model, num_classes=0)).train(), decay=0.9)


def main(source: str, out: str, *words: str) -> None:
    """Train, or go on where the folder holds a run."""
    world, folder = distributed.init(), Path(out)
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    config = override(RunConfig(), {**SETTINGS, "data.source": source, **{name: float(v) for name, v in given.items()}})
    resumed = world.broadcast((folder / "run.json").exists())
    if resumed:
        config = open_run(folder)[1]
    recorded = folder / "split.json" if resumed else None
    checked = load_data(config.data, Console(quiet=not world.is_main), world, channels=3, recorded=recorded)
    data = build_train_data(checked, config, world)
    session = Session(config, data, Run(folder, world.is_main), world, Console(quiet=True))
    if not resumed and world.is_main:
        create_run(folder, config, checked)
    world.barrier()
    train_steps(session, Start(), build_agreement)
    distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
