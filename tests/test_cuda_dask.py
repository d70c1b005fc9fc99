"""Dask arrays whose blocks are CuPy's: the bits that NumPy's have."""

import numpy as np
import pytest
from common import assert_same_bits, make_labels, make_logits

cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
dask = pytest.importorskip("dask", reason="Dask is not installed")

import cuda_on_host as host  # noqa: E402
import dask.array as da  # noqa: E402

import numbaloss as nl  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(lazy):
    """The blocks of a Dask array, together as one NumPy array."""
    assert isinstance(lazy._meta, cupy.ndarray)
    blocks = [[host.to_numpy(block.compute()) for block in row] for row in lazy.to_delayed()]
    return np.block(blocks)


def test_blocks():
    x, y = make_logits(12, 300).reshape(3, 4, 300), make_labels(12, 300).reshape(3, 4)
    together = lambda parts, axis=0: host.to_cupy(np.concatenate([host.to_numpy(p) for p in parts], axis))  # noqa: E731
    if not host.ON_DEVICE:  # where CuPy would start a kernel of its own
        da.core.concatenate_lookup.register(cupy.ndarray, together)
    with host.on_host(), dask.config.set(scheduler="synchronous"):
        given = [
            da.from_array(a, chunks=2).map_blocks(host.to_cupy, meta=host.to_cupy(a[(slice(0),) * a.ndim]))
            for a in (x, y)
        ]
        assert_same_bits(
            blocks_of(nl.cross_entropy(*given, reduction="none")), nl.cross_entropy(x, y, reduction="none")
        )
        for got, want in zip(nl.score_tokens(*given, rank=True)[:4], nl.score_tokens(x, y, rank=True)[:4]):
            assert_same_bits(blocks_of(got), want)
        assert nl.Evaluation().update(*given).to_json() == nl.Evaluation().update(x, y).to_json()
        with pytest.raises(TypeError, match="expected a CuPy array as logits is, got a NumPy array"):
            nl.cross_entropy(given[0], da.from_array(y, chunks=2))
        if host.ON_DEVICE:  # where CuPy copies a result
            assert_same_bits(host.results(nl.cross_entropy(*given).compute()), nl.cross_entropy(x, y))
