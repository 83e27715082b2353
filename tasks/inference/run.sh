#!/usr/bin/env bash
# MindIE's run.sh of modeltest: accuracy and speed tests, see benchmark.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/benchmark.sh" "$@"
