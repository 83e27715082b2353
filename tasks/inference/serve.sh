#!/usr/bin/env bash
# Serves a model over HTTP with OpenAI's API (/v1/chat/completions, /v1/completions ...), until SIGTERM or Ctrl-C
#
#   CHECKPOINT=DIR bash tasks/inference/serve.sh --port 8000
#   CHECKPOINT=DIR TP=2 INTERNLM_API_KEY=KEY bash tasks/inference/serve.sh --host 0.0.0.0
#
# From the environment: CHECKPOINT, TOKENIZER_PATH, DTYPE, TP, PP. Other flags: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/launch.sh"

[ -n "${CHECKPOINT:-}" ] || fail "CHECKPOINT is not set: the folder of the weights"
fixed --load "$CHECKPOINT"
optional --tokenizer-name-or-path TOKENIZER_PATH ""                     # directory with the tokenizer; empty: the one in CHECKPOINT
value --tensor-model-parallel-size TP 1
value --pipeline-model-parallel-size PP 1                               # NPROC, the processes on this node, is TP x PP by default
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

answer tasks/inference/serve.py "$@"
