#!/usr/bin/env bash
# Evaluates a model on benchmarks that lie on disk. Every value can be given in the environment, more flags at the end:
#
#   TASK="mmlu ceval boolq" DATA_PATH="data/mmlu data/ceval data/boolq" CHECKPOINT=model_from_hf/internlm-7b TOKENIZER_PATH= \
#       bash tasks/evaluation/eval_internlm.sh --prompt-style opencompass
#
# As it stands it asks the few questions in sample_mmlu. docs/evaluation.md: which files each benchmark consists of, and what
# published figures were obtained with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/launch.sh"

MODEL=${MODEL-}                                         # any by name (internlm-7b, internlm2-7b ...), to check the weights by; empty: what they say
CHECKPOINT=${CHECKPOINT:-./model_weights}               # Hugging Face directory, converted weights, or a training checkpoint
TOKENIZER_PATH=${TOKENIZER_PATH-./dataset/internlm}     # directory with tokenizer.model; empty: the one beside the weights
TASK=${TASK:-mmlu}                                      # of mmlu ceval cmmlu boolq gsm8k hellaswag
DATA_PATH=${DATA_PATH:-$(dirname "${BASH_SOURCE[0]}")/sample_mmlu}  # a folder for each, in the same order
OUTPUT=${OUTPUT:-./evaluation}                          # results; an evaluation that was stopped goes on there

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
TP=${TP:-1}                                             # tensor-parallel size
PP=${PP:-1}                                             # pipeline stages
[ -n "${HOSTFILE:-}${NNODES:-}" ] || export NPROC=${NPROC:-$((TP * PP))}    # processes on this node
BATCH=${BATCH:-16}                                      # rows side by side; changes no result

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # TASK, DATA_PATH and the dtype flag are words
launch_quietly tasks/evaluation/evaluation.py \
    --task $TASK \
    --task-data-path $DATA_PATH \
    --output-dir "$OUTPUT" \
    ${MODEL:+--model "$MODEL"} \
    --load "$CHECKPOINT" \
    ${TOKENIZER_PATH:+--tokenizer-name-or-path "$TOKENIZER_PATH"} \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --batch-size "$BATCH" \
    --distributed-backend nccl \
    $dtype \
    "$@"
