#!/usr/bin/env bash
# Pre-trains InternLM-65B on 32 devices with tensor (8), sequence and pipeline parallel (4), by Megatron-core's engine.
# Every value can be given in the environment, more flags at the end:
#
#   HOSTFILE=hosts bash examples/intern/pretrain_internlm_65b_ptd_32p.sh                                      4 nodes, by ssh
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash examples/intern/pretrain_internlm_65b_ptd_32p.sh      once on each of them
#   sbatch examples/intern/pretrain_internlm_65b.sbatch                                                       by Slurm
#
# Per device, in bf16: 35.7 GiB of model states; at most 0.6 GiB of layer inputs, as all layers are recomputed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-internlm-65b}                            # any by name
TOKENIZER_PATH=${TOKENIZER_PATH:-./dataset/internlm}    # directory with tokenizer.model: that of InternLM-7B
DATA=${DATA:-./dataset/alpaca_text_document}            # prefix of the .bin/.idx pair; or weights and prefixes: "0.3 a 0.7 b"
SAVE=${SAVE:-./ckpt}                                    # training checkpoints of 743 GiB; on storage that all nodes share
CHECKPOINT=${CHECKPOINT-$SAVE}                          # the same: random weights while it is empty (65B was never public)

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
TP=${TP:-8}                                             # tensor-parallel size: the devices of one node
PP=${PP:-4}                                             # pipeline stages: the nodes; 20 layers each
MICRO_BATCH=${MICRO_BATCH:-2}                           # samples per pass
GLOBAL_BATCH=${GLOBAL_BATCH:-128}                       # samples per step: 0.26 M tokens in 64 passes; 256 in a later version
SEQ_LENGTH=${SEQ_LENGTH:-2048}                          # tokens per sample
TRAIN_ITERS=${TRAIN_ITERS:-50000}
LR=${LR:-1e-4}
MIN_LR=${MIN_LR:-1e-5}
LR_DECAY_ITERS=${LR_DECAY_ITERS:-50000}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}                    # 7 hours at the published 24 s; --keep 3 at the end keeps the newest three
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}                            # global batches per evaluation
DEVICE_MEMORY=${DEVICE_MEMORY-55296}                    # MiB; all layers are recomputed, until there is a planner; empty: none

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # DATA and the dtype flag are words
launch pretrain_intern.py \
    --model "$MODEL" \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --sequence-parallel \
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
    --optimizer adam \
    --lr "$LR" \
    --min-lr "$MIN_LR" \
    --lr-decay-style cosine \
    --lr-decay-iters "$LR_DECAY_ITERS" \
    --lr-warmup-fraction 0.01 \
    --weight-decay 1e-2 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --adam-eps 1e-8 \
    --initial-loss-scale 524288 \
    ${DEVICE_MEMORY:+--auto-recompute-device-size "$DEVICE_MEMORY"} \
    --eval-interval "$EVAL_INTERVAL" \
    --eval-iters "$EVAL_ITERS" \
    --log-interval 1 \
    --use-flash-attn \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    --distributed-backend nccl \
    $dtype \
    "$@"
