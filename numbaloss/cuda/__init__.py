"""The CUDA backend: twins of numbaloss.cpu for CuPy arrays. Not there yet."""

raise ImportError(
    "numbaloss has no CUDA kernels in this version: pass NumPy arrays (cupy.asnumpy(x)). CuPy arrays will need one of "
    'the extras "numbaloss[cuda12]" and "numbaloss[cuda13]"'
)
