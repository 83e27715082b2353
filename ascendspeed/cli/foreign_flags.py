"""Flags of other projects that do not exist in this one, with the equivalent or the reason."""

import re
from collections.abc import Collection

_MEGATRON = (
    (
        "throughput is in every log line (tokens/s/device, TFLOP/s/device)",
        "--log-throughput --throughput-window-size --log-progress",
    ),
    (
        "metrics are written to --log-dir, and to TensorBoard with --tensorboard-dir",
        "--log-timers-to-tensorboard "
        "--log-memory-to-tensorboard --log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--log-world-size-to-tensorboard --tensorboard-log-interval --tensorboard-queue-size "
        "--timing-log-level --timing-log-option",
    ),
    (
        "--finetune takes the weights alone from --load and starts at iteration 0",
        "--no-load-optim --no-load-rng --pretrained-checkpoint",
    ),
    (
        "a checkpoint always holds the whole state; tools/ckpt_convert/convert.py exports its weights",
        "--no-save-optim --no-save-rng",
    ),
    (
        "checkpoints have one format, which every layout and engine loads; tools/ckpt_convert/convert.py "
        "converts from and to others",
        "--ckpt-format --dist-ckpt-format --use-dist-ckpt --auto-detect-ckpt-format --ckpt-convert-format "
        "--ckpt-convert-save --ckpt-fully-parallel-save --ckpt-fully-parallel-load "
        "--ckpt-assume-constant-structure --dist-ckpt-strictness",
    ),
    (
        "name the folder of the step: --load CKPT/step_0001200",
        "--ckpt-step",
    ),
    (
        "--keep N keeps the newest N checkpoints",
        "--most-recent-k --save-retain-interval",
    ),
    (
        "the architecture comes from the checkpoint or the config.json in --load",
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args --use-tokenizer-model-from-checkpoint-args",
    ),
    (
        "attention is torch's SDPA, with variable-length kernels of the device for packed rows",
        "--attention-backend --attention-softmax-in-fp32 --no-masked-softmax-fusion "
        "--window-size --softmax-type",
    ),
    (
        "layers are Megatron-core's own, without Transformer Engine",
        "--transformer-impl --use-mcore-models --use-legacy-models --spec --tp-comm-overlap",
    ),
    (
        "products in fp8 are those of --fp8-format, with a scale for each tensor that is computed anew",
        "--fp8-recipe --fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo --fp8-param-gather",
    ),
    (
        "fused kernels are chosen by --use-fused-rmsnorm, --use-fused-rotary-pos-emb and --mlp-layer-fusion",
        "--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
        "--no-persist-layer-norm --no-gradient-accumulation-fusion --cross-entropy-loss-fusion",
    ),
    (
        "--tokenizer-name-or-path names a directory with tokenizer.model or tokenizer.json",
        "--tokenizer-model --vocab-file --merge-file --tiktoken-pattern --trust-remote-code "
        "--vocab-extra-ids",
    ),
    (
        "warmup begins at 0; its length is --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction",
        "--lr-warmup-init --warmup",
    ),
    (
        "the global batch size is constant, or grows by --rampup-batch-size or --rampup-batch-size-iters in "
        "steps that fit the ranks",
        "--step-batch-size-schedule --decrease-batch-size-if-needed",
    ),
    (
        "weight decay is constant: --weight-decay",
        "--start-weight-decay --end-weight-decay --weight-decay-incr-style",
    ),
    (
        "--num-query-groups N is enough",
        "--group-query-attention",
    ),
    (
        "models have rotary embeddings over the whole head: --rotary-base, --rope-scaling-type, "
        "--rope-scaling-factor",
        "--use-rotary-position-embeddings --rotary-percent --rotary-interleaved "
        "--rotary-seq-len-interpolation-factor --rope-type --no-position-embedding",
    ),
    (
        "--rope-scaling-type llama3 --rope-scaling-factor 8 --rope-original-max-position-embeddings 8192, "
        "or a --load whose config.json says it",
        "--use-rope-scaling",
    ),
    (
        "biases are chosen one by one: --no-add-qkv-bias, --no-add-dense-bias, --no-add-mlp-bias",
        "--disable-bias-linear --add-bias-linear",
    ),
    (
        "--activation is silu or gelu-tanh",
        "--squared-relu --openai-gelu --quick-geglu --glu-linear-offset",
    ),
    (
        "gradients are always accumulated and reduced in fp32",
        "--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16",
    ),
    (
        "the loss scale is dynamic; --initial-loss-scale is the first",
        "--loss-scale --loss-scale-window --min-loss-scale --hysteresis",
    ),
    (
        "use --recompute-granularity selective",
        "--recompute-activations",
    ),
    (
        "SIGTERM and SIGUSR1 always save a checkpoint and stop the run",
        "--exit-signal-handler --exit-signal",
    ),
    (
        "data are memory-mapped; there are no loader processes",
        "--num-workers --dataloader-type --no-mmap-bin-files --num-dataset-builder-threads",
    ),
    (
        "name data by --data-path with --split, or by --data-path and --valid-data-path",
        "--train-data-path --test-data-path --data-args-path --per-split-data-args-path",
    ),
    (
        "packed instruction data (--packing) separate documents; see docs/fine-tuning.md",
        "--reset-position-ids --reset-attention-mask --eod-mask-loss --sft",
    ),
    (
        "experts exchange tokens by all-gather; --moe-aux-loss-coeff balances them by rows (sequences)",
        "--moe-token-dispatcher-type --moe-grouped-gemm --moe-router-load-balancing-type "
        "--expert-tensor-parallel-size",
    ),
    (
        "pipeline stages hold equal numbers of layers",
        "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
        "--pipeline-model-parallel-layout",
    ),
    (
        "FSDP is torch's: --use-torch-fsdp2; or --deepspeed --zero-stage 3",
        "--use-megatron-fsdp --data-parallel-sharding-strategy",
    ),
    (
        "offloading is DeepSpeed's: --deepspeed --zero-offload cpu",
        "--optimizer-cpu-offload --optimizer-offload-fraction",
    ),
    (
        "use --seq-length",
        "--encoder-seq-length --decoder-seq-length",
    ),
    (
        "use --num-layers",
        "--encoder-num-layers --decoder-num-layers",
    ),
    (
        "use --tensor-model-parallel-size",
        "--model-parallel-size",
    ),
)
"""(answer, flags)."""

_INFERENCE = (
    ("only the weights of --load are read; leave it out", "--no-load-optim --no-load-rng --finetune"),
    ("a missing --load is always an error; leave it out", "--exit-on-missing-checkpoint"),
    (
        "padded rows of the vocabulary of --load take no part; leave it out",
        "--make-vocab-size-divisible-by",
    ),
)
"""(answer, flags of Megatron-LM) for commands that do not train."""

_HUGGING_FACE = (
    ("use --lr", "--learning-rate"),
    ("--save is the folder of checkpoints", "--output-dir --output"),
    ("use --micro-batch-size", "--per-device-train-batch-size --per-gpu-train-batch-size"),
    ("use --batch-size", "--per-device-eval-batch-size"),
    (
        "gradients are accumulated over --global-batch-size / (--micro-batch-size x data-parallel ranks)",
        "--gradient-accumulation-steps --accumulate-grad-batches",
    ),
    ("use --train-epochs", "--num-train-epochs --num-epochs --epochs --max-epochs"),
    ("use --train-iters", "--max-steps"),
    ("use --lr-warmup-iters", "--warmup-steps --num-warmup-steps"),
    ("use --lr-warmup-fraction", "--warmup-ratio"),
    ("use --lr-decay-style", "--lr-scheduler-type"),
    ("use --log-interval", "--logging-steps --logging-strategy"),
    ("use --save-interval", "--save-steps --save-strategy"),
    ("use --eval-interval", "--eval-steps --eval-strategy --evaluation-strategy"),
    ("use --keep", "--save-total-limit"),
    ("use --clip-grad", "--max-grad-norm"),
    ("use --adam-eps", "--adam-epsilon"),
    ("use --recompute-granularity full", "--gradient-checkpointing"),
    ("use --seq-length", "--max-seq-length --max-seq-len --model-max-length --cutoff-len --block-size"),
    ("use --load", "--model-name-or-path --model-path --model-name --pretrained"),
    ("use --data-path", "--train-file --dataset --dataset-name --dataset-dir"),
    ("use --valid-data-path", "--validation-file"),
    ("use --input", "--train-file --dataset --dataset-name --input-file"),
    ("use --auto-resume, or --load", "--resume-from-checkpoint --overwrite-output-dir"),
    ("use --tensorboard-dir", "--logging-dir"),
    ("use --packing", "--neat-packing"),
    ("use --tokenizer-name-or-path", "--tokenizer --tokenizer-name --tokenizer-path --tokenizer-dir"),
    ("use --lora-target-modules", "--lora-target --target-modules"),
    ("use --chat-template", "--template --prompt-template --conv-template"),
    ("evaluation is on with --eval-interval; training always is", "--do-train --do-eval"),
    ("use --task sample, or leave it out for --task greedy", "--do-sample"),
    ("use --max-new-tokens", "--max-length --max-tokens --max-out-len --max-gen-toks"),
    ("use --num-beams with --task beam", "--use-beam-search --beam-width"),
    ("use --stop", "--stop-words --stop-strings"),
    ("use --dtype", "--torch-dtype --precision"),
    ("use --bf16 or --fp16", "--torch-dtype --dtype --precision --mixed-precision"),
    ("use --task", "--tasks"),
    ("nothing is downloaded, and no code of a checkpoint is run; leave it out", "--trust-remote-code"),
)
"""(answer, flags) of transformers, PEFT, LLaMA-Factory, lm-evaluation-harness and similar commands."""

_INTERNEVO = (
    ("use --config, which reads the configuration files of both", "--config-file --config-path"),
    ("the recipes and `intern train` start the launcher; see docs/recipes.md", "--launcher"),
    ("use --seq-length", "--seq-len"),
    ("use --micro-batch-size", "--micro-bsz"),
    ("use --global-batch-size", "--micro-num"),
    ("use --input-model-dir and --output-model-dir", "--load-dir --save-dir"),
)
"""(answer, flags) of InternEvo, MindFormers and XTuner."""

PROJECTS = {
    "Megatron-LM": _MEGATRON + _INFERENCE,
    "Hugging Face's tools": _HUGGING_FACE,
    "InternEvo or MindFormers": _INTERNEVO,
}


def find_answer(flag: str, known: Collection[str]) -> str | None:
    """Returns the error text for a flag of another project; None for any other flag.

    `known`: flags of the command; an answer that names a flag which the command lacks is not for it.
    """
    for project, answers in PROJECTS.items():
        for answer, flags in answers:
            if flag in flags.split() and set(re.findall(r"--[a-z][\w-]*", answer)) <= set(known):
                return f"{flag} of {project} does not exist here: {answer}"
    return None
