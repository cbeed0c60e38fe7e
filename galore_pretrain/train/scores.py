"""How good a model's predictions of a task of GLUE are, by the functions that GLUE's own scores are computed with."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galore_pretrain.errors import InputError
from galore_pretrain.text.glue import Task

Numbers = NDArray[Any]
"""Classes (int64), or scores (float32 or float64): one an example."""
Metric = Callable[[Numbers, Numbers], float]


# Hugging Face's package `evaluate` computes the same, but downloads what it executes. As there, a metric that is 0 / 0
# is what its library makes of it: Matthews' coefficient and F1 are 0 where a class is never predicted, and correlations
# with predictions that are all the same are NaN.
def score(task: Task, predictions: Numbers, labels: Numbers) -> dict[str, float]:
    """Return each of the task's metrics, by its name and in its order: from 0, or −1, to 1.

    ``predictions`` and ``labels`` are one number an example each: a class, or a score. Correlations are NaN where all
    predictions are the same. Raises InputError where the libraries are not installed.
    """
    metrics = load_metrics()
    if task.is_regression:  # in fp32, sums over many would be rounded
        predictions = predictions.astype(np.float64)
        labels = labels.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is 0 / 0
        return {name: float(metrics[name](labels, predictions)) for name in task.metrics}


def load_metrics() -> Mapping[str, Metric]:
    """Return the functions of all metrics by name; each takes the labels, and then the predictions.

    Raises InputError where their libraries are not installed.
    """
    try:
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError as error:
        raise InputError(
            f"finetune: its metrics need {error.name}, which is not installed; run pip install "
            "'galore-pretrain[finetune]'"
        ) from error
    return {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
        "spearman": lambda labels, predictions: spearmanr(labels, predictions).statistic,
    }
