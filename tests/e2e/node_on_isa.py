"""Run a node whose sums do not depend on this CPU: `node_on_isa.py ISA python -m MODULE FLAG...`.

What the native kernels and torch add up in another order differs in the last bits. Both are kept to
one instruction set here, whatever better one this CPU has.
"""

from __future__ import annotations

import os
import runpy
import sys

TORCH = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
"""What keeps torch and its libraries to an instruction set; they look once, when loaded."""


def main() -> None:
    isa, _, _, module, *flags = sys.argv[1:]
    os.environ.update(TORCH.get(isa, {}))
    from fluxion_core.kernels.isa import set_isa

    if isa != "any":
        set_isa(isa)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
