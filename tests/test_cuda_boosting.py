"""Objectives for XGBoost and LightGBM on CUDA: the bits of the CPU, in the scores' memory order."""

import numpy as np
import pytest
from common import assert_same_bits, make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402
from test_boosting import Data  # noqa: E402

from numbaloss import boosting  # noqa: E402

if not host.ON_DEVICE:
    pytest.importorskip("greenlet", reason="greenlet is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTIVES = {
    "softmax": boosting.softmax(4),
    "softmax, XGBoost": boosting.softmax(4, "xgboost"),
    "softmax, LightGBM": boosting.softmax(4, "lightgbm"),
    "sigmoid": boosting.sigmoid(),
    "weighted": boosting.weighted_sigmoid(3.0),
    "focal": boosting.focal(0.25, 1.5),
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    for function in () if host.ON_DEVICE else (np.multiply, np.maximum):
        monkeypatch.setattr(cupy, function.__name__, host.by_numpy(function))
    with host.on_host():
        yield


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_bits(name, order):
    """Labels and weights may lie on the host, where XGBoost has them, or on the device."""
    objective = OBJECTIVES[name]
    x = np.asarray(make_logits(30, 4, np.float32), order=order)
    y = make_labels(30, 4) if name.startswith("softmax") else make_labels(120, 2).astype(np.float32)
    for w in (None, (np.arange(30) % 5 / 2).astype(np.float32)):
        for place in (lambda a: a, lambda a: None if a is None else host.to_cupy(a)):
            scores, labels, weights = host.to_cupy(x), place(y), place(w)
            got = objective.sklearn(labels, scores, weights)
            assert all(type(a) is cupy.ndarray and a.strides == scores.strides for a in got)
            assert_same_bits(host.results(got), objective.sklearn(y, x, w))
            mean = objective.xgboost_metric(scores, Data(labels, weights))
            assert mean == objective.xgboost_metric(x, Data(y, w))


def test_a_label_out_of_range():
    """As on NumPy: the labels are on the host anyway, and gradients of NaN would spoil a model."""
    x, y = make_logits(6, 4, np.float32), make_labels(6, 4)
    y[2] = 4
    for scores in (x, host.to_cupy(x)):
        with pytest.raises(ValueError, match=r"labels: expected values in \[0, 4\), got 4 at position \(2,\)"):
            OBJECTIVES["softmax"].sklearn(y, scores)
