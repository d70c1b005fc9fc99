"""`numbaloss demo`: a small language model of real English, scored through files, and checked in plain NumPy."""

import math
import os
import tempfile
import time

import numpy as np

_ORDERS = 5  # contexts of 0 to 4 characters
_LIMIT = 4  # float32 eps


def main():
    """Prints what it does and the score; 0, or 1 if the score deviates from the independent computation."""
    from .cli import print_score
    from .files import score

    text = english()
    split = len(text) * 9 // 10
    alphabet, codes = np.unique(np.array(list(text)), return_inverse=True)
    print(f"counting: {split:,} characters of Python's own documentation, {len(alphabet)} different ones")
    start = time.perf_counter()
    logits = next_character(codes, split, len(alphabet)).astype(np.float32)
    targets = codes[split - 1 :]
    print(f"a back-off model of 0 to {_ORDERS - 1} characters, in {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory(prefix="numbaloss-demo-") as folder:
        paths = [os.path.join(folder, name) for name in ("logits.npy", "targets.npy")]
        for path, array in zip(paths, (logits, targets), strict=True):
            np.save(path, array)
        print(f"its predictions of the other {len(text) - split:,} characters, as float32 logits {logits.shape}:")
        print(f"$ numbaloss score --shift 1 {' '.join(paths)}")
        result = score(*paths, shift=1)
    print_score(result)
    loss, accuracy = reference(logits[:-1], targets[1:])
    eps = float(np.finfo(np.float32).eps)
    deviation = abs(result.loss - loss) / loss / eps
    good = deviation <= _LIMIT and result.accuracy == accuracy and result.tokens == len(targets) - 1
    print(f"plain NumPy in float64 gives {loss:.9g} nats, accuracy {accuracy:.4%}")
    print(f"deviation of the loss: {deviation:.2g} float32 eps ({deviation * eps:.1e}), allowed {_LIMIT}: ", end="")
    print("good" if good else "WRONG")
    return 0 if good else 1


def english():
    """The help texts that ship with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("demo: this Python comes without its help texts (pydoc_data.topics)") from error
    text = "\n".join(topics[key] for key in sorted(topics) if isinstance(topics[key], str))
    if len(text) < 10_000:
        raise ValueError(f"demo: expected 10000 characters in pydoc_data.topics, got {len(text)}")
    return text


def next_character(codes, split, classes):
    """log p(next character | the last ones) after each of codes[split - 1:], counted on codes[:split].

    Witten-Bell: p_k = (count + kinds * p_(k-1)) / (total + kinds), kinds being the different characters seen after a
    context of k characters and total all of them; p_(-1) is uniform.
    """
    p = np.full((len(codes) - split + 1, classes), 1 / classes)
    context = np.zeros(len(codes), np.int64)  # number of the context that ends with each character
    for order in range(_ORDERS):
        if order:
            context[order - 1 :] += codes[: len(codes) - order + 1] * classes ** (order - 1)
        wanted, where = np.unique(context[split - 1 :], return_inverse=True)
        seen, following = context[: split - 1], codes[1:split]
        at = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        hit = wanted[at] == seen
        pairs = at[hit] * classes + following[hit]
        count = np.bincount(pairs, minlength=len(wanted) * classes).reshape(len(wanted), classes)
        total, kinds = count.sum(1, keepdims=True)[where], (count > 0).sum(1, keepdims=True)[where]
        p = np.where(total > 0, (count[where] + kinds * p) / np.maximum(total + kinds, 1), p)
    return np.log(p)


def reference(logits, targets):
    """(mean loss, accuracy) in float64, by the formula and math.fsum. Shares nothing with the package."""
    x = logits.astype(np.float64)
    top = x.max(1)
    losses = top + np.log(np.exp(x - top[:, None]).sum(1)) - x[np.arange(len(x)), targets]
    return math.fsum(losses) / len(x), float(np.mean(x.argmax(1) == targets))
