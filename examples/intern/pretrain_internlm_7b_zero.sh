#!/usr/bin/env bash
# Pre-trains InternLM-7B with DeepSpeed ZeRO-2 on 8 devices. Every value can be given in the environment, more flags at the end:
#
#   DATA=./dataset/alpaca_text_document CHECKPOINT=./model_weights bash examples/intern/pretrain_internlm_7b_zero.sh --train-iters 5000
#
# Several nodes: HOSTFILE=..., or NNODES, NODE_RANK, MASTER_ADDR, NPROC on each (launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-internlm-7b}                             # any by name (internlm2-7b, internlm3-8b ...); the weights' config.json must agree
TOKENIZER_PATH=${TOKENIZER_PATH:-./dataset/internlm}    # directory with tokenizer.model
DATA=${DATA:-./dataset/alpaca_text_document}            # prefix of the .bin/.idx pair; or weights and prefixes: "0.3 a 0.7 b"
CHECKPOINT=${CHECKPOINT-./model_weights}                # weights or a training checkpoint; empty: random weights
SAVE=${SAVE:-./ckpt}                                    # training checkpoints

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
ZERO_STAGE=${ZERO_STAGE:-2}                             # 27.3 GiB of model states per device on 8
TP=${TP:-1}                                             # tensor-parallel size
MICRO_BATCH=${MICRO_BATCH:-2}                           # samples per device and pass
GLOBAL_BATCH=${GLOBAL_BATCH:-256}                       # samples per step: 0.5 M tokens
SEQ_LENGTH=${SEQ_LENGTH:-2048}                          # tokens per sample
TRAIN_ITERS=${TRAIN_ITERS:-500000}
LR=${LR:-1.5e-4}                                        # the published parity run: LR=1e-6 MIN_LR=1e-6 GLOBAL_BATCH=64 TRAIN_ITERS=5000
MIN_LR=${MIN_LR:-1.0e-5}
LR_DECAY_ITERS=${LR_DECAY_ITERS:-320000}
SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}                            # global batches per evaluation

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # DATA and the dtype flag are words
launch pretrain_intern.py \
    --deepspeed \
    --zero-stage "$ZERO_STAGE" \
    --no-pipeline-parallel \
    --model "$MODEL" \
    --tensor-model-parallel-size "$TP" \
    --micro-batch-size "$MICRO_BATCH" \
    --global-batch-size "$GLOBAL_BATCH" \
    --seq-length "$SEQ_LENGTH" \
    --train-iters "$TRAIN_ITERS" \
    --data-path $DATA \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --split 949,50,1 \
    ${CHECKPOINT:+--load "$CHECKPOINT"} \
    --save "$SAVE" \
    --save-interval "$SAVE_INTERVAL" \
    --lr "$LR" \
    --min-lr "$MIN_LR" \
    --lr-decay-style cosine \
    --lr-decay-iters "$LR_DECAY_ITERS" \
    --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --eval-interval "$EVAL_INTERVAL" \
    --eval-iters "$EVAL_ITERS" \
    --log-interval 1 \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    --distributed-backend nccl \
    $dtype \
    "$@"
