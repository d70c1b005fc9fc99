"""What several test files share: inputs, layouts, bits and errors."""

import ml_dtypes
import numpy as np

import numbaloss as nl

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = {"float16": np.float16, "bfloat16": BFLOAT16, "float32": np.float32, "float64": np.float64}
EPS = {np.dtype(np.float32): 2.0**-23, np.dtype(np.float64): 2.0**-52}
TINY = {np.dtype(np.float32): 2.0**-149, np.dtype(np.float64): 2.0**-1074}
BAR = 4  # eps that a loss of a finite row may be off, relatively

# around a vector, NARROW, a tile of lanes and a chunk
CLASSES = [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]
CLASSES += [2047, 2048, 2049, 8191, 8192, 8193, 50257, 65535, 65536, 65537]


def result_dtype(dtype):
    return np.dtype(np.float64 if np.dtype(dtype).newbyteorder("=") == np.float64 else np.float32)


def make_logits(rows, classes, dtype=np.float32, seed=0, scale=4.0):
    values = np.random.default_rng(seed).standard_normal((rows, classes), dtype=np.float32)
    return (values * np.float32(scale)).astype(dtype)


def make_labels(rows, classes, seed=0):
    return np.random.default_rng([seed, 1]).integers(0, classes, rows)


# -- bits ----------------------------------------------------------------------------------------------------------


def bits(a):
    a = np.ascontiguousarray(a)
    return a.view(f"u{a.dtype.itemsize}")


def flat_results(result):
    """The arrays of a result: itself, or the fields of a tuple that are not None."""
    return [r for r in result if r is not None] if isinstance(result, tuple) else [result]


def same_bits(got, expected):
    got, expected = flat_results(got), flat_results(expected)
    return len(got) == len(expected) and all(
        np.shape(a) == np.shape(b) and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))
        for a, b in zip(got, expected, strict=True)
    )


def assert_same_bits(got, expected, what=""):
    for k, (a, b) in enumerate(zip(flat_results(got), flat_results(expected), strict=True)):
        assert a.dtype == b.dtype, f"{what}[{k}]: dtype {a.dtype}, expected {b.dtype}"
        assert np.shape(a) == np.shape(b), f"{what}[{k}]: shape {np.shape(a)}, expected {np.shape(b)}"
        differ = np.argwhere(bits(a) != bits(b))
        if len(differ):
            at = tuple(int(i) for i in differ[0])
            a, b = np.atleast_1d(a), np.atleast_1d(b)
            raise AssertionError(
                f"{what}[{k}]: {len(differ)} of {a.size} differ, first at {at}: {a[at]!r}, not {b[at]!r}"
            )


# -- errors --------------------------------------------------------------------------------------------------------


def error_in_eps(got, exact, magnitude=None):
    """The error of each entry in eps of its dtype times `magnitude` (default: the exact value), or in steps of the
    subnormal numbers where these are larger; inf where a NaN or an infinity differs from the exact one."""
    got = np.asarray(got)
    eps, tiny = EPS[got.dtype], TINY[got.dtype]
    exact = np.asarray(exact, np.float64)
    size = np.abs(exact if magnitude is None else np.asarray(magnitude, np.float64))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        kept = exact.astype(got.dtype).astype(np.float64)  # out of the dtype's range: inf
        off = np.abs(got.astype(np.float64) - np.where(np.isinf(kept), kept, exact))
        error = off / np.maximum(size * eps, tiny)
        if got.dtype == np.float64:  # its exponential is 0 below -708, where results become subnormal
            error = np.where((got == 0) & (np.abs(exact) < np.exp(-708)), 0, error)
        same = (got == kept) | (np.isnan(got) & np.isnan(exact))
    error = np.where(same, np.where(np.isfinite(error), error, 0), np.where(np.isnan(error), np.inf, error))
    return error


def assert_close(got, exact, limit=BAR, magnitude=None, what=""):
    """Every entry within `limit` eps; returns the worst error."""
    error = error_in_eps(got, exact, magnitude)
    assert np.shape(got) == np.shape(exact), f"{what}: shape {np.shape(got)}, expected {np.shape(exact)}"
    if error.size == 0:
        return 0.0
    at = np.unravel_index(np.argmax(error - limit), error.shape)
    limit_at = np.broadcast_to(limit, error.shape)[at]
    if not error[at] <= limit_at:
        pair = f"got {np.asarray(got)[at]!r}, exact {np.asarray(exact)[at]!r}"
        raise AssertionError(f"{what} at {tuple(map(int, at))}: {error[at]:.3g} eps, limit {limit_at:.3g}: {pair}")
    return float(error.max())


def loss_limit(exact, dtype):
    """eps that a loss may be off. In float64 the difference of two logits is itself rounded: half an ulp of d moves
    exp(d) by |d| / 2 eps, and d is ln(loss) where it matters."""
    if result_dtype(dtype) == np.float32:
        return BAR
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.abs(np.log(np.clip(exact, 5e-324, 1)))
    return 2 * BAR + np.where(np.isnan(depth), 0, depth)  # the reference is as far off as the result


def none(logits, targets, **options):
    """The loss of every row."""
    return nl.cross_entropy(logits, targets, reduction="none", **options)


def positive_zero(a):
    return (a == 0) & ~np.signbit(a)


def assert_losses(got, logits, exact, what=""):
    """Losses of rows, their dtype, sign and accuracy; returns the worst error in eps."""
    dtype = np.asarray(logits).dtype
    assert got.dtype == result_dtype(dtype)
    assert not np.any(got < 0), f"{what}: negative loss {got.min()}"
    return assert_close(got, exact, loss_limit(exact, dtype), what=what)


# -- layouts -------------------------------------------------------------------------------------------------------


def unaligned(x):
    """A copy whose address is odd."""
    store = np.empty(x.nbytes + 1, np.uint8)[1:]
    out = store[: x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def read_only(x):
    out = x.copy()
    out.flags.writeable = False
    return out


def strided(x, axis, step):
    """A view with x's values that takes every `step`-th item of a larger (or reversed) array along `axis`."""
    shape = list(x.shape)
    shape[axis] = max(1, shape[axis] * abs(step))
    where = [slice(None)] * x.ndim
    where[axis] = slice(None, None, step)
    store = np.full(shape, 7, x.dtype)
    view = store[tuple(where)][: x.shape[0], : x.shape[1]]
    view[...] = x
    return view


def inside(x):
    """A view of x's values inside a larger array, one class in."""
    store = np.full((x.shape[0] + 2, x.shape[1] + 3), 7, x.dtype)
    store[1:-1, 1:-2] = x
    return store[1:-1, 1:-2]


LAYOUTS = {
    "fortran": np.asfortranarray,
    "every second class": lambda x: strided(x, 1, 2),
    "classes reversed": lambda x: strided(x, 1, -1),
    "every third class, reversed": lambda x: strided(x, 1, -3),
    "every second row": lambda x: strided(x, 0, 2),
    "rows reversed": lambda x: strided(x, 0, -1),
    "inside": inside,
    "transposed": lambda x: strided(np.ascontiguousarray(x.T), 1, 3).T,
    "read-only": read_only,
    "unaligned": unaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


def layouts_for(dtype):
    """bfloat16 has no big-endian twin in ml_dtypes."""
    return {k: v for k, v in LAYOUTS.items() if k != "big-endian" or np.dtype(dtype) != BFLOAT16}


class Exporter:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()
