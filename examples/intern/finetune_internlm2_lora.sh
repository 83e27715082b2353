#!/usr/bin/env bash
# Fine-tunes InternLM2-7B by LoRA: the weights stay as they are, small adapters beside them learn. The data as for
# finetune_internlm2_7b_alpaca.sh. At the end SAVE/adapter is a directory for peft; into the weights, for everything else:
#
#   bash examples/intern/finetune_internlm2_lora.sh
#   python tools/lora/merge_lora.py --base ./model_from_hf/internlm2-7b --adapter ./ckpt_internlm2_lora/adapter --save ./internlm2-7b-alpaca
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
SAVE=${SAVE:-./ckpt_internlm2_lora}                     # training checkpoints, of the adapters alone

LORA_RANK=${LORA_RANK:-16}                              # inner width of an adapter
LORA_ALPHA=${LORA_ALPHA:-16}                            # what an adapter adds is multiplied by LORA_ALPHA / LORA_RANK
LORA_DROPOUT=${LORA_DROPOUT:-0.05}
LORA_TARGETS=${LORA_TARGETS:-all-linear}                # or names: "wqkv wo"; "q_proj v_proj" of the model as a Llama

DTYPE=${DTYPE:-bf16}                                    # bf16, fp16 or fp32
ZERO_STAGE=${ZERO_STAGE:-2}                             # README: "Will it fit my cards?"
TP=${TP:-1}                                             # tensor-parallel size
PACKING=${PACKING:-first-fit}                           # rows full of conversations that do not see each other; none: one per row
MICRO_BATCH=${MICRO_BATCH:-1}                           # rows per device and pass
GLOBAL_BATCH=${GLOBAL_BATCH:-8}                         # rows per step
SEQ_LENGTH=${SEQ_LENGTH:-2048}                          # tokens per row
EPOCHS=${EPOCHS-3}                                      # passes over the data; or EPOCHS= TRAIN_ITERS=1000
LR=${LR:-2e-4}                                          # ten times that of full fine-tuning; cosine, down to MIN_LR
MIN_LR=${MIN_LR:-0}
WARMUP=${WARMUP:-0.03}                                  # of all iterations
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
EVAL_INTERVAL=${EVAL_INTERVAL:-100}                     # iterations between evaluations on VALID

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # DATA, VALID, LORA_TARGETS and the dtype flag are words
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
    --lora-rank "$LORA_RANK" \
    --lora-alpha "$LORA_ALPHA" \
    --lora-dropout "$LORA_DROPOUT" \
    --lora-target-modules $LORA_TARGETS \
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
    --seed 0 \
    --log-interval 1 \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --mlp-layer-fusion \
    --distributed-backend nccl \
    $dtype \
    "$@"
