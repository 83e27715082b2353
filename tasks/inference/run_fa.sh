#!/usr/bin/env bash
# MindIE's run_fa.sh (FlashAttention); here the same command as run_pa.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_pa.sh" "$@"
