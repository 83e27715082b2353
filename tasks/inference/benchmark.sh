#!/usr/bin/env bash
# Times a model's answers, with the arguments of MindIE's run.sh: lengths as [[input,output],...]
#
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance [[2048,2048],[1024,1024],[512,512],[256,256]] BATCH
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance_maxbs [[256,256],[512,512]] [[1,2048],[1,2048]] LIMIT_MS
#   bash tasks/inference/benchmark.sh pa_fp16 performance [[256,256]] 1 internlm DIR DEVICES
#   bash tasks/inference/benchmark.sh pa_fp16 full_BoolQ 1 internlm DIR DEVICES
#
# performance_maxbs finds, for each pair of lengths, the largest batch in its range whose decoding steps take at most LIMIT_MS each.
# MindIE's words are accepted: the number format before (pa_fp16 pa_bf16 fa_fp16 fa_bf16), `internlm DIR DEVICES` after. Its accuracy
# tests full_BoolQ, full_CEval SHOTS, full_MMLU SHOTS, full_CMMLU SHOTS and full_GSM8K start the evaluation of docs/evaluation.md with
# the files in DATA_PATH (data/boolq, data/ceval ...). From the environment: CHECKPOINT, DTYPE, TP, PP, OUT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/launch.sh"

usage() {
    fail "usage: benchmark.sh [pa_fp16|pa_bf16] performance LENGTHS BATCH | performance_maxbs LENGTHS RANGES LIMIT_MS |" \
        "full_BoolQ BATCH | full_GSM8K BATCH | full_CEval SHOTS BATCH | full_MMLU SHOTS BATCH | full_CMMLU SHOTS BATCH [internlm DIR DEVICES]"
}

model_words() {  # model_words [internlm DIR DEVICES]: sets CHECKPOINT and TP; MODEL_WORDS is the number of words that were used
    MODEL_WORDS=0
    case ${1:-} in
        internlm*)
            [[ ${2:-} =~ ^(True|False|true|false)$ ]] && { set -- "$1" "${@:3}"; MODEL_WORDS=1; }     # MindIE's use_refactor
            [ $# -ge 3 ] || usage
            CHECKPOINT=$2 TP=$3 MODEL_WORDS=$((MODEL_WORDS + 3))
            ;;
    esac
    [ -n "${CHECKPOINT:-}" ] || fail "CHECKPOINT is not set: the folder of the weights"
}

evaluate() {  # evaluate TASK SHOTS BATCH [internlm DIR DEVICES] [FLAGS...]: starts the evaluation, or names its command
    local task=$1 shots=$2 batch=$3
    shift 3
    model_words "$@"
    shift "$MODEL_WORDS"
    export TASK=$task DATA_PATH=${DATA_PATH:-data/$task} BATCH=$batch CHECKPOINT TP=${TP:-1} TOKENIZER_PATH=${TOKENIZER_PATH:-} DTYPE=${DTYPE:-bf16}
    [ -d "$DATA_PATH" ] || fail "DATA_PATH=$DATA_PATH: no such folder with the files of $task (docs/evaluation.md); with them, type:" \
        "TASK=$task DATA_PATH=FOLDER BATCH=$batch CHECKPOINT=$CHECKPOINT TP=$TP DTYPE=$DTYPE TOKENIZER_PATH=$TOKENIZER_PATH" \
        "bash tasks/evaluation/eval_internlm.sh${shots:+ --num-fewshot $shots}"
    exec bash "$(dirname "${BASH_SOURCE[0]}")/../evaluation/eval_internlm.sh" ${shots:+--num-fewshot "$shots"} "$@"
}

case ${1:-} in
    [pf]a_fp16 | [pf]a_bf16)
        DTYPE=${DTYPE:-${1#?a_}}                                            # pa_fp16: fp16, unless the environment names another
        shift
        ;;
    [pf]a_*) fail "$1 is not available: weights are pa_fp16 or pa_bf16, not quantised" ;;
esac
case ${1:-} in
    performance)
        [ $# -ge 3 ] || usage
        measurement=(--performance "$2" --batch-size "$3")
        shift 3
        ;;
    performance_maxbs)
        [ $# -ge 4 ] || usage
        measurement=(--performance-maxbs "$2" --ranges "$3" --limit-ms "$4")
        shift 4
        ;;
    full_BoolQ | full_GSM8K)
        [ $# -ge 2 ] || usage
        task=${1#full_}
        evaluate "${task,,}" "" "${@:2}"
        ;;
    full_CEval | full_MMLU | full_CMMLU)
        [ $# -ge 3 ] || usage
        task=${1#full_}
        evaluate "${task,,}" "${@:2}"
        ;;
    full_*) fail "$1 is not available; the evaluation has mmlu ceval cmmlu boolq gsm8k hellaswag: bash tasks/evaluation/eval_internlm.sh" ;;
    *) usage ;;
esac
model_words "$@"
shift "$MODEL_WORDS"

fixed --load "$CHECKPOINT"
value --tensor-model-parallel-size TP 1
value --pipeline-model-parallel-size PP 1                               # NPROC, the processes on this node, is TP x PP by default
value --output-dir OUT performance                                      # folder for the table, as text, CSV and a plot
fixed "${measurement[@]}"
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

answer tasks/inference/benchmark.py "$@"
