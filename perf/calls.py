"""What a small call, the import and first calls cost: python perf/calls.py [--write]"""

import os
import subprocess
import sys
import tempfile

import numpy as np
from bench import F, medians, row, torch, write

import numbaloss as nl

REPEAT = 200


def repeated(call):
    def run():
        for _ in range(REPEAT):
            call()

    return run


FIRST = {
    "cross_entropy": "nl.cross_entropy(x, y)",
    "cross_entropy, few classes": "nl.cross_entropy(x[:, :100], y // 10)",
    "value_and_grad of it": "nl.value_and_grad(nl.cross_entropy)(x, y)",
    "score_tokens": "nl.score_tokens(x, y, rank=True, entropy=True)",
    "softmax": "nl.softmax(x)",
    "sigmoid, value_and_grad": "nl.value_and_grad(nl.sigmoid_cross_entropy_with_logits)(x, x)",
    "kl_divergence": "nl.kl_divergence(x, x)",
}


def first_calls():
    """Seconds of the first call in a process, with an empty cache of kernels and with the one that it left behind."""
    found = {}
    for name, call in FIRST.items():
        code = f"""
import time
import numpy as np
import numbaloss as nl
x, y = np.random.default_rng(0).standard_normal((3000, 1000), dtype=np.float32), np.arange(3000) % 1000
begin = time.perf_counter()
{call}
print(time.perf_counter() - begin)
"""
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            both = [float(subprocess.check_output([sys.executable, "-c", code], env=environment)) for _ in range(2)]
        found[name] = [round(s, 2) for s in both]
        print(f"first call of {name:28s} {both[0]:6.2f} s, with a cache {both[1]:6.2f} s")
    return {"case": "first call in a process, seconds: empty cache, filled cache", "s": found}


def main():
    table = []
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 10), dtype=np.float32), rng.integers(0, 10, 4)
    contenders = {"numbaloss": repeated(lambda: nl.cross_entropy(x, y))}
    if torch:
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        contenders["torch"] = repeated(lambda: F.cross_entropy(a, b))
    row(table, f"cross_entropy (4, 10), {REPEAT} calls", contenders, x.nbytes * REPEAT)

    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    t = medians({"nothing": python("pass"), "numpy": python("import numpy"), "numbaloss": python("import numbaloss")})
    print("whole process:", {k: f"{v:.3f} s" for k, v in t.items()})
    table.append({"case": "import, whole process", "s": {k: round(v, 4) for k, v in t.items()}})
    table.append(first_calls())
    if "--write" in sys.argv:
        write("calls", table)


if __name__ == "__main__":
    main()
