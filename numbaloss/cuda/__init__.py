"""The CUDA backend: twins of numbaloss.cpu for CuPy arrays."""

_INSTALL = 'pip install "numbaloss[cuda13]" (driver 580 or later), or "numbaloss[cuda12]"'

try:
    import numba_cuda  # noqa: F401  numba.cuda is this package's; the one that comes with numba is older

    from . import _launch  # noqa: F401
except ImportError as error:
    raise ImportError(f"CuPy arrays need numba-cuda ({error}); {_INSTALL}") from error
except Exception as error:  # without a toolkit, numba.cuda raises a RuntimeError of its own
    raise ImportError(f"CuPy arrays need a CUDA toolkit that numba-cuda finds ({error}); {_INSTALL}") from error
