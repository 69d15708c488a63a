#!/usr/bin/env bash
# Build the extension with this machine's own Python and packages, run the tests that need no model, on a GPU time decode
# steps, and, with MODEL (a GGUF file) and DOCUMENTS (what `fluxion train` gathered) given, measure quality: RULER and
# greedy agreement.
# For machines where the project cannot be installed with its pins; needs torch, numpy, safetensors, tokenizers, gguf,
# jinja2, pydantic, rich and cyclopts, and on a GPU triton and nvidia-ml-py.
#   OUT           takes reports and journals (.)
#   PYTEST        arguments of pytest, in place of the folders whose tests use a GPU; "none" for no tests
#                 (tests/e2e/test_on_gpu.py needs gRPC's packages and FLUXION_TEST_MODEL=FILE)
#   SANITIZE      pytest arguments for one more run under compute-sanitizer's memcheck; unset for none
#   GPU_STEP      flags of fluxion_core.lab.benchmark.gpu_step, as `--contexts 32768 --batches 1,4`; unset for no timing
#   PLANS         files of recorded plans that are timed beside fixed(16, 5 %), separated by commas
#   WEIGHTS       predictor weights in place of the package's
#   POLICIES      separated by commas
#   RULER_SECONDS no case is begun after this (600)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD_DIR:-build/on_machine}
out=${OUT:-.}
policies=${POLICIES:-exact,accurate,balanced,fast,fixed(16, 5 %)}
export PYTHONPATH=.:protos${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=PASSIVE

"$python" --version
grep -m1 'model name' /proc/cpuinfo; nproc
cmake -S fluxion_core/kernels/native -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null &&
  cmake --build "$build" 2>&1 | tail -1 && cp "$build"/_native*.so fluxion_core/kernels/ || exit 1
gpu_tests="tests/fluxion_core/kernels tests/fluxion_core/decode/device tests/fluxion_core/kvstore tests/fluxion_core/prompt"
status=0
if [ "${PYTEST:-}" != none ]; then
  # shellcheck disable=SC2086
  # Without this project's own pytest settings: they name plug-ins that may be missing here.
  "$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q -x -p no:cacheprovider \
    ${PYTEST:-$gpu_tests} 2>&1 | tail -15
  status=${PIPESTATUS[0]}
fi
if [ -n "${SANITIZE:-}" ]; then
  # shellcheck disable=SC2086
  compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 --log-file "$out/memcheck-%p.log" \
    "$python" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q -x -p no:cacheprovider $SANITIZE 2>&1 | tail -5
  status=$((PIPESTATUS[0] | status))
  grep -h "ERROR SUMMARY" "$out"/memcheck-*.log | sort | uniq -c
fi
if [ -n "${GPU_STEP:-}" ]; then
  # shellcheck disable=SC2086
  "$python" -m fluxion_core.lab.benchmark.gpu_step $GPU_STEP --policies "fixed(16, 5 %)${PLANS:+,$PLANS}" \
    --json "$out/gpu-step.json" || status=1
  "$python" -m fluxion_core.lab.benchmark.offloaded_cache || status=1
fi
if [ -n "${MODEL:-}" ]; then
  evaluate() {
    "$python" -m fluxion_core.lab.evaluation "$@" --model "$MODEL" ${WEIGHTS:+--weights "$WEIGHTS"} --policies "$policies" ||
      status=1
  }
  mkdir -p "$out/prose" "$out/unseen"
  "$python" - "$DOCUMENTS" "$out" <<'PYTHON'
import json, pathlib, shutil, sys
source, out = map(pathlib.Path, sys.argv[1:])
tests = [d for d in json.loads((source / "manifest.json").read_text()) if d["split"] == "test"]
for document in tests:
    for folder, wanted in (("prose", document["kind"] == "prose"), ("unseen", document["characters"] > 33_000)):
        if wanted:
            shutil.copy(source / f"{document['name']}.txt", out / folder)
PYTHON
  evaluate agreement --lengths 7168 --data "$out/unseen" --cases 20 --batch 32 --journal "$out/agreement.jsonl" \
    --json "$out/agreement.json" --markdown "$out/agreement.md"
  evaluate ruler --lengths 4096,8192 --raw --pilot-cases 0 --batch 32 --cases "${CASES:-50}" --prose "$out/prose" \
    --tasks niah_single_1,niah_single_2,niah_multikey_1 --stop-after-seconds "${RULER_SECONDS:-600}" \
    --journal "$out/ruler.jsonl" --json "$out/ruler.json" --markdown "$out/ruler.md"
fi
exit "$status"
