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

SAVE=${SAVE:-./ckpt}                                                    # training checkpoints of 743 GiB; on storage that all nodes share

value --model MODEL internlm-65b                                        # any name
value --tensor-model-parallel-size TP 8                                 # the devices of one node
value --pipeline-model-parallel-size PP 4                               # the nodes; 20 layers each
fixed --sequence-parallel
value --micro-batch-size MICRO_BATCH 2                                  # samples per pass
value --global-batch-size GLOBAL_BATCH 128                              # samples per step: 0.26 M tokens, 64 passes; 256 in a later version
value --seq-length SEQ_LENGTH 2048                                      # tokens per sample
value --train-iters TRAIN_ITERS 50000

words --data-path DATA ./dataset/alpaca_text_document                   # prefix of .bin/.idx; or weights and prefixes: "0.3 a 0.7 b"
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm        # directory with tokenizer.model: that of InternLM-7B
fixed --split 949,50,1
optional --load CHECKPOINT "$SAVE"                                      # random weights while it is empty (65B was never public)
fixed --save "$SAVE"
value --save-interval SAVE_INTERVAL 1000                                # 7 hours at the published 24 s; --keep 3 keeps the newest three

fixed --optimizer adam
value --lr LR 1e-4
value --min-lr MIN_LR 1e-5
fixed --lr-decay-style cosine
value --lr-decay-iters LR_DECAY_ITERS 50000
fixed --lr-warmup-fraction 0.01 --weight-decay 1e-2 --clip-grad 1.0
fixed --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
fixed --initial-loss-scale 524288                                       # of fp16: 2^19
optional --auto-recompute-device-size DEVICE_MEMORY 55296               # MiB; recomputes as few layers as fit; empty: none

value --eval-interval EVAL_INTERVAL 1000
value --eval-iters EVAL_ITERS 10                                        # global batches per evaluation
fixed --log-interval 1
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

train "$@"
