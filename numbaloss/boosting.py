"""Objectives and metrics for XGBoost and LightGBM, of which neither is imported.

    objective = boosting.softmax(classes=3)
    xgboost.train({"num_class": 3, "disable_default_eval_metric": 1}, data, obj=objective.xgboost,
                  custom_metric=objective.xgboost_metric)
    lightgbm.train({"objective": objective.lightgbm, "num_class": 3}, data, feval=objective.lightgbm_metric)
    xgboost.XGBClassifier(objective=objective.sklearn)        lightgbm.LGBMClassifier(objective=objective.sklearn)

A model trained by an objective of one's own predicts scores: softmax or sigmoid of them are probabilities. It does not
start from the labels' average: set base_score (XGBoost; a score, but for XGBClassifier of two classes a probability) or
init_score (LightGBM) where that matters. What lies on a GPU, where XGBoost gives CuPy arrays, stays there.
"""

import numpy as np

from . import _check
from ._backend import array_module, kernels
from .grad import value_grad_hess
from .sigmoid import (
    sigmoid_cross_entropy_with_logits,
    sigmoid_focal_cross_entropy_with_logits,
    weighted_cross_entropy_with_logits,
)
from .softmax import sparse_softmax_cross_entropy_with_logits

LEAST_HESSIAN = 1e-16  # XGBoost's; a sum of Hessians divides


def softmax(classes, hessian="diagonal"):
    """Cross entropy of several classes.

    Args:
        classes: how many; labels are integers in [0, classes), of whatever dtype.
        hessian: "diagonal" for p (1 - p), the diagonal of the Hessian; "xgboost" for 2 p (1 - p) and "lightgbm" for
            classes / (classes - 1) * p (1 - p), what their own objectives take in its place: steps are smaller.
    Returns:
        An Objective.
    Source: objectives multi:softprob of XGBoost 3.2 and multiclass of LightGBM 4.7.

    >>> [a.round(3) for a in softmax(2).sklearn(np.array([0]), np.array([[1.0, 0.0]]))]
    [array([[-0.269,  0.269]]), array([[0.197, 0.197]])]
    """
    classes = _check.integer(classes, "classes")
    if classes < 2:
        raise ValueError(f"classes: expected 2 or more, got {classes}")
    _check.choice(hessian, "hessian", ("diagonal", "xgboost", "lightgbm"))
    # labels are on the host when they come, where _checked looks at them once, also for a device
    return Objective("softmax", sparse_softmax_cross_entropy_with_logits, classes, hessian, check_labels="nan")


def sigmoid():
    """Cross entropy of two classes, labels in [0, 1]. Returns an Objective, as binary:logistic and binary."""
    return Objective("sigmoid", sigmoid_cross_entropy_with_logits)


def weighted_sigmoid(pos_weight):
    """sigmoid() whose positive part counts `pos_weight` times, as scale_pos_weight does. Returns an Objective."""
    return Objective("weighted_sigmoid", weighted_cross_entropy_with_logits, pos_weight=pos_weight)


def focal(alpha=None, gamma=2.0):
    """sigmoid_focal_cross_entropy_with_logits, which see. Where it is concave its Hessian counts as 1e-16. Returns an
    Objective."""
    return Objective("focal", sigmoid_focal_cross_entropy_with_logits, alpha=alpha, gamma=gamma)


class Objective:
    """A loss in the calling conventions of XGBoost and LightGBM: its methods are what they ask for.

    Scores are (rows,), or (rows, classes) in either memory order, which gradients and Hessians then have too. Hessians
    are 1e-16 at least. A metric is the mean loss, weighted, of scores.
    """

    def __init__(self, name, loss, classes=None, hessian=None, **options):
        self.name, self._loss, self._classes, self._hessian, self._options = name, loss, classes, hessian, options

    def xgboost(self, predt, dtrain):
        """`obj` of xgboost.train: (gradient, Hessian)."""
        return self._derivatives(predt, dtrain.get_label(), dtrain.get_weight())

    def xgboost_metric(self, predt, dtrain):
        """`custom_metric` of xgboost.train: (name, value)."""
        return self.name, self._mean(predt, dtrain.get_label(), dtrain.get_weight())

    def lightgbm(self, preds, train_data):
        """`objective` among the parameters of lightgbm.train: (gradient, Hessian)."""
        return self._derivatives(preds, train_data.get_label(), train_data.get_weight())

    def lightgbm_metric(self, preds, train_data):
        """`feval` of lightgbm.train: (name, value, False), as lower is better."""
        return self.name, self._mean(preds, train_data.get_label(), train_data.get_weight()), False

    def sklearn(self, y_true, y_pred, sample_weight=None):
        """`objective` of the scikit-learn classes of both libraries: (gradient, Hessian)."""
        return self._derivatives(y_pred, y_true, sample_weight)

    def _derivatives(self, scores, labels, weights):
        labels, weights = self._checked(scores, labels, weights)
        run = value_grad_hess(self._loss, "upper_bound" if self._hessian == "xgboost" else "diagonal")
        _, grad, hess = run(labels, scores, upstream=weights, **self._options)
        xp, number = array_module(hess), hess.dtype.type
        if self._hessian == "lightgbm":
            xp.multiply(hess, number(self._classes / (self._classes - 1)), out=hess)
        return grad, xp.maximum(hess, number(LEAST_HESSIAN), out=hess)

    def _mean(self, scores, labels, weights):
        labels, weights = self._checked(scores, labels, weights)
        losses = self._loss(labels, scores, **self._options)
        xp = array_module(losses)
        losses = xp.ascontiguousarray(losses)
        if weights is not None:
            weights = _check.weights(xp.broadcast_to(weights, losses.shape), losses.shape, losses)
        total = kernels("totals", losses=losses).total
        mean = total(_check.flat(losses), None, weights, None, _check.NO_LABEL, _check.FACTORS)
        return float(_check.on_host(mean))

    def _checked(self, scores, labels, weights):
        """Labels and weights as arrays of the scores' kind; no weights are None."""
        xp, labels = array_module(scores), np.asarray(_check.on_host(labels))
        if self._classes:
            if scores.ndim != 2 or scores.shape[1] != self._classes:
                raise ValueError(f"scores: expected {self._classes} classes, got shape {scores.shape}")
            given, labels = labels, labels.astype(np.int64)
            if (given != labels).any():
                raise ValueError("labels: expected integers, got fractions")
            _check.raise_bad_label(labels, self._classes, None, _check.NO_LABEL, "labels")
        labels = xp.asarray(labels.reshape(scores.shape[: 1 if self._classes else None]))
        if weights is None or len(weights) == 0:
            return labels, None
        return labels, xp.asarray(weights).reshape(-1, *[1] * (labels.ndim - 1))

    def __repr__(self):
        return f"Objective({self.name!r})"
