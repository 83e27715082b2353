#!/usr/bin/env bash
# Generates text with InternLM-7B, or another model that its weights name. Values come from the environment, flags at the end:
#
#   CHECKPOINT=./model_from_hf/internlm-7b bash examples/intern/generate_internlm_7b_deepspeed.sh --prompt "The capital of France is"
#   CHECKPOINT=./model_from_hf/internlm2-chat-7b bash examples/intern/generate_internlm_7b_deepspeed.sh --task chat
#   TP=8 CHECKPOINT=./ckpt_65b bash examples/intern/generate_internlm_7b_deepspeed.sh --input-file questions.jsonl --output-file answers.jsonl
#
# Without a prompt it shows the tasks on a few example texts. All flags: python tasks/inference/generate.py --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

value --load CHECKPOINT ./model_weights                                 # Hugging Face directory, converted weights, or a training checkpoint
optional --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm     # directory with tokenizer.model; empty: the one in CHECKPOINT
optional --model MODEL ""                                               # a name (internlm-7b ...) to check the weights against
value --tensor-model-parallel-size TP 1
value --pipeline-model-parallel-size PP 1                               # NPROC, the processes on this node, is TP x PP by default
fixed --distributed-backend nccl                                        # the device's own: hccl, or gloo on a CPU
fixed --use-fused-rmsnorm --use-fused-rotary-pos-emb --mlp-layer-fusion
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

answer tasks/inference/generate.py "$@"
