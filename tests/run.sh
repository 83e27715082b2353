#!/usr/bin/env bash
# The tests, in the repository's own environment: `bash tests/run.sh`; `--full` adds the slow ones; further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

markers=()
if [ "${1:-}" = "--full" ]; then
    shift
    markers=(-m "not gpu")
fi
ruff check .
ruff format --check --quiet . || { echo "error: not formatted; run: ruff format ." >&2; exit 1; }
python -m pytest "${markers[@]}" "$@"
