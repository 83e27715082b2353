#!/usr/bin/env bash
# Evaluates a model on benchmark files on disk. Every value can be given in the environment, more flags at the end:
#
#   TASK="mmlu ceval boolq" DATA_PATH="data/mmlu data/ceval data/boolq" CHECKPOINT=model_from_hf/internlm-7b TOKENIZER_PATH= \
#       bash tasks/evaluation/eval_internlm.sh --prompt-style opencompass
#
# The defaults ask the few questions in sample_mmlu. docs/evaluation.md lists the files of each benchmark, and the settings of
# published figures.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
source "$folder/../../examples/intern/launch.sh"

words --task TASK mmlu                                                  # of mmlu ceval cmmlu boolq gsm8k hellaswag
words --task-data-path DATA_PATH "$folder/sample_mmlu"                  # a folder for each, in the same order
value --output-dir OUTPUT ./evaluation                                  # results; an evaluation that was stopped continues from here
optional --model MODEL ""                                               # a name (internlm-7b, internlm2-7b ...) to check the weights against
value --load CHECKPOINT ./model_weights                                 # Hugging Face directory, converted weights, or a training checkpoint
optional --tokenizer-name-or-path TOKENIZER_PATH ./dataset/internlm     # directory with tokenizer.model; empty: the one beside the weights
value --tensor-model-parallel-size TP 1
value --pipeline-model-parallel-size PP 1                               # NPROC, the processes on this node, is TP x PP by default
value --batch-size BATCH 16                                             # rows side by side; other sizes round differently
fixed --distributed-backend nccl                                        # the device's own: hccl, or gloo on a CPU
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

answer tasks/evaluation/evaluation.py "$@"
