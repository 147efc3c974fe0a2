"""Small public weights in foreign layouts: their logits, and their published accuracy on their dataset."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from vitrail.weights.model_file import build_model
from vitrail.weights.resolve import open_weights

# file, dataset, what the file does not say, correct predictions of 10,000, cross-entropy
PUBLISHED = [
    ("fmnist_vit_torchmha", "fashion_mnist", {"num_heads": 4, "mean": 0.5, "std": 0.5}, 9077, 0.25879),
    ("mnist_vit_lucidrains", "mnist", {"mlp": "relu", "mean": 0.1307, "std": 0.3081}, 9721, 0.0871),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "described", "correct", "loss"), PUBLISHED)
def test_published_accuracy(shared_data, name, data, described, correct, loss):
    file = shared_data / "weights" / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    imported = open_weights(file, described)
    model = build_model(imported.header.architecture, imported.weights, name)
    dataset, published = np.load(shared_data / f"{data}.npz"), np.load(file.with_suffix(".logits.npz"))
    pixels = imported.header.preprocess.normalise(torch.from_numpy(dataset["x_test"])[:, None])
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in pixels.split(500)])
    torch.testing.assert_close(logits[:256], torch.from_numpy(published["logits"]), atol=1e-4, rtol=0)
    labels = torch.from_numpy(dataset["y_test"]).long()
    assert int((logits.argmax(1) == labels).sum()) == correct
    assert float(cross_entropy(logits, labels)) == pytest.approx(loss, abs=1e-4)
