"""Score logits held as NumPy or CuPy arrays: TensorFlow's loss functions and what grew out of them.

Importing this package imports NumPy alone; Numba and the kernels come with the first call.
"""

from ._version import __version__
from .divergence import js_divergence, kl_divergence
from .grad import value_and_grad, value_grad_hess
from .linear import linear_cross_entropy
from .sequence import sequence_loss
from .sigmoid import (
    sigmoid_cross_entropy_with_logits,
    sigmoid_focal_cross_entropy_with_logits,
    weighted_cross_entropy_with_logits,
)
from .softmax import (
    TokenScores,
    cross_entropy,
    focal_loss,
    log_softmax,
    logsumexp,
    score_tokens,
    softmax,
    softmax_cross_entropy_with_logits,
    sparse_softmax_cross_entropy_with_logits,
    token_logprobs,
)
from .totals import Evaluation, EvaluationResult

__all__ = [
    "Evaluation",
    "EvaluationResult",
    "TokenScores",
    "__version__",
    "cross_entropy",
    "focal_loss",
    "js_divergence",
    "kl_divergence",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "score_tokens",
    "sequence_loss",
    "sigmoid_cross_entropy_with_logits",
    "sigmoid_focal_cross_entropy_with_logits",
    "softmax",
    "softmax_cross_entropy_with_logits",
    "sparse_softmax_cross_entropy_with_logits",
    "token_logprobs",
    "value_and_grad",
    "value_grad_hess",
    "weighted_cross_entropy_with_logits",
]
