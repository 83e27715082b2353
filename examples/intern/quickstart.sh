#!/usr/bin/env bash
# The whole chain on this machine, with a tiny InternLM, in minutes:
# text -> parquet -> tokens -> random model -> weights split for TP 2 -> ZeRO-2 training -> resumed -> exported -> checked by transformers
# -> a completion, a score -> fine-tuning on questions and answers -> a turn of a chat, before and after.
#
#   bash examples/intern/quickstart.sh          run again, it reuses what is there; delete ./.quickstart to start over
#   NPROC=2 WORK=/tmp/try bash examples/intern/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/setup.sh

WORK=${WORK:-.quickstart}
export NPROC=${NPROC:-4}                # processes: TP 2 x DP 2
STOP=${STOP:-60}                        # iterations before the interruption
ITERS=${ITERS:-100}                     # iterations in all
if [ -n "$(ls -A "$WORK" 2>/dev/null)" ] && [ ! -f "$WORK/.quickstart" ] && [ ! -f "$WORK/data/made.json" ]; then
    echo "error: WORK=$WORK holds other files, and the quickstart replaces what it finds: name a new or an empty folder" >&2
    exit 2
fi
mkdir -p "$WORK"
touch "$WORK/.quickstart"               # the folder is the quickstart's
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "1/11 data: docstrings of the standard library as Alpaca rows, and a tokenizer"
python examples/intern/make_quickstart_data.py --output-dir "$WORK/data"

if [ -f "$WORK/alpaca_text_document.idx" ] && [ "$WORK/data/made.json" -nt "$WORK/alpaca_text_document.idx" ]; then
    echo "the data are new: what was made from the old data is made again"
    rm -rf "$WORK"/{hf,weights,ckpt,export,logs,tensorboard,ckpt_chat,logs_chat,chat_*}
    rm -f "$WORK"/alpaca_text_document.*  # last: as long as they are there, a run that is stopped here begins here again
fi

step "2/11 tokens"
if [ ! -f "$WORK/alpaca_text_document.idx" ]; then
    python tools/preprocess_data.py \
        --input "$WORK/data/train.parquet" \
        --tokenizer-name-or-path "$WORK/data/tokenizer" \
        --output-prefix "$WORK/alpaca" \
        --workers 2 \
        --log-interval 1000 \
        --tokenizer-type PretrainedFromHF \
        --handler-name AlpacaPretrainHandler \
        --append-eod
fi

step "3/11 a tiny InternLM with random weights, as a Hugging Face directory"
[ -d "$WORK/hf" ] || python tools/random_model.py --model internlm-tiny --tokenizer "$WORK/data/tokenizer" --output-dir "$WORK/hf"

step "4/11 weights for 2 tensor-parallel ranks"
[ -d "$WORK/weights" ] || python tools/ckpt_convert/llama/convert_weights_from_huggingface.py \
    --input-model-dir "$WORK/hf" \
    --output-model-dir "$WORK/weights" \
    --tensor-model-parallel-size 2 \
    --pipeline-model-parallel-size 1 \
    --bias \
    --deepspeed

iteration() {  # of the newest checkpoint; 0 without one
    local steps=("$WORK"/ckpt/step_*)
    if [ -d "${steps[-1]}" ]; then echo $((10#${steps[-1]##*_})); else echo 0; fi
}
train() {  # train FLAGS...: the 7B recipe itself, with tiny values, from the last checkpoint if there is one
    local from="$WORK/weights"
    [ "$(iteration)" = 0 ] || from="$WORK/ckpt"
    MODEL=internlm-tiny DATA="$WORK/alpaca_text_document" TOKENIZER_PATH="$WORK/data/tokenizer" CHECKPOINT="$from" SAVE="$WORK/ckpt" \
        DTYPE=fp32 ZERO_STAGE=2 TP=2 MICRO_BATCH=4 GLOBAL_BATCH=16 SEQ_LENGTH=256 TRAIN_ITERS="$ITERS" LR_DECAY_ITERS="$ITERS" \
        LR=3e-3 MIN_LR=3e-4 SAVE_INTERVAL=50 EVAL_INTERVAL=50 EVAL_ITERS=4 \
        bash examples/intern/pretrain_internlm_7b_zero.sh --log-dir "$WORK/logs" --tensorboard-dir "$WORK/tensorboard" "$@"
}
reached() { [ "$(iteration)" -ge "$1" ]; }

step "5/11 training with ZeRO-2 on $NPROC processes: the recipe pretrain_internlm_7b_zero.sh, stopped at $STOP of $ITERS, then resumed"
reached "$STOP" || reached "$ITERS" || train --exit-interval "$STOP"
reached "$ITERS" || train

step "6/11 export as a plain LlamaForCausalLM"
if [ ! -f "$WORK/export/config.json" ] || [ "$WORK/ckpt/latest" -nt "$WORK/export/config.json" ]; then
    rm -f "$WORK/export/config.json"  # first: what is left of the old export must not look like a new one
    rm -rf "$WORK/export"
    python tools/ckpt_convert/convert.py \
        --from "$WORK/ckpt" --to "$WORK/export" --format hf-llama --tokenizer "$WORK/data/tokenizer" --verify
fi

trained() {  # trained RECIPE FLAGS...: one that takes a model, with the one that was trained
    MODEL=internlm-tiny CHECKPOINT="$WORK/ckpt" TOKENIZER_PATH="$WORK/data/tokenizer" DTYPE=fp32 bash "$@"
}

step "7/11 a completion, greedy, from the training checkpoint on 2 tensor-parallel ranks"
TP=2 NPROC=2 trained examples/intern/generate_internlm_7b_deepspeed.sh --prompt "Return the " --prompt "Raise ValueError if " --max-new-tokens 32

step "8/11 its score on a few questions in MMLU's form (four answers each: a model that knows nothing gets 25 %)"
rm -rf "$WORK/evaluation"  # of an older checkpoint
NPROC=1 OUTPUT="$WORK/evaluation" trained tasks/evaluation/eval_internlm.sh

step "9/11 fine-tuning on questions and answers, packed: the recipe finetune_internlm_7b_alpaca.sh"
if [ ! -f "$WORK/chat_packed_input_ids_document.idx" ]; then
    python tools/preprocess_data.py \
        --input "$WORK/data/chat.jsonl" \
        --tokenizer-name-or-path "$WORK/data/tokenizer" \
        --output-prefix "$WORK/chat" \
        --workers 1 \
        --handler-name AlpacaStyleInstructionHandler \
        --chat-template v1 \
        --seq-length 256
fi
if [ ! -f "$WORK/ckpt_chat/whole" ] || [ "$WORK/ckpt/latest" -nt "$WORK/ckpt_chat/whole" ]; then
    rm -rf "$WORK/ckpt_chat"
    DATA="$WORK/chat" SAVE="$WORK/ckpt_chat" TP=2 MICRO_BATCH=2 GLOBAL_BATCH=8 SEQ_LENGTH=256 EPOCHS=20 LR=2e-3 MIN_LR=2e-4 \
        trained examples/intern/finetune_internlm_7b_alpaca.sh --log-dir "$WORK/logs_chat" --log-interval 10
    touch "$WORK/ckpt_chat/whole"
fi

step "10/11 a turn of a chat: a question of the training rows before and after fine-tuning, then one that is in no training row"
first() { sed -n "1s/.*\"$1\": \"\([^\"]*\)\".*/\1/p" "$WORK/data/$2"; }   # first FIELD FILE: that of the first row
chat() {  # chat CHECKPOINT QUESTION
    # a here-string, not `echo |`: that would end by SIGPIPE if the command failed before it read the question
    MODEL=internlm-tiny CHECKPOINT="$WORK/$1" TOKENIZER_PATH="$WORK/data/tokenizer" DTYPE=fp32 NPROC=1 \
        bash examples/intern/generate_internlm_7b_deepspeed.sh --task chat --chat-template v1 --max-new-tokens 32 <<< "$2"
}
for rows in chat.jsonl chat_heldout.jsonl; do
    question=$(first instruction "$rows")
    echo "question of $rows: $question"
    echo "its docstring:   $(first output "$rows")"
    if [ "$rows" = chat.jsonl ]; then
        echo "before:"
        chat ckpt "$question"
    fi
    echo "after fine-tuning:"
    chat ckpt_chat "$question"
done

step "11/11 summary: loss, speed and memory; ours beside stock transformers"
python examples/intern/quickstart_report.py --work "$WORK"
