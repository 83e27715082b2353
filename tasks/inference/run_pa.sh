#!/usr/bin/env bash
# Generates text or chats with the arguments of MindIE's run_pa.sh. Its flags are accepted: --input_texts --input_file
# --max_input_length --max_output_length --max_batch_size.
#
#   bash tasks/inference/run_pa.sh WEIGHTS [chat] [FLAGS...]
#   TP=8 bash tasks/inference/run_pa.sh ./model_from_hf/internlm2-chat-7b chat --input_file text_200K.jsonl --max_input_length 210000
set -euo pipefail
[ -n "${1:-}" ] || { echo "error: usage: bash tasks/inference/run_pa.sh WEIGHTS [chat] [FLAGS...]" >&2; exit 2; }
export CHECKPOINT=$1 TOKENIZER_PATH=${TOKENIZER_PATH:-}
shift
chat=
if [ "${1:-}" = chat ]; then
    chat="--task chat"
    shift
fi
# shellcheck disable=SC2086  # $chat is words
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/generate_internlm_7b_deepspeed.sh" $chat "$@"
