#!/usr/bin/env bash
# Times a model's answers, with the arguments of MindIE's run.sh: lengths as [[input,output],...]
#
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance [[2048,2048],[1024,1024],[512,512],[256,256]] BATCH
#   CHECKPOINT=DIR bash tasks/inference/benchmark.sh performance_maxbs [[256,256],[512,512]] [[1,2048],[1,2048]] LIMIT_MS
#
# performance_maxbs finds, for each pair of lengths, the largest batch in its range whose decoding steps take at most LIMIT_MS each.
# MindIE's last arguments are accepted: ... internlm DIR DEVICES. From the environment: CHECKPOINT, DTYPE, TP, PP, OUT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/intern/launch.sh"

usage() { fail "usage: benchmark.sh performance LENGTHS BATCH | performance_maxbs LENGTHS RANGES LIMIT_MS [internlm DIR DEVICES]"; }
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
    *) usage ;;
esac
if [ "${1:-}" = internlm ]; then
    [ $# -ge 3 ] || usage
    CHECKPOINT=$2
    TP=$3
    shift 3
fi
[ -n "${CHECKPOINT:-}" ] || fail "CHECKPOINT is not set: the folder of the weights"

fixed --load "$CHECKPOINT"
value --tensor-model-parallel-size TP 1
value --pipeline-model-parallel-size PP 1                               # NPROC, the processes on this node, is TP x PP by default
value --output-dir OUT performance                                      # folder for the table, as text, CSV and a plot
fixed "${measurement[@]}"
DTYPE=${DTYPE:-bf16}                                                    # bf16, fp16 or fp32

answer tasks/inference/benchmark.py "$@"
