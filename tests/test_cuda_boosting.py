"""Objectives for XGBoost and LightGBM on CUDA: the bits of the CPU, in the scores' memory order."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
from common import assert_same_bits, make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import cuda_on_host as host  # noqa: E402

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
def device():
    def by_numpy(function):
        """A function of CuPy's, computed by NumPy."""
        return lambda a, b, out: function(host._view(a), b, out=host._view(out)) is None or out

    with ExitStack() as stack:
        stack.enter_context(host.on_host())
        for function in () if host.ON_DEVICE else (np.multiply, np.maximum):
            stack.enter_context(mock.patch.object(cupy, function.__name__, by_numpy(function)))
        yield


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_bits(name, order):
    """Labels and weights may lie on the host, where XGBoost has them, or on the device."""
    objective = OBJECTIVES[name]
    x = np.asarray(make_logits(30, 4, np.float32), order=order)
    y = make_labels(30, 4) if name.startswith("softmax") else make_labels(120, 2).astype(np.float32)
    for w in (None, (np.arange(30) % 5 / 2).astype(np.float32)):
        want, mean = objective.sklearn(y, x, w), objective._mean(x, y, w)
        for place in (lambda a: a, lambda a: None if a is None else host.to_cupy(a)):
            scores = host.to_cupy(x)
            got = objective.sklearn(place(y), scores, place(w))
            assert all(type(a) is cupy.ndarray and a.strides == scores.strides for a in got)
            assert_same_bits(host.results(got), want)
            assert objective._mean(scores, place(y), place(w)) == mean


def test_a_label_out_of_range():
    """As on NumPy: the labels are on the host anyway, and gradients of NaN would spoil a model."""
    x, y = make_logits(6, 4, np.float32), make_labels(6, 4)
    y[2] = 4
    for scores in (x, host.to_cupy(x)):
        with pytest.raises(ValueError, match=r"labels: expected values in \[0, 4\), got 4 at position \(2,\)"):
            OBJECTIVES["softmax"].sklearn(y, scores)
