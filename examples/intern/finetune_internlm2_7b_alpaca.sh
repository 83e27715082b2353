#!/usr/bin/env bash
# Fine-tunes all parameters of InternLM2-7B on Alpaca, on 8 devices: the values of MindFormers' finetune_internlm2_7b.yaml. The data, once:
#
#   python tools/preprocess_data.py --input dataset/alpaca_data.json --output-prefix ./dataset/alpaca --tokenizer-name-or-path ./dataset/internlm2 \
#       --handler-name AlpacaStyleInstructionHandler --chat-template v2 --seq-length 2048
#   bash examples/intern/finetune_internlm2_7b_alpaca.sh
#
# Every value can be given in the environment, more flags at the end. Several nodes: HOSTFILE=..., or NNODES, NODE_RANK, MASTER_ADDR,
# NPROC on each (launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-internlm2-7b}                            # any by name (internlm2.5-7b, internlm2-20b, internlm3-8b ...)
TOKENIZER_PATH=${TOKENIZER_PATH:-./dataset/internlm2}   # directory with tokenizer.model
DATA=${DATA:-./dataset/alpaca}                          # prefix given to preprocess_data.py; or weights and prefixes: "0.3 a 0.7 b"
VALID=${VALID:-}                                        # validation data, named in the same way; empty: none
CHECKPOINT=${CHECKPOINT:-./model_from_hf/internlm2-7b}  # a Hugging Face directory, converted weights, or a training checkpoint's weights
SAVE=${SAVE:-./ckpt_internlm2_7b_alpaca}                # training checkpoints

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
ZERO_STAGE=${ZERO_STAGE:-2}                             # README: "Will it fit my cards?"
TP=${TP:-1}                                             # tensor-parallel size
PACKING=${PACKING:-none}                                # none: a conversation per row, padded, as MindFormers has it;
                                                        # first-fit: rows full of conversations that do not see each other, far fewer steps
MICRO_BATCH=${MICRO_BATCH:-2}                           # rows per device and pass (batch_size)
GLOBAL_BATCH=${GLOBAL_BATCH:-16}                        # rows per step: batch_size 2 x data_parallel 8
SEQ_LENGTH=${SEQ_LENGTH:-2048}                          # tokens per row
EPOCHS=${EPOCHS-2}                                      # passes over the data; or EPOCHS= TRAIN_ITERS=1000
LR=${LR:-2e-5}                                          # cosine, down to MIN_LR
MIN_LR=${MIN_LR:-0}
WARMUP=${WARMUP:-0.025}                                 # of all iterations
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
EVAL_INTERVAL=${EVAL_INTERVAL:-100}                     # iterations between evaluations on VALID

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # DATA, VALID and the dtype flag are words
launch pretrain_intern.py \
    --deepspeed \
    --zero-stage "$ZERO_STAGE" \
    --no-pipeline-parallel \
    --model "$MODEL" \
    --tensor-model-parallel-size "$TP" \
    --micro-batch-size "$MICRO_BATCH" \
    --global-batch-size "$GLOBAL_BATCH" \
    --seq-length "$SEQ_LENGTH" \
    ${EPOCHS:+--train-epochs "$EPOCHS"} \
    ${TRAIN_ITERS:+--train-iters "$TRAIN_ITERS"} \
    --data-path $DATA \
    --packing "$PACKING" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --split 100,0,0 \
    ${VALID:+--valid-data-path $VALID --eval-interval "$EVAL_INTERVAL"} \
    --load "$CHECKPOINT" \
    --finetune \
    --save "$SAVE" \
    --save-interval "$SAVE_INTERVAL" \
    --keep 1 \
    --lr "$LR" \
    --min-lr "$MIN_LR" \
    --lr-decay-style cosine \
    --lr-warmup-fraction "$WARMUP" \
    --weight-decay 0.01 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --adam-eps 1e-8 \
    --seed 0 \
    --log-interval 1 \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    --distributed-backend nccl \
    $dtype \
    "$@"
