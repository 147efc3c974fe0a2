"""Figures: against scikit-learn, by hand, and at the edges."""

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from vitrail.evaluation.calibration import calibration_error, calibration_table, fit_temperature
from vitrail.evaluation.metrics import Outputs, all_metrics, headline_metrics, target_ranks


def outputs(count: int = 500, classes: int = 12, seed: int = 0) -> Outputs:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)).astype(np.float32) * 2
    targets = random.integers(0, classes, count)
    logits[np.arange(count), targets] += 1.5
    return Outputs(logits, targets, np.arange(count))


def test_figures_equal_scikit_learns():
    out = outputs()
    labels = tuple("abcdefghijkl")
    probabilities = np.exp(out.logits - out.logits.max(axis=1, keepdims=True)).astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    result = all_metrics(out, labels)
    assert result["top1"] == pytest.approx(np.mean(out.logits.argmax(1) == out.targets))
    assert result["top5"] == pytest.approx(top_k_accuracy_score(out.targets, out.logits, k=5))
    assert result["loss"] == pytest.approx(log_loss(out.targets, probabilities), rel=1e-6)
    predicted = out.logits.argmax(axis=1)
    assert result["confusion"] == confusion_matrix(out.targets, predicted).tolist()
    precision, recall, f1, count = precision_recall_fscore_support(out.targets, predicted)
    for i, label in enumerate(labels):
        row = result["per_class"][label]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[i], recall[i], f1[i]))
        assert row["count"] == count[i]
    assert result["num_images"] == 500
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(out.targets, predicted))


def test_balanced_accuracy_is_of_the_classes_that_are_there():
    logits = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 0]]
    result = all_metrics(Outputs(logits, np.asarray([0, 0, 0, 0, 1, 1]), np.arange(6)), ("a", "b", "none"))
    assert result["balanced_accuracy"] == (3 / 4 + 1 / 2) / 2


def test_top5_with_fewer_than_five_classes_is_defined():
    assert headline_metrics(outputs(classes=3))["top5"] == 1.0
    assert headline_metrics(outputs(classes=5))["top5"] == 1.0
    assert headline_metrics(outputs(classes=6))["top5"] < 1.0


def test_equal_logits_rank_as_argmax_does():
    out = Outputs(np.zeros((3, 4), np.float32), np.array([0, 1, 3]), np.arange(3))
    assert target_ranks(out).tolist() == [0, 1, 3]
    assert headline_metrics(out)["top1"] == pytest.approx(1 / 3)


def test_undefined_figures_are_null_not_zero():
    out = Outputs(np.array([[5.0, 0, 0], [5.0, 0, 0]], np.float32), np.array([0, 1]), np.arange(2))
    rows = all_metrics(out, ("a", "b", "never"))["per_class"]
    assert rows["never"] == {"precision": None, "recall": None, "f1": None, "count": 0}
    assert rows["b"]["precision"] is None
    assert rows["b"]["recall"] == 0.0
    assert rows["a"]["precision"] == 0.5


def test_a_model_that_says_nan_is_an_error():
    out = outputs(10)
    out.logits[3, 2] = np.nan
    with pytest.raises(ValueError, match="image number 3"):
        headline_metrics(out)


def test_calibration_error_by_hand():
    # Two images of confidence 0.8, one right: gap 0.3. Two of confidence 0.6, both right: gap 0.4.
    logits = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]]))
    targets = np.array([0, 1, 0, 0])
    assert calibration_error(logits, targets) == pytest.approx(0.5 * 0.3 + 0.5 * 0.4)
    table = calibration_table(logits, targets)
    assert sum(row["count"] for row in table) == 4
    assert len(table) == 15


def test_temperature_recovers_a_known_one_and_keeps_the_order():
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 5)) * 2
    probabilities = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    targets = np.array([random.choice(5, p=row) for row in probabilities])
    assert fit_temperature(true * 3, targets) == pytest.approx(3.0, rel=0.05)
    assert calibration_error(true, targets) < 0.02 < calibration_error(true * 3, targets)
