#!/usr/bin/env bash
# Trains InternLM2-7B on preference pairs by DPO, all parameters. The data are pairs of tools/preprocess_data.py (docs/preference.md). The
# log-probabilities of the weights in CHECKPOINT are computed before the first iteration and kept beside the data:
#
#   bash examples/intern/dpo_internlm2_7b.sh
#   LOSS=simpo BETA=2.5 bash examples/intern/dpo_internlm2_7b.sh --simpo-gamma 1.4
#   LR=5e-6 SAVE=./ckpt_dpo_lora bash examples/intern/dpo_internlm2_7b.sh --lora-rank 16
#
# Every value can be given in the environment, more flags at the end. Several nodes: HOSTFILE=..., or NNODES, NODE_RANK, MASTER_ADDR,
# NPROC on each (launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

fixed --deepspeed
value --zero-stage ZERO_STAGE 2                                         # docs/memory.md
fixed --no-pipeline-parallel
optional --model MODEL internlm2-7b                                    # any name (internlm2.5-7b, internlm2-20b, internlm3-8b ...); empty: that of the weights
value --tensor-model-parallel-size TP 1
value --micro-batch-size MICRO_BATCH 1                                  # rows per device and pass
value --global-batch-size GLOBAL_BATCH 64                               # rows per step
value --seq-length SEQ_LENGTH 4096                                      # tokens per row, which holds both conversations of a pair
optional --train-epochs EPOCHS 1                                        # passes over the data; empty: TRAIN_ITERS
optional --train-iters TRAIN_ITERS ""                                   # iterations instead of EPOCHS

fixed --stage dpo
value --loss LOSS dpo                                                   # dpo, ipo, orpo, simpo or kto
value --beta BETA 0.1                                                   # strength of the tie to the reference
words --data-path DATA ./dataset/preference                             # prefix of preprocess_data.py; or weights and prefixes: "0.3 a 0.7 b"
value --packing PACKING none                                            # one pair per row; first-fit: as many as fit
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm2       # directory with tokenizer.model
fixed --split 100,0,0
words --valid-data-path VALID ""                                        # validation data, named as DATA; empty: none
[ -z "$VALID" ] || value --eval-interval EVAL_INTERVAL 100              # iterations between evaluations on VALID
value --load CHECKPOINT ./model_from_hf/internlm2-7b                    # Hugging Face directory, converted weights, or a training checkpoint
fixed --finetune
value --save SAVE ./ckpt_dpo                                            # training checkpoints
value --save-interval SAVE_INTERVAL 500
fixed --keep 1

value --lr LR 5e-7                                                      # cosine, down to MIN_LR
value --min-lr MIN_LR 0
fixed --lr-decay-style cosine
value --lr-warmup-fraction WARMUP 0.1                                   # of all iterations
fixed --weight-decay 0 --clip-grad 1.0
fixed --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8
fixed --seed 0 --log-interval 1
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

train "$@"
