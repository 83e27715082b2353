#!/usr/bin/env bash
# Fine-tunes all parameters of InternLM-7B on Alpaca, on 8 devices, with packed rows. The data, once:
#
#   python tools/preprocess_data.py --input dataset/alpaca_data.json --output-prefix ./dataset/alpaca --tokenizer-name-or-path ./dataset/internlm \
#       --handler-name AlpacaStyleInstructionHandler --chat-template v1 --seq-length 2048
#   bash examples/intern/finetune_internlm_7b_alpaca.sh
#
# InternEvo's tokenized data instead: DATA=FOLDER of .bin and .bin.meta, PACKING=internevo-cut. Every value can be given in the
# environment, more flags at the end. Several nodes: HOSTFILE=..., or NNODES, NODE_RANK, MASTER_ADDR, NPROC on each (launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=${MODEL:-internlm-7b}                             # any by name (internlm-20b, internlm2-1.8b ...)
TOKENIZER_PATH=${TOKENIZER_PATH:-./dataset/internlm}    # directory with tokenizer.model
DATA=${DATA:-./dataset/alpaca}                          # prefix given to preprocess_data.py; or weights and prefixes: "0.3 a 0.7 b"
VALID=${VALID:-}                                        # validation data, named in the same way; empty: none
CHECKPOINT=${CHECKPOINT:-./model_from_hf/internlm-7b}   # a Hugging Face directory, converted weights, or a training checkpoint's weights
SAVE=${SAVE:-./ckpt_internlm_7b_alpaca}                 # training checkpoints

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
ZERO_STAGE=${ZERO_STAGE:-2}                             # README: "Will it fit my cards?"
TP=${TP:-1}                                             # tensor-parallel size
PACKING=${PACKING:-first-fit}                           # rows full of conversations that do not see each other; none: one per row
MICRO_BATCH=${MICRO_BATCH:-1}                           # rows per device and pass
GLOBAL_BATCH=${GLOBAL_BATCH:-8}                         # rows per step
SEQ_LENGTH=${SEQ_LENGTH:-2048}                          # tokens per row
EPOCHS=${EPOCHS-3}                                      # these, LR, WARMUP and no weight decay are those of Stanford's Alpaca,
LR=${LR:-2e-5}                                          # whose step had 128 conversations; cosine, down to MIN_LR
MIN_LR=${MIN_LR:-0}
WARMUP=${WARMUP:-0.03}                                  # of all iterations
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
    --weight-decay 0 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --adam-eps 1e-8 \
    --seed 42 \
    --log-interval 1 \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    --distributed-backend nccl \
    $dtype \
    "$@"
