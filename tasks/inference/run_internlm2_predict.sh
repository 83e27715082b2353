#!/usr/bin/env bash
# MindFormers' run_internlm2_predict.sh: answers its three questions. The checkpoint may be a .ckpt of MindFormers, with config.json
# of the model beside it, or any folder that --load takes; the YAML file is not read.
#
#   bash tasks/inference/run_internlm2_predict.sh single|parallel CONFIG CKPT DEVICES TOKENIZER [FLAGS...]
set -euo pipefail
usage="usage: bash tasks/inference/run_internlm2_predict.sh single|parallel CONFIG CKPT DEVICES TOKENIZER [FLAGS...]"
[ $# -ge 5 ] || { echo "error: $usage" >&2; exit 2; }
case $1 in
    single) export TP=1 ;;
    parallel) export TP=$4 ;;
    *) echo "error: $1 is neither single nor parallel; $usage" >&2; exit 2 ;;
esac
folder_of() { if [ -f "$1" ]; then dirname "$1"; else echo "$1"; fi; }
CHECKPOINT=$(folder_of "$3") TOKENIZER_PATH=$(folder_of "$5")
export CHECKPOINT TOKENIZER_PATH
echo "note: $2 is not read: the architecture is that of config.json beside the weights, flags follow the arguments" >&2
shift 5
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/generate_internlm_7b_deepspeed.sh" \
    --input-texts "Hi, pls intro yourself" "Shanghai is a" "Huawei is a" "$@"
