"""Objectives for XGBoost and LightGBM: by hand, and by training beside the objectives that these libraries bring.

What trains is skipped without them: pip install ".[boosting]". [n]: a line of docs/PITFALLS.md.
"""

import pickle

import numpy as np
import pytest
from common import assert_same_bits, make_labels, make_logits

import numbaloss as nl
from numbaloss import boosting

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 15


class Data:
    """What both libraries hand to an objective, as far as ours looks at it."""

    def __init__(self, labels, weights=None):
        self.labels, self.weights = labels, weights

    def get_label(self):
        return self.labels

    def get_weight(self):
        return self.weights


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", "CF")
def test_softmax(order, dtype):
    """[22] Each Hessian by its formula; results lie in memory as the scores do: LightGBM's are class-major."""
    x, y = np.asarray(make_logits(30, 4, dtype), order=order), make_labels(30, 4)
    weights = (np.arange(30) % 5 / 2).astype(np.float32)
    p, eps = np.exp(nl.log_softmax(x.astype(np.float64))), np.finfo(dtype).eps
    for name, factor in (("diagonal", 1), ("xgboost", 2), ("lightgbm", 4 / 3)):
        objective = boosting.softmax(4, hessian=name)
        for w in (weights, None, np.empty(0, np.float32)):
            scale = (np.ones(30) if w is None or w.size == 0 else w)[:, None]
            for call in (objective.xgboost, objective.lightgbm):
                grad, hess = call(x, Data(y.astype(np.float32), w))
                assert grad.shape == hess.shape == x.shape and grad.dtype == hess.dtype == dtype
                assert grad.flags[f"{order}_CONTIGUOUS"] and hess.flags[f"{order}_CONTIGUOUS"]
                np.testing.assert_allclose(grad, scale * (p - np.eye(4)[y]), atol=8 * eps * 2)
                np.testing.assert_allclose(hess, np.maximum(scale * p * (1 - p) * factor, 1e-16), atol=8 * eps)
        assert_same_bits(objective.sklearn(y, x, weights), objective.xgboost(x, Data(y, weights)))
        mean = nl.cross_entropy(x, y, weights=weights)
        assert objective.xgboost_metric(x, Data(y, weights)) == ("softmax", float(mean))
        assert objective.lightgbm_metric(x, Data(y, weights)) == ("softmax", float(mean), False)


def test_two_classes():
    """Those of value_grad_hess, Hessians not under 1e-16; several targets a row share its weight."""
    x, y = make_logits(40, 3), make_labels(120, 2).reshape(40, 3).astype(np.float32)
    weights = (np.arange(40) % 4).astype(np.float32)
    for objective, loss, options in (
        (boosting.sigmoid(), nl.sigmoid_cross_entropy_with_logits, {}),
        (boosting.weighted_sigmoid(3.0), nl.weighted_cross_entropy_with_logits, {"pos_weight": 3.0}),
        (boosting.focal(0.25, 1.5), nl.sigmoid_focal_cross_entropy_with_logits, {"alpha": 0.25, "gamma": 1.5}),
    ):
        for scores, labels in ((x, y), (np.asfortranarray(x), y), (x[:, 0].copy(), y[:, 0].copy())):
            w = weights.reshape(-1, *[1] * (scores.ndim - 1))
            value, grad, hess = nl.value_grad_hess(loss)(labels, scores, upstream=w, **options)
            got = objective.xgboost(scores, Data(labels.ravel(), weights))
            assert_same_bits(got, (grad, np.maximum(hess, np.float32(1e-16))))
            mean = np.average(value.astype(np.float64), weights=np.broadcast_to(w, value.shape))
            name, found = objective.xgboost_metric(scores, Data(labels.ravel(), weights))
            assert name == objective.name and abs(found - mean) <= 2.0**-23 * mean
    assert (hess < 0).any() and (got[1] > 0).all()  # the focal loss


def test_errors_and_pickles():
    x, y = make_logits(6, 3), make_labels(6, 3)
    objective = boosting.softmax(3)
    again = pickle.loads(pickle.dumps(objective.sklearn))  # scikit-learn copies its parameters
    assert_same_bits(again(y, x), objective.sklearn(y, x))
    for match, call in (
        ("classes: expected 2 or more, got 1", lambda: boosting.softmax(1)),
        ("hessian: expected one of 'diagonal'", lambda: boosting.softmax(3, "upper_bound")),
        (r"scores: expected 3 classes, got shape \(6, 2\)", lambda: objective.sklearn(y, x[:, :2])),
        ("labels: expected integers, got fractions", lambda: objective.sklearn(y + 0.5, x)),
        (r"labels: expected values in \[0, 3\), got 3 at", lambda: objective.sklearn(y + 3 - y[0], x)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# -- by training ---------------------------------------------------------------------------------------------------


def data(name):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    return features, labels, np.random.default_rng(0).integers(1, 5, len(labels)) / 2.0


# (data, our objective, theirs in XGBoost with its metric, in LightGBM)
CASES = {
    "wine": (boosting.softmax, 3, "multi:softprob", "mlogloss", "multiclass", {}),
    "digits": (boosting.softmax, 10, "multi:softprob", "mlogloss", "multiclass", {}),
    "breast_cancer": (boosting.sigmoid, None, "binary:logistic", "logloss", "binary", {}),
    "breast_cancer weighted": (
        boosting.weighted_sigmoid,
        None,
        "binary:logistic",
        "logloss",
        "binary",
        {"scale_pos_weight": 2.5},
    ),
}


def objective_for(case, library):
    make, classes, _, _, _, options = CASES[case]
    return make(classes, library) if classes else make(*options.values())


@pytest.mark.parametrize("case", CASES)
def test_xgboost(case):
    """The trees that XGBoost's own objective grows, and its metric to 1e-6, with weights."""
    xgboost = pytest.importorskip("xgboost", reason="XGBoost is not installed")
    features, labels, weights = data(case.split()[0])
    _, classes, theirs, metric, _, options = CASES[case]
    ours, matrix = objective_for(case, "xgboost"), xgboost.DMatrix(features, label=labels, weight=weights)
    common = {"max_depth": 3, "base_score": 0.5, "nthread": 1} | ({"num_class": classes} if classes else {})
    first, second = {}, {}
    watch = {"evals": [(matrix, "train")], "verbose_eval": False}
    builtin = {"objective": theirs, "eval_metric": metric, **common, **options}
    expected = xgboost.train(builtin, matrix, ROUNDS, evals_result=first, **watch)
    margin = {} if classes else {"base_score": 0.0}  # a probability there, a score here
    custom = {"disable_default_eval_metric": 1, **common, **margin}
    calls = {"obj": ours.xgboost, "custom_metric": ours.xgboost_metric}
    got = xgboost.train(custom, matrix, ROUNDS, evals_result=second, **calls, **watch)
    scores = [model.predict(matrix, output_margin=True) for model in (expected, got)]
    np.testing.assert_allclose(*scores, atol=2e-5)
    if not options:  # their metric does not know the weight of the positive part
        assert abs(ours.xgboost_metric(scores[1], matrix)[1] - first["train"][metric][-1]) < 1e-6
        assert abs(second["train"][ours.name][-1] - first["train"][metric][-1]) < 1e-5  # XGBoost prints five digits


@pytest.mark.parametrize("case", CASES)
def test_lightgbm(case):
    """The scores of LightGBM's own objective, and its metric to 1e-6, with weights."""
    lightgbm = pytest.importorskip("lightgbm", reason="LightGBM is not installed")
    features, labels, weights = data(case.split()[0])
    _, classes, _, _, theirs, options = CASES[case]
    ours = objective_for(case, "lightgbm")
    common = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, "boost_from_average": False}
    common |= {"num_class": classes, "metric": "multi_logloss"} if classes else {"metric": "binary_logloss"}
    scores, records = [], []
    for objective, more in ((theirs, options), (ours.lightgbm, {})):
        dataset, record = lightgbm.Dataset(features, label=labels, weight=weights, free_raw_data=False), {}
        calls = {"valid_sets": [dataset], "callbacks": [lightgbm.record_evaluation(record)]}
        feval = {"feval": ours.lightgbm_metric} if callable(objective) else {}
        model = lightgbm.train({"objective": objective, **common, **more}, dataset, ROUNDS, **calls, **feval)
        scores.append(model.predict(features, raw_score=True))
        records.append(record["training"])
    np.testing.assert_allclose(*scores, atol=1e-6)
    if not options:
        assert abs(records[1][ours.name][-1] - records[0][common["metric"]][-1]) < 1e-6


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_scikit_learn(name):
    """Their classes for scikit-learn, with sample weights."""
    xgboost = pytest.importorskip("xgboost", reason="XGBoost is not installed")
    lightgbm = pytest.importorskip("lightgbm", reason="LightGBM is not installed")
    features, labels, weights = data(name)
    _, _, theirs, _, also_theirs, _ = CASES[name]
    scores = []
    for objective in (theirs, objective_for(name, "xgboost").sklearn):
        model = xgboost.XGBClassifier(n_estimators=ROUNDS, max_depth=3, n_jobs=1, base_score=0.5, objective=objective)
        scores.append(model.fit(features, labels, sample_weight=weights).predict(features, output_margin=True))
    np.testing.assert_allclose(*scores, atol=2e-5)
    scores = []
    for objective in (also_theirs, objective_for(name, "lightgbm").sklearn):
        options = {"n_estimators": ROUNDS, "n_jobs": 1, "verbose": -1, "boost_from_average": False}
        model = lightgbm.LGBMClassifier(objective=objective, **options).fit(features, labels, sample_weight=weights)
        scores.append(model.predict(features, raw_score=True))
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_true_hessian_and_focal():
    """What neither library brings: it trains, and a gamma of 0 is the sigmoid."""
    xgboost = pytest.importorskip("xgboost", reason="XGBoost is not installed")
    for name, objective in (("wine", boosting.softmax(3)), ("breast_cancer", boosting.focal(0.25))):
        features, labels, weights = data(name)
        matrix, record = xgboost.DMatrix(features, label=labels, weight=weights), {}
        parameters = {"max_depth": 3, "nthread": 1, "disable_default_eval_metric": 1, "base_score": 0.0}
        parameters |= {"num_class": 3} if name == "wine" else {}
        calls = {"obj": objective.xgboost, "custom_metric": objective.xgboost_metric, "evals_result": record}
        xgboost.train(parameters, matrix, ROUNDS, evals=[(matrix, "train")], verbose_eval=False, **calls)
        losses = record["train"][objective.name]
        assert losses[-1] < losses[0] / 10 and (np.diff(losses) < 0).all()
    scores = np.linspace(-9, 9, len(labels), dtype=np.float32)
    for a, b in zip(boosting.focal(gamma=0).xgboost(scores, matrix), boosting.sigmoid().xgboost(scores, matrix)):
        np.testing.assert_allclose(a, b, rtol=8 * 2.0**-23)
