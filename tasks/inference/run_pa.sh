#!/usr/bin/env bash
# Generates text or chats with the arguments of MindIE's run_pa.sh. Its flags are accepted: --input_texts --input_file
# --max_input_length --max_output_length --max_batch_size. Without a prompt it asks MindIE's question.
#
#   bash tasks/inference/run_pa.sh WEIGHTS [chat] [FLAGS...]
#   TP=8 bash tasks/inference/run_pa.sh ./model_from_hf/internlm2-chat-7b chat --input_file text_200K.jsonl --max_input_length 210000
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
case ${1:-} in
    "") echo "error: usage: bash tasks/inference/run_pa.sh WEIGHTS [chat] [FLAGS...]" >&2; exit 2 ;;
    [pf]a_*) exec bash "$folder/benchmark.sh" "$@" ;;     # arguments of run.sh
esac
export CHECKPOINT=$1 TOKENIZER_PATH=${TOKENIZER_PATH:-}
shift
words=()
if [ "${1:-}" = chat ]; then
    words=(--task chat)
    shift
else
    case " $* " in
        *" --prompt"* | *" --input"* | *" --task"* | *" --help "*) ;;
        *) [ -p /dev/stdin ] || [ -f /dev/stdin ] || words=(--input-texts "What's deep learning?") ;;
    esac
fi
exec bash "$folder/../../examples/intern/generate_internlm_7b_deepspeed.sh" "${words[@]}" "$@"
