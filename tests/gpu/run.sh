#!/usr/bin/env bash
# make test-gpu: the tests marked gpu, on one CUDA device. Results: gpu_results.json here, or the path in CHATGOT_GPU_RESULTS.
# Without a device it says so, writes the results file all the same, and exits 0. More arguments go to pytest.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
results="${CHATGOT_GPU_RESULTS:-gpu_results.json}"
case "$results" in /*) ;; *) results="$PWD/$results" ;; esac
export CHATGOT_GPU_RESULTS="$results"
cd "$root" || exit 6

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTHONDONTWRITEBYTECODE=1

reason="$("$python" -c 'from tests.gpu import machine; print(machine.missing() or "")')" || exit 6
if [ -n "$reason" ]; then
    echo "make test-gpu: $reason: every GPU test is skipped (results in $results)"
    if "$python" -c 'import deepspeed, pytest, torch' >/dev/null 2>&1; then
        log="$(mktemp)"
        "$python" -m pytest -m gpu -W default -p no:cacheprovider tests/gpu "$@" >"$log" 2>&1 || { code=$?; cat "$log"; rm -f "$log"; exit $code; }
        rm -f "$log"
        exit 0
    fi
    exec "$python" -m tests.gpu.report  # the tests cannot even be listed: a file that says why
fi
if [ "${CHATGOT_GPU_TESTS_ON_CPU:-}" != 1 ]; then
    export DS_ACCELERATOR=cuda
fi
exec "$python" -m pytest -m gpu -W default -p no:cacheprovider --disable-warnings --tb=short --show-capture=no tests/gpu "$@"
