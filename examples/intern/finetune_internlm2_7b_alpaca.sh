#!/usr/bin/env bash
# Fine-tunes all parameters of InternLM2-7B on Alpaca, on 8 devices: the values of MindFormers' finetune_internlm2_7b.yaml.
# Prepare the data once:
#
#   python tools/preprocess_data.py --input dataset/alpaca_data.json --output-prefix ./dataset/alpaca --tokenizer-name-or-path ./dataset/internlm2 \
#       --handler-name AlpacaStyleInstructionHandler --chat-template v2 --seq-length 2048
#   bash examples/intern/finetune_internlm2_7b_alpaca.sh
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
value --micro-batch-size MICRO_BATCH 2                                  # rows per device and pass (batch_size)
value --global-batch-size GLOBAL_BATCH 16                               # rows per step: batch_size 2 x data_parallel 8
value --seq-length SEQ_LENGTH 2048                                      # tokens per row
optional --train-epochs EPOCHS 2                                        # passes over the data; empty: TRAIN_ITERS
optional --train-iters TRAIN_ITERS ""                                   # iterations instead of EPOCHS

words --data-path DATA ./dataset/alpaca                                 # prefix of preprocess_data.py; or weights and prefixes: "0.3 a 0.7 b"
value --packing PACKING none                                            # a padded conversation per row, as MindFormers; first-fit: packed, far fewer steps
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm2       # directory with tokenizer.model
fixed --split 100,0,0
words --valid-data-path VALID ""                                        # validation data, named as DATA; empty: none
[ -z "$VALID" ] || value --eval-interval EVAL_INTERVAL 100              # iterations between evaluations on VALID
value --load CHECKPOINT ./model_from_hf/internlm2-7b                    # Hugging Face directory, converted weights, or a training checkpoint
fixed --finetune
value --save SAVE ./ckpt_internlm2_7b_alpaca                            # training checkpoints
value --save-interval SAVE_INTERVAL 500
fixed --keep 1

value --lr LR 2e-5                                                      # cosine, down to MIN_LR
value --min-lr MIN_LR 0
fixed --lr-decay-style cosine
value --lr-warmup-fraction WARMUP 0.025                                 # of all iterations
fixed --weight-decay 0.01 --clip-grad 1.0
fixed --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
fixed --seed 0 --log-interval 1
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

train "$@"
