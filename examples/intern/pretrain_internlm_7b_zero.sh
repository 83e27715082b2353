#!/usr/bin/env bash
# Pre-trains InternLM-7B with DeepSpeed ZeRO-2 on 8 devices. Every value can be given in the environment, more flags at the end:
#
#   DATA=./dataset/alpaca_text_document CHECKPOINT=./model_weights bash examples/intern/pretrain_internlm_7b_zero.sh --train-iters 5000
#
# Several nodes: HOSTFILE=..., or NNODES, NODE_RANK, MASTER_ADDR, NPROC on each (launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

fixed --deepspeed
value --zero-stage ZERO_STAGE 2                                         # 27.3 GiB of model states per device on 8
fixed --no-pipeline-parallel
optional --model MODEL internlm-7b                                     # any name (internlm3-8b ...) that agrees with the weights; empty: that of the weights
value --tensor-model-parallel-size TP 1
value --micro-batch-size MICRO_BATCH 2                                  # samples per device and pass
value --global-batch-size GLOBAL_BATCH 256                              # samples per step: 0.5 M tokens
value --seq-length SEQ_LENGTH 2048                                      # tokens per sample
value --train-iters TRAIN_ITERS 500000

words --data-path DATA ./dataset/alpaca_text_document                   # prefix of .bin/.idx; or weights and prefixes: "0.3 a 0.7 b"
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm        # directory with tokenizer.model
fixed --split 949,50,1
optional --load CHECKPOINT ./model_weights                              # weights or a training checkpoint; empty: random weights
value --save SAVE ./ckpt                                                # training checkpoints
value --save-interval SAVE_INTERVAL 10000

value --lr LR 1.5e-4                                                    # 1e-6 as MIN_LR, GLOBAL_BATCH=64, TRAIN_ITERS=5000 in the published parity run
value --min-lr MIN_LR 1.0e-5
fixed --lr-decay-style cosine
value --lr-decay-iters LR_DECAY_ITERS 320000
fixed --lr-warmup-fraction 0.01 --weight-decay 1e-2 --clip-grad 1.0
fixed --adam-beta1 0.9 --adam-beta2 0.95

value --eval-interval EVAL_INTERVAL 1000
value --eval-iters EVAL_ITERS 10                                        # global batches per evaluation
fixed --log-interval 1
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

train "$@"
