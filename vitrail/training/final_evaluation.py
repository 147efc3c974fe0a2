"""After the last step: calibrate and evaluate the best weights, keep their outputs, describe the mistakes."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import PIL.Image
from torch import nn

from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ImageError
from vitrail.evaluation.calibration import fit_temperature, log_softmax
from vitrail.evaluation.metrics import all_metrics
from vitrail.evaluation.outputs import save_outputs
from vitrail.evaluation.predict_logits import Outputs, predict_logits
from vitrail.files import write_text
from vitrail.training.reporting import report_dropped
from vitrail.training.run_record import model_header
from vitrail.training.session import Session
from vitrail.training.start import run_kernels
from vitrail.weights.model_file import load_model, save_model

MISTAKES = 24
_THUMBNAIL = 112  # px


def evaluate_best_weights(session: Session) -> dict[str, Any]:
    """Evaluate the best weights once more, on the validation split and, the first and only time, on the test split.

    Can be repeated: a run that was killed in here is finished by `--resume`. Collective; the main rank writes the model
    file with its temperature, `evaluation.json` and the outputs of each split.

    Returns:
        The evaluation of each split, as `evaluation.json` holds it.
    """
    config, data, run = session.config, session.data, session.run
    session.world.barrier()
    model, header = load_model(run.model)
    model.to(session.device).kernels = run_kernels(session)
    outputs = {split: outputs_of(session, model, split) for split in ("val", "test") if split in data.splits.indices}
    report_dropped(session)
    temperature = fit_temperature(outputs["val"].logits, outputs["val"].targets)
    results: dict[str, Any] = {}
    for split, each in outputs.items():
        results[split] = all_metrics(each, data.dataset.labels, temperature)
        results[split] |= {"split": split, "fingerprint": data.splits.fingerprint}
        results[split]["mistakes"] = mistakes(each, data.dataset, temperature)
    if run.is_main:
        metrics = dict(header.metrics) | {
            f"test_{name}": results["test"][name] for name in ("top1", "loss") if "test" in results
        }
        for split, each in outputs.items():
            path = run.folder / "outputs" / f"{split}.safetensors"
            save_outputs(path, each, data.dataset.paths, split=split, fingerprint=data.splits.fingerprint)
        save_model(run.model, model.state_dict(), model_header(config, data, metrics, temperature))
        write_text(run.folder / "evaluation.json", json.dumps(results) + "\n")
    session.world.barrier()
    return results


def outputs_of(session: Session, model: nn.Module, split: str) -> Outputs:
    """Return a model's outputs on a split."""
    data = session.data
    with session.console.bar(f"evaluating the {split} split") as advance:
        return predict_logits(
            model, data.reader, data.splits.indices[split], device=session.device, world=session.world, advance=advance
        )


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
