#!/usr/bin/env bash
# Pre-trains all parameters of InternLM-7B on one device of 141 GB (H200), by Megatron-core's engine. Every value can be given in the
# environment, more flags at the end:
#
#   CHECKPOINT= SAVE=ckpt_scratch bash examples/intern/pretrain_internlm_7b_1gpu.sh --train-iters 5000
#
# In bf16: 122.7 GiB of model states and 11.7 GiB of activations and logits, 134.4 GiB in all by a simulation; not run on a GPU yet. The
# recipe with ZeRO-2 and MICRO_BATCH=2 would need 148 GiB there. With less memory: --recompute-granularity full (124.5 GiB).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

export NPROC=${NPROC:-1}
optional --model MODEL internlm-7b                                     # any name that agrees with the weights; empty: that of the weights
value --tensor-model-parallel-size TP 1
value --micro-batch-size MICRO_BATCH 1                                  # samples per pass; 2 need 145 GiB
value --global-batch-size GLOBAL_BATCH 256                              # samples per step: 0.5 M tokens, 256 passes
value --seq-length SEQ_LENGTH 2048                                      # tokens per sample
value --train-iters TRAIN_ITERS 500000

words --data-path DATA ./dataset/alpaca_text_document                   # prefix of .bin/.idx; or weights and prefixes: "0.3 a 0.7 b"
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm        # directory with tokenizer.model
fixed --split 949,50,1
optional --load CHECKPOINT ./model_weights                              # weights or a training checkpoint; empty: random weights
value --save SAVE ./ckpt                                                # training checkpoints of 82 GiB
value --save-interval SAVE_INTERVAL 1000

value --lr LR 1.5e-4
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
