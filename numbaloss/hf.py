"""Metrics of language models for the Trainer of Hugging Face's transformers. Neither it nor torch is imported.

    from numbaloss import hf
    metrics = hf.Metrics()  # shift=0 for masked language models, encoder-decoders and classifiers
    trainer = Trainer(model, arguments, eval_dataset=data, compute_metrics=metrics.compute_metrics,
                      preprocess_logits_for_metrics=metrics.preprocess_logits_for_metrics)
    trainer.evaluate()  # eval_loss, eval_perplexity, eval_bits_per_token, eval_accuracy, eval_standard_error, ...

With `preprocess_logits_for_metrics` each batch becomes two numbers a token as soon as it is there; without it the
Trainer keeps the logits of the whole evaluation set. The metrics have the same bits either way, in any batches, and
with batch_eval_metrics=True. eval_loss is the mean cross entropy of all tokens; the Trainer's own, whose place it
takes, is a mean of the batches' means (transformers#39241), with whatever else the model adds to its loss.
"""

import sys

import numpy as np

from . import _check
from ._backend import array_module, is_cupy, on_its_device
from .softmax import score_tokens
from .totals import Evaluation

PADDING = -100  # what the Trainer fills up shorter batches with, labels and predictions alike


class Metrics:
    """Totals of the target tokens' losses: its methods are named as the arguments of the Trainer that they are for.

    Args:
        shift: logits at t are of the label at t + shift, t along the labels' last axis: 1 for causal language models,
            0 where logits and labels stand side by side.
        ignore_index: tokens with this label, or with -100, are not looked at.

    >>> logits, labels = np.zeros((1, 3, 4)), np.array([[0, 2, -100]])
    >>> Metrics().compute_metrics((logits, labels))["perplexity"]
    4.0
    """

    def __init__(self, shift=1, *, ignore_index=PADDING):
        self.shift, self.ignore_index = _check.integer(shift, "shift"), _check.integer(ignore_index, "ignore_index")
        if self.shift < 0:
            raise ValueError(f"shift: expected 0 or more, got {self.shift}")
        self.reset()

    def reset(self):
        """Forget the batches of an evaluation with batch_eval_metrics=True that broke off half-way."""
        self._running = Evaluation(ignore_index=self.ignore_index)

    def preprocess_logits_for_metrics(self, logits, labels):
        """What the Trainer keeps of a batch in place of its logits.

        Args:
            logits: torch tensor or array, (batch, time, classes); or a tuple or list that begins with it. What is on
                a GPU stays there if CuPy and numba-cuda are installed, else it is copied to the host.
            labels: integers, (batch, time); or None, for which logits are returned as they are.
        Returns:
            (logprob, argmax), both (batch, time) and on the device of logits: the log-probability of the label that
            stands at t + shift, float32, or float64 for float64 logits, and the class of the largest logit, int64; 0
            and -1 where there is no such label, or one that is not looked at.
        Raises:
            TypeError, ValueError: as score_tokens on NumPy arrays, also for labels out of range on a GPU.
        """
        if labels is None:
            return logits
        logprob, argmax, _ = self._scores(logits, labels, "logits", "labels")
        return _as_given(logprob, _first(logits)), _as_given(argmax, _first(logits))

    def compute_metrics(self, eval_prediction, compute_result=None):
        """The metrics of an evaluation.

        Args:
            eval_prediction: EvalPrediction, or (predictions, label_ids): logits, or what
                preprocess_logits_for_metrics gave for them, and integers, (batch, time); arrays or torch tensors, or
                lists of them, a batch each (eval_do_concat_batches=False).
            compute_result: None for an evaluation that is here as a whole. With batch_eval_metrics=True the Trainer
                gives False for a batch that others follow, and True for the last one.
        Returns:
            A dict of the floats loss (nats a token), perplexity, bits_per_token, accuracy and standard_error (of the
            loss), as in Evaluation.result, and tokens, an integer; empty where compute_result is False.
        Raises:
            TypeError, ValueError: as score_tokens. The batches that came before are forgotten then.
        """
        evaluation = Evaluation(ignore_index=self.ignore_index) if compute_result is None else self._running
        try:
            for predictions, labels in _batches(eval_prediction[0], eval_prediction[1]):
                logprob, argmax, targets = self._scores(predictions, labels, "predictions", "label_ids")
                evaluation.add(_check.on_host(logprob), _check.on_host(argmax), targets.reshape(-1))
        except BaseException:
            self.reset()
            raise
        if compute_result is not None:
            if not compute_result:
                return {}
            self.reset()
        result = evaluation.result()
        names = "loss", "perplexity", "bits_per_token", "accuracy", "standard_error"
        return {name: float(getattr(result, name)) for name in names} | {"tokens": result.tokens}

    def _scores(self, predictions, labels, name, labels_name):
        """(logprob, argmax, targets), (batch, time), of logits or of what has been scored; targets on the host."""
        first, labels = _check.logits(_array(_first(predictions), name), name), _labels(labels, labels_name)
        scored = isinstance(predictions, (tuple, list)) and len(predictions) == 2 and first.ndim == labels.ndim
        shape = first.shape if scored else first.shape[:-1]
        if len(shape) < (2 if self.shift else 1):
            expected = f"(batch, time, classes) with shift={self.shift}" if self.shift else "(batch, ..., classes)"
            raise ValueError(f"{name}: expected shape {expected}, got {first.shape}")
        targets = _check.labels(labels, shape, labels_name, first)[0].reshape(shape).copy()
        targets[targets == PADDING] = self.ignore_index
        targets[..., : self.shift] = self.ignore_index  # of no logits
        if scored:
            argmax = _check.array(_array(predictions[1], name), name)
            _check.same_shape(argmax, name, shape, "the first of them")
            return first, argmax, self._shifted(targets)
        _check.raise_bad_label(targets, first.shape[-1], None, self.ignore_index, labels_name)
        targets = self._shifted(targets)
        return *_score(first, targets, self.ignore_index), targets

    def _shifted(self, targets):
        """The target of the logits at each t: that at t + shift."""
        shifted = np.full_like(targets, self.ignore_index)
        shifted[..., : max(0, targets.shape[-1] - self.shift)] = targets[..., self.shift :]
        return shifted

    def __repr__(self):
        return f"Metrics(shift={self.shift}, ignore_index={self.ignore_index})"


@on_its_device
def _score(logits, targets, ignore_index):
    """(logprob, argmax) of targets on the host that are known to be in range."""
    targets = array_module(logits).asarray(targets)
    scores = score_tokens(logits, targets, ignore_index=ignore_index, check_labels="nan")
    return scores.logprob, scores.argmax


def _batches(predictions, labels):
    """(predictions, labels) of each batch: the Trainer concatenates them, or keeps a list of either."""
    if not (isinstance(predictions, list) and isinstance(labels, list)):
        return [(predictions, labels)]
    if len(predictions) != len(labels):
        raise ValueError(f"label_ids: expected {len(predictions)} batches as predictions has, got {len(labels)}")
    return zip(predictions, labels)


def _first(predictions):
    """The logits of a model that gives more than them."""
    return predictions[0] if isinstance(predictions, (tuple, list)) and len(predictions) else predictions


def _labels(labels, name):
    """Labels as a NumPy array."""
    if isinstance(labels, tuple):
        raise TypeError(f"{name}: expected one array, got a tuple of {len(labels)}; see label_names")
    return np.asarray(_array(labels.cpu() if _is_tensor(labels) else _check.on_host(labels), name))


def _is_tensor(x):
    torch = sys.modules.get("torch")  # which must have been imported for a tensor to exist
    return torch is not None and isinstance(x, torch.Tensor)


def _array(x, name):
    """A torch tensor as an array over its memory, on the host if it must be; all else as it is."""
    if not _is_tensor(x):
        return x
    x = x.detach()
    if x.device.type != "cpu" and not (x.__dlpack_device__()[0] == _check.DLPACK_CUDA and _has_cuda_kernels()):
        x = x.cpu()
    torch = sys.modules["torch"]
    if x.dtype != torch.bfloat16:
        return _check.array(x, name)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return _check.array(x.float(), name)
    return _check.array(x.view(torch.int16), name).view(bfloat16)  # NumPy has no bfloat16 for DLPack


def _has_cuda_kernels():
    """Whether CuPy and the CUDA backend can be imported."""
    try:
        import cupy  # noqa: F401

        from . import cuda  # noqa: F401
    except ImportError:
        return False
    return True


def _as_given(x, like):
    """x as a torch tensor on the device of `like` if that is one."""
    if not _is_tensor(like):
        return x
    torch = sys.modules["torch"]
    return torch.from_dlpack(x) if is_cupy(x) else torch.from_numpy(x).to(like.device)
