#!/usr/bin/env bash
# Times a model's answers, in the words of MindIE's run.sh: lengths as [[input,output],...]
#
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance [[2048,2048],[1024,1024],[512,512],[256,256]] BATCH
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance_maxbs [[256,256],[512,512]] [[1,2048],[1,2048]] LIMIT_MS
#
# performance_maxbs finds, for each pair of lengths, the largest batch in its range whose further tokens take at most LIMIT_MS each.
# MindIE's further words are understood: ... internlm DIR DEVICES. From the environment: CHECKPOINT, DTYPE, TP, PP, OUT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/launch.sh"

usage() { echo "error: usage: benchmark.sh performance LENGTHS BATCH | performance_maxbs LENGTHS RANGES LIMIT_MS [internlm DIR DEVICES]" >&2; exit 2; }
case ${1:-} in
    performance)
        [ $# -ge 3 ] || usage
        what=(--performance "$2" --batch-size "$3")
        shift 3
        ;;
    performance_maxbs)
        [ $# -ge 4 ] || usage
        what=(--performance-maxbs "$2" --ranges "$3" --limit-ms "$4")
        shift 4
        ;;
    *) usage ;;
esac
if [ "${1:-}" = internlm ]; then
    [ $# -ge 3 ] || usage
    CHECKPOINT=$2
    TP=$3
    shift 3
fi
: "${CHECKPOINT:?CHECKPOINT=folder of the weights}"
DTYPE=${DTYPE:-bf16}                    # bf16, fp16 or fp32
TP=${TP:-1}                             # tensor-parallel size
PP=${PP:-1}                             # pipeline stages
OUT=${OUT:-performance}                 # folder for the table, as text, CSV and a plot
[ -n "${HOSTFILE:-}${NNODES:-}" ] || export NPROC=${NPROC:-$((TP * PP))}

dtype=$(dtype_flag "$DTYPE")
# shellcheck disable=SC2086  # the dtype flag is a word, or none
launch_quietly tasks/inference/benchmark.py \
    --load "$CHECKPOINT" \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --output-dir "$OUT" \
    "${what[@]}" \
    $dtype \
    "$@"
