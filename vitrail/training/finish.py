"""After the last step: calibrate, evaluate, describe the mistakes, build the report."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import PIL.Image

from vitrail.config import RunConfig
from vitrail.console import Console
from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ImageError
from vitrail.data.setup import TrainData
from vitrail.device import pick_device
from vitrail.distributed import World
from vitrail.evaluation.calibration import fit_temperature, log_softmax
from vitrail.evaluation.metrics import Outputs, all_metrics
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.files import write_text
from vitrail.report.run_page import build_report
from vitrail.training.loop import model_header, report_dropped
from vitrail.training.run_folder import Run
from vitrail.training.start import run_kernels
from vitrail.weights.model_file import load_model, save_model

MISTAKES = 24
_THUMBNAIL = 112  # px


def evaluate_best_weights(
    config: RunConfig, data: TrainData, run: Run, world: World, console: Console
) -> dict[str, Any]:
    """Evaluate the best weights once more, on the validation split and, the first and only time, on the test split.

    Can be repeated: a run that was killed in here is finished by `--resume`.

    Returns:
        The evaluation of each part, as `evaluation.json` holds it.
    """
    world.barrier()
    device = pick_device(config.device)
    model, header = load_model(run.model)
    model.to(device).kernels = run_kernels(config, device, run, world)
    outputs = {}
    for part in ("val", "test"):
        if part in data.splits.indices:
            with console.bar(f"evaluating the {part} split") as advance:
                outputs[part] = predict_logits(
                    model, data.reader, data.splits.indices[part], device=device, world=world, advance=advance
                )
    temperature = fit_temperature(outputs["val"].logits, outputs["val"].targets)
    results: dict[str, Any] = {}
    for part, out in outputs.items():
        results[part] = all_metrics(out, data.dataset.labels, temperature)
        results[part] |= {"split": part, "fingerprint": data.splits.fingerprint}
        results[part]["mistakes"] = mistakes(out, data.dataset, temperature)
    if run.is_main:
        metrics = dict(header.metrics) | {
            f"test_{k}": results["test"][k] for k in ("top1", "loss") if "test" in results
        }
        save_model(run.model, model.state_dict(), model_header(config, data, metrics, temperature))
        write_text(run.folder / "evaluation.json", json.dumps(results) + "\n")
        report_dropped(data, run, console)
        run.note(status="finished")
        build_report(run.folder)
    world.barrier()
    return results


def mistakes(outputs: Outputs, dataset: Dataset, temperature: float) -> list[dict[str, Any]]:
    """Describe the wrong predictions that the model was surest of, with their images."""
    probabilities = np.exp(log_softmax(outputs.logits / temperature))
    predicted = outputs.logits.argmax(axis=1)
    wrong = np.flatnonzero(predicted != outputs.targets)
    order = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:MISTAKES]
    return [
        {
            "path": dataset.paths[int(outputs.indices[row])],
            "label": dataset.labels[outputs.targets[row]],
            "predicted": dataset.labels[predicted[row]],
            "probability": float(probabilities[row, predicted[row]]),
            "true_probability": float(probabilities[row, outputs.targets[row]]),
            "thumbnail": thumbnail(dataset, int(outputs.indices[row])),
        }
        for row in order
    ]


def thumbnail(dataset: Dataset, index: int) -> str | None:
    """Return a small PNG of an image as a data address, or None when it can no longer be read."""
    try:
        image = dataset.read(index, "RGB")
    except (ImageError, OSError):
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), PIL.Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    image.save(memory, "PNG")
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode("ascii")
