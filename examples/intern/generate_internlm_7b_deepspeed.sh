#!/usr/bin/env bash
# Generates text with InternLM-7B, or any other by its weights. Values come from the environment, flags at the end:
#
#   CHECKPOINT=./model_from_hf/internlm-7b bash examples/intern/generate_internlm_7b_deepspeed.sh --prompt "The capital of France is"
#   CHECKPOINT=./model_from_hf/internlm2-chat-7b bash examples/intern/generate_internlm_7b_deepspeed.sh --task chat
#   TP=8 CHECKPOINT=./ckpt_65b bash examples/intern/generate_internlm_7b_deepspeed.sh --input-file questions.jsonl --output-file answers.jsonl
#
# Without a prompt it shows the tasks on a few texts of its own. All flags: python tasks/inference/generate.py --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights}               # Hugging Face directory, converted weights, or a training checkpoint
TOKENIZER_PATH=${TOKENIZER_PATH-./dataset/internlm}     # directory with tokenizer.model; empty: the one in $CHECKPOINT
MODEL=${MODEL:-}                                        # by name, if it is to be checked (internlm-7b ...)
DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
TP=${TP:-1}                                             # tensor-parallel size
PP=${PP:-1}                                             # pipeline stages
[ -n "${HOSTFILE:-}${NNODES:-}" ] || export NPROC=${NPROC:-$((TP * PP))}    # processes on this node

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # the dtype flag is a word, or none
launch_quietly tasks/inference/generate.py \
    --load "$CHECKPOINT" \
    ${TOKENIZER_PATH:+--tokenizer-name-or-path "$TOKENIZER_PATH"} \
    ${MODEL:+--model "$MODEL"} \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --distributed-backend nccl \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    $dtype \
    "$@"
