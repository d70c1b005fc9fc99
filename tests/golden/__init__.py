"""Results of TensorFlow 1.13, 1.15, 2.15 (with TensorFlow Addons) and torch 2.13, recorded on a CPU.

    g = load("tf")                         # or "torch"
    for case in g.cases:
        x = g[case["inputs"]["logits"]]

NAME.npz holds one flat array per dtype (bfloat16 as uint16 bits), NAME.json.gz
{"meta", "arrays": {key: [dtype, offset, shape]}, "cases": [...]}. tf1_113 and tf1_115 hold cases only: their inputs
are keys into "tf".

A case's "copy" is "exact" (reproduce within "tol"), "quirk" (poor: "why" says what to do instead) or "error" (raises).
"truth" is the 200-bit value of the definition, "ref" the same call in float64, "f32" in float32.
"""

import functools
import gzip
import json
import pathlib

import ml_dtypes
import numpy as np

FOLDER = pathlib.Path(__file__).parent


class Golden:
    def __init__(self, name):
        self.meta, self.cases, self.index = (read(name)[key] for key in ("meta", "cases", "arrays"))
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.flat = dict(arrays)

    def __getitem__(self, key):
        dtype, offset, shape = self.index[key]
        a = self.flat[dtype][offset : offset + int(np.prod(shape, dtype=np.int64))].reshape(shape).copy()
        return a.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else a


@functools.cache
def read(name):
    with gzip.open(FOLDER / f"{name}.json.gz", "rt") as file:
        return json.load(file)


@functools.cache
def load(name):
    return Golden(name)
