#!/usr/bin/env bash
# MindIE's other front; attention is the same here.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_pa.sh" "$@"
