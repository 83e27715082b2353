#!/usr/bin/env bash
# Runs linter, type checker and tests in the repository's own environment: `bash tests/run.sh`. `--full` adds the slow tests.
# Without further arguments the test files run side by side in WORKERS processes (default: 2); further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
unset PYTHONDONTWRITEBYTECODE  # else each of some hundred processes compiles the modules again
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

options=()
if [ "${1:-}" = "--full" ]; then
    shift
    options=(-m "not gpu")
fi
if [ "$#" = 0 ]; then
    # A file stays in one process, so that its tests share what they have started; tests/conftest.py groups and orders them.
    options+=(-n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations 10 --durations-min 1)
fi
ruff check .
ruff format --check --quiet . || { echo "error: not formatted; run: ruff format ." >&2; exit 1; }
report=$(mktemp)
trap 'rm -f "$report"' EXIT
nice -n 19 mypy > "$report" 2>&1 &  # in the time that tests wait; on its own it would leave a core idle
types=$!
failed=0
python -m pytest "${options[@]}" "$@" || failed=$?
wait "$types" || failed=$((failed ? failed : 1))
cat "$report"
exit "$failed"
