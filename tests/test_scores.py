"""Scores of predictions: as scikit-learn and scipy gave them, and by formulas of this file.

python tests/test_scores.py          # records tests/fixtures/glue_scores.json anew
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galore_pretrain.errors import InputError
from galore_pretrain.text.glue import TASKS
from galore_pretrain.train.scores import load_metrics, score

RECORDED = Path(__file__).parent / "fixtures" / "glue_scores.json"
COUNT = 200


def recorded(name: str) -> tuple[dict[str, float], Any, Any]:
    """What was recorded of a task: its scores, the predictions and the labels."""
    entry = json.loads(RECORDED.read_text())[name]
    dtype = np.float32 if TASKS[name].is_regression else np.int64
    return entry["scores"], np.array(entry["predictions"], dtype), np.array(entry["labels"], dtype)


# -- formulas ---------------------------------------------------------------------------------------------------------


def accuracy(predictions: Any, labels: Any) -> float:
    return sum(p == y for p, y in zip(predictions.tolist(), labels.tolist(), strict=True)) / len(labels)


def table(predictions: Any, labels: Any) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    pairs = list(zip(predictions.tolist(), labels.tolist(), strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def f1(predictions: Any, labels: Any) -> float:
    tp, fp, fn, _ = table(predictions, labels)
    return 2 * tp / (2 * tp + fp + fn)


def matthews(predictions: Any, labels: Any) -> float:
    tp, fp, fn, tn = table(predictions, labels)
    return (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5


def pearson(predictions: Any, labels: Any) -> float:
    x, y = (values.astype(np.float64) for values in (predictions, labels))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** 0.5)


def ranks(values: Any) -> Any:
    """Of each value, how many are smaller, and half of those that are equal."""
    return (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)


def spearman(predictions: Any, labels: Any) -> float:
    return pearson(ranks(predictions), ranks(labels))


FORMULAS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_the_libraries_and_of_the_formulas(name: str) -> None:
    expected, predictions, labels = recorded(name)
    assert len(predictions) == len(labels) == COUNT
    found = score(TASKS[name], predictions, labels)
    assert tuple(found) == tuple(expected) == TASKS[name].metrics
    for metric, value in found.items():
        assert type(value) is float
        assert value == pytest.approx(expected[metric], abs=1e-12)
        assert value == pytest.approx(FORMULAS[metric](predictions, labels), abs=1e-12)
        assert 0.3 < value < 0.99  # so that another pairing or order would show


def test_which_is_positive_and_which_is_true_matters() -> None:
    predictions, labels = np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0])
    assert score(TASKS["mrpc"], predictions, labels) == {"f1": 0.5, "accuracy": 0.5}
    assert score(TASKS["mrpc"], 1 - predictions, 1 - labels)["f1"] == 0.5
    assert score(TASKS["qqp"], np.array([1, 0, 0, 0]), np.array([1, 1, 1, 1])) == {"accuracy": 0.25, "f1": 0.4}


def test_predictions_that_are_all_the_same() -> None:
    """Scores are those of Hugging Face's own code of GLUE, without a warning."""
    labels = np.array([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(TASKS["cola"], np.zeros(4, np.int64), labels) == {"matthews": 0.0}
        assert score(TASKS["cola"], np.ones(4, np.int64), labels) == {"matthews": 0.0}
        assert score(TASKS["mrpc"], np.zeros(4, np.int64), labels) == {"f1": 0.0, "accuracy": 0.5}
        found = score(TASKS["stsb"], np.full(4, 2.5, np.float32), np.float32([0, 1, 2, 3]))
    assert list(found) == ["pearson", "spearman"]
    assert np.isnan(list(found.values())).all()


@pytest.mark.parametrize("library", ["sklearn", "scipy"])
def test_without_its_library_one_line_says_how_to_get_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"finetune: its metrics need {library}.*pip install 'galore-pretrain\[fine"):
        load_metrics()


def record() -> None:
    """Record what the libraries themselves say of predictions that are right more often than not; some ranks tie."""
    from scipy import stats
    from sklearn import metrics

    functions: dict[str, Any] = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
        "pearson": lambda y, p: stats.pearsonr(y.astype(np.float64), p.astype(np.float64))[0],
        "spearman": lambda y, p: stats.spearmanr(y, p)[0],
    }
    rng = np.random.default_rng(0)
    lines = []
    for name, task in TASKS.items():
        if task.is_regression:
            labels = (rng.integers(0, 26, COUNT) / 5).astype(np.float32)
            predictions = np.round(labels + rng.normal(0, 1, COUNT), 1).astype(np.float32)
        else:
            labels = rng.integers(0, task.classes, COUNT)
            predictions = np.where(rng.random(COUNT) < 0.6, labels, rng.integers(0, task.classes, COUNT))
        scores = {metric: float(functions[metric](labels, predictions)) for metric in task.metrics}
        columns = {"predictions": predictions.tolist(), "labels": labels.tolist()}
        lines.append(f'"{name}": {json.dumps({"scores": scores} | columns)}')
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
