#!/usr/bin/env bash
# Compares the loss of two runs: a reference, and a candidate on another device, layout or engine. Seed, weights and data must
# be the same (their hashes are compared). Writes parity.json, parity.png and parity.html; exit code 0 means parity.
#
#   bash examples/intern/loss_parity.sh        demonstration with a tiny model on the CPU: ZeRO-2 against TP 2 x PP 2
#   CAND="--deepspeed --zero-stage 3" CAND_NPROC=2 PROFILE=strict bash examples/intern/loss_parity.sh
#
# On a cluster, a GPU against an NPU, as on the published page; the two halves share only the files that are named:
#
#   export DATA=./dataset/alpaca_text_document CHECKPOINT=./model_weights TOKENIZER_PATH=./dataset/internlm MODEL=internlm-7b
#   export DTYPE=bf16 SEQ_LENGTH=2048 MICRO_BATCH=2 GLOBAL_BATCH=64 TRAIN_ITERS=5000 LR=1e-6 MIN_LR=1e-6
#   SIDE=ref REF_NPROC=8 bash examples/intern/loss_parity.sh                                            on the GPU machine
#   SIDE=cand CAND="--deepspeed --zero-stage 2" CAND_NPROC=8 bash examples/intern/loss_parity.sh        on the NPU machine
#   SIDE=compare bash examples/intern/loss_parity.sh                          where both $WORK/ref and $WORK/cand are
#
# SIDE=ref2 runs the reference once more: the distance of two equal runs is then drawn as a band.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/intern/launch.sh

SIDE=${SIDE:-both}                                      # ref, cand, ref2, compare, or both: ref, cand, compare
WORK=${WORK:-.parity}                                   # folder of the runs and of the report
PROFILE=${PROFILE:-published}                           # published: mean below 2 %; strict: every step; bitwise
REF=${REF:---deepspeed --zero-stage 2}                  # flags of the reference: any of pretrain_intern.py
CAND=${CAND:---tensor-model-parallel-size 2 --pipeline-model-parallel-size 2}
rm -f "$WORK"/parity.{json,png,html}                    # an older verdict is not about these runs

value --model MODEL internlm-tiny

if [ -z "${DATA:-}" ]; then  # a demonstration: real text, a tiny model with random weights
    source tools/setup.sh
    REF_NPROC=${REF_NPROC:-2}
    CAND_NPROC=${CAND_NPROC:-4}
    mkdir -p "$WORK"
    python examples/intern/make_quickstart_data.py --output-dir "$WORK/data" --rows 400 --vocab-size 1024
    TOKENIZER_PATH=$WORK/data/tokenizer
    DATA=$WORK/alpaca_text_document
    [ -f "$DATA.idx" ] || python tools/preprocess_data.py --input "$WORK/data/train.parquet" --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --output-prefix "$WORK/alpaca" --workers 2 --handler-name AlpacaPretrainHandler --append-eod
    CHECKPOINT=$WORK/weights
    [ -d "$CHECKPOINT" ] || python tools/random_model.py --model "$MODEL" --tokenizer "$TOKENIZER_PATH" --output-dir "$CHECKPOINT"
fi
[ -n "${CHECKPOINT+set}" ] || fail "CHECKPOINT is not set: the folder of the weights; empty: random weights, equal only on devices of one kind"
[ -n "${TOKENIZER_PATH+set}" ] || fail "TOKENIZER_PATH is not set: the folder of tokenizer.model"

words --data-path DATA ""
fixed --tokenizer-name-or-path "$TOKENIZER_PATH"
optional --load CHECKPOINT ""
value --seed SEED 1234
value --micro-batch-size MICRO_BATCH 2
value --global-batch-size GLOBAL_BATCH 8
value --seq-length SEQ_LENGTH 128
value --train-iters TRAIN_ITERS 20
fixed --split 949,50,1
value --lr LR 1e-3
value --min-lr MIN_LR 1e-4
fixed --lr-decay-style cosine --lr-warmup-fraction .01
fixed --weight-decay 1e-2 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
fixed --log-interval 1
DTYPE=${DTYPE:-fp32}                                                    # fp32 shows that it is the same function; bf16 what a real run will see
dtype=$(dtype_flag "$DTYPE")

side() {  # side NAME NPROC FLAGS...: one run, and the hashes of its seed, weights and data
    local name=$1 processes=$2
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    rm -f "$WORK/$name"/{train.log,origin.json}
    # shellcheck disable=SC2086  # the dtype flag is a word, or none
    (NPROC=$processes && export NPROC && launch pretrain_intern.py "${flags[@]}" --log-dir "$WORK/$name" $dtype "$@")
    PYTHONWARNINGS=ignore python examples/intern/parity_origin.py "$WORK/$name/train.log"
}

compare() {
    local ref2=$WORK/ref2
    [ -f "$ref2/train.log" ] || ref2=
    printf '\n== compare\n'
    python tools/compare_loss.py "$WORK/ref" "$WORK/cand" --out "$WORK" --profile "$PROFILE" --same-origin \
        ${ref2:+--ref2 "$ref2"}
}

# shellcheck disable=SC2086  # REF and CAND are flags
case $SIDE in
    ref) side ref "${REF_NPROC:-}" $REF ;;
    ref2) side ref2 "${REF_NPROC:-}" $REF ;;
    cand) side cand "${CAND_NPROC:-}" $CAND ;;
    compare) compare ;;
    both)
        rm -f "$WORK"/ref2/{train.log,origin.json}      # of an older reference
        side ref "${REF_NPROC:-}" $REF
        side cand "${CAND_NPROC:-}" $CAND
        compare
        ;;
    *) fail "SIDE=$SIDE is not one of ref, cand, ref2, compare, both" ;;
esac
