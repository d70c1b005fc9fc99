"""What a small call and the import cost: python perf/calls.py [--write]"""

import subprocess
import sys

import numpy as np
from bench import F, medians, row, torch, write

import numbaloss as nl

REPEAT = 200


def repeated(call):
    def run():
        for _ in range(REPEAT):
            call()

    return run


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
    if "--write" in sys.argv:
        write("calls", table)


if __name__ == "__main__":
    main()
