#!/usr/bin/env bash
# Fine-tunes InternLM2-7B by LoRA: the weights stay as they are, and small adapters beside them are trained. The data are those of
# finetune_internlm2_7b_alpaca.sh. At the end SAVE/adapter is a directory for peft; merge it into the weights for everything else:
#
#   bash examples/intern/finetune_internlm2_lora.sh
#   python tools/lora/merge_lora.py --base ./model_from_hf/internlm2-7b --adapter ./ckpt_internlm2_lora/adapter --save ./internlm2-7b-alpaca
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
value --global-batch-size GLOBAL_BATCH 8                                # rows per step
value --seq-length SEQ_LENGTH 2048                                      # tokens per row
optional --train-epochs EPOCHS 3                                        # passes over the data; empty: TRAIN_ITERS
optional --train-iters TRAIN_ITERS ""                                   # iterations instead of EPOCHS

words --data-path DATA ./dataset/alpaca                                 # prefix of preprocess_data.py; or weights and prefixes: "0.3 a 0.7 b"
value --packing PACKING first-fit                                       # packed conversations that do not attend to each other; none: one per row
value --lora-rank LORA_RANK 16                                          # inner width of an adapter
value --lora-alpha LORA_ALPHA 16                                        # the output of an adapter is multiplied by LORA_ALPHA / LORA_RANK
value --lora-dropout LORA_DROPOUT 0.05
words --lora-target-modules LORA_TARGETS all-linear                     # or names: "wqkv wo"; "q_proj v_proj" of the model as a Llama
value --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm2       # directory with tokenizer.model
fixed --split 100,0,0
words --valid-data-path VALID ""                                        # validation data, named as DATA; empty: none
[ -z "$VALID" ] || value --eval-interval EVAL_INTERVAL 100              # iterations between evaluations on VALID
value --load CHECKPOINT ./model_from_hf/internlm2-7b                    # Hugging Face directory, converted weights, or a training checkpoint
fixed --finetune
value --save SAVE ./ckpt_internlm2_lora                                 # training checkpoints, of the adapters alone
value --save-interval SAVE_INTERVAL 500
fixed --keep 1

value --lr LR 2e-4                                                      # ten times that of full fine-tuning; cosine, down to MIN_LR
value --min-lr MIN_LR 0
fixed --lr-decay-style cosine
value --lr-warmup-fraction WARMUP 0.03                                  # of all iterations
fixed --weight-decay 0 --clip-grad 1.0
fixed --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8
fixed --seed 0 --log-interval 1
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

train "$@"
