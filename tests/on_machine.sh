#!/usr/bin/env bash
# Build the extension with this machine's own Python and packages, and run every test that needs no model.
# For machines where the project cannot be installed with its pins; needs what README says to install.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD_DIR:-build/on_machine}
export PYTHONPATH=.:protos${PYTHONPATH:+:$PYTHONPATH}

"$python" --version
grep -m1 'model name' /proc/cpuinfo; nproc
cmake -S fluxion_core/kernels/native -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null &&
  cmake --build "$build" 2>&1 | tail -1 && cp "$build"/_native*.so fluxion_core/kernels/ || exit 1
"$python" -m pytest -q -x -p no:cacheprovider -m "not model" -W default tests/fluxion_core tests/services/prefill tests/services/decode "$@" 2>&1 | tail -15
status=${PIPESTATUS[0]}
exit "$status"
