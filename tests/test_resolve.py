"""Command line of training: published commands, presets, errors, and the frozen set of flags."""

import dataclasses
import json
from pathlib import Path

import pytest

from ascendspeed.cli import parser
from ascendspeed.cli.compat import TRAIN
from ascendspeed.cli.train_args import TrainCommand, resolve
from ascendspeed.config import schema
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

GOOD = ["--deepspeed", "--data-path", "data"]

PUBLISHED_7B = """
    --DDP-impl local --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --num-layers 32
    --hidden-size 4096 --position-embedding-type rope --normalization RMSNorm --ffn-hidden-size 11008
    --num-attention-heads 32 --micro-batch-size 8 --global-batch-size 64 --seq-length 2048
    --max-position-embeddings 2048 --train-iters 5000 --data-path ./dataset/alpaca_text_document --load
    ./model_weights/ --tokenizer-name-or-path ./dataset/internlm --tokenizer-not-use-fast --data-impl
    mmap --split 949,50,1 --distributed-backend nccl --lr 1.0e-6 --min-lr 1.0e-6 --lr-decay-style cosine
    --lr-warmup-fraction .01 --weight-decay 1e-2 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --log-interval 1 --save-interval 1000 --eval-interval 10000 --eval-iters 10 --use-flash-attn
    --use-fused-rmsnorm --use-fused-rotary-pos-emb --auto-recompute-device-size 46080 --deepspeed
    --no-pipeline-parallel --deepspeed_config ds.json --zero-stage 2
    --deepspeed-activation-checkpointing --bf16
"""


def test_the_published_command_runs_unchanged():
    run, notes = resolve(PUBLISHED_7B.split(), 8)
    assert run.model == families.preset("internlm-7b")
    assert (run.optim.lr, run.optim.min_lr, run.optim.adam_beta2, run.optim.clip_grad, run.optim.bf16) == (
        1e-6,
        1e-6,
        0.95,
        1.0,
        True,
    )
    assert (run.train.micro_batch_size, run.train.global_batch_size, run.train.load) == (
        8,
        64,
        "./model_weights/",
    )
    assert (run.parallel.zero_stage, run.parallel.deepspeed_config, run.data.split) == (
        2,
        "ds.json",
        "949,50,1",
    )
    assert run.train.recompute_granularity == "full"
    text = "\n".join(notes)
    assert "--deepspeed-activation-checkpointing is accepted as --recompute-granularity full" in text
    for accepted in ("--use-flash-attn", "--DDP-impl", "--tokenizer-not-use-fast"):
        assert f"{accepted} is accepted and ignored: " in text
    assert "checkpoints go to ./ckpt" in text
    assert run.train.save == "./ckpt"


@pytest.mark.parametrize("spelling", ["--local_rank=0", "--local-rank=0", "--local_rank 0"])
def test_launchers_may_add_their_rank(spelling):
    assert resolve([*GOOD, *spelling.split()], 1)[0].parallel.deepspeed


def test_flags_override_the_preset_and_no_typed_flag_is_lost():
    run, _ = resolve(
        [
            *GOOD,
            "--model",
            "internlm-65b",
            "--num-layers",
            "8",
            "--layernorm-epsilon",
            "1e-5",
            "--no-add-qkv-bias",
        ],
        1,
    )
    assert (run.model.num_layers, run.model.hidden_size, run.model.norm_epsilon, run.model.add_qkv_bias) == (
        8,
        8192,
        1e-5,
        False,
    )
    run, _ = resolve([*GOOD, "--model", "internlm-20b", "--row-col-parallel-linear-bias"], 1)
    assert run.model.add_qkv_bias
    assert run.model.add_dense_bias


@pytest.fixture
def weights(tmp_path) -> Path:
    """A folder with a config.json."""
    tiny = families.preset("internlm-tiny")
    (tmp_path / "config.json").write_text(json.dumps(families.FAMILIES["internlm"].write_config(tiny)))
    return tmp_path


def test_the_architecture_comes_from_load(weights):
    assert resolve([*GOOD, "--load", str(weights)], 1)[0].model == families.preset("internlm-tiny")
    assert resolve([*GOOD, "--load", str(weights), "--model", "internlm-tiny", "--num-layers", "4"], 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "5"], "the command line sets num_layers = 5, but --load .* holds num_layers = 4"),
        (["--norm-epsilon", "1e-5"], "norm_epsilon = 1e-05, but --load .* holds norm_epsilon = 1e-06"),
        (["--no-add-dense-bias"], "add_dense_bias = False, but --load .* holds add_dense_bias = True"),
        (["--model", "internlm-7b"], "--model internlm-7b sets .* but --load .* holds "),
    ],
)
def test_a_mismatch_with_load_names_both_values(weights, words, message):
    with pytest.raises(UserError, match=message):
        resolve([*GOOD, "--load", str(weights), *words], 1)


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (
            "--data-path x --zero-stage 1",
            1,
            "--zero-stage 1: ZeRO is DeepSpeed's; add --deepspeed, or use --use-distributed",
        ),
        (
            "--data-path x --pp 2 --num-layers-per-virtual-pipeline-stage 3",
            2,
            "does not divide 32 layers / 2 .* = 16; choose 1, 2, 4",
        ),
        (
            "--data-path x --pp 2 --vpp 2 --num-layers-per-virtual-pipeline-stage 8",
            2,
            "set the same; give one of them",
        ),
        ("--deepspeed", 1, "--data-path is missing"),
        (
            "--deepspeed --data-path x --zero-stag 1",
            1,
            r"unknown flag --zero-stag; did you mean --zero-stage\?",
        ),
        (
            "--deepspeed --data-path x --model internlm-7c",
            1,
            r"unknown model 'internlm-7c' \(did you mean internlm-7b\?\)",
        ),
        ("--deepspeed --data-path x --lr fast", 1, "--lr: could not convert string to float: 'fast'"),
        ("--data-path x --rampup-batch-size 2 4", 1, r"^--rampup-batch-size 2 4: expected INT INT INT \(see"),
        ("--data-path x --train-iters 5 --profile", 1, "--profile-step-start 10: the run ends after 5 iter"),
        ("--deepspeed --data-path x --zero-stage 4", 1, "invalid choice '4' for argument '--zero-stage'"),
        (
            "--deepspeed --data-path x --pipeline-model-parallel-size 2",
            2,
            "the DeepSpeed engine has no pipeline stages",
        ),
        ("--deepspeed --data-path x --pp 2 --no-pipeline-parallel", 2, "--no-pipeline-parallel contradicts"),
        ("--deepspeed --data-path x --bf16 --fp16", 1, "--bf16 and --fp16 contradict each other"),
        ("--deepspeed --data-path x --bf16 --zero-stage 0", 1, "--zero-stage 0 .* use --zero-stage 1"),
        (
            "--deepspeed --data-path x --tp 3",
            3,
            "32 attention heads, .* do not split over 3 tensor-parallel ranks; choose 1, 2, 4, 8",
        ),
        ("--deepspeed --data-path x --tp 0", 1, "do not split over 0 tensor-parallel ranks"),
        ("--deepspeed --data-path x --tp 2", 3, "3 processes do not split into groups of 2 for TP 2; start"),
        (
            "--deepspeed --data-path x --micro-batch-size 3 --global-batch-size 8",
            2,
            "is not a multiple of --micro-batch-size 3 x 2",
        ),
        (
            "--deepspeed --data-path x --tp 2 --sequence-parallel --seq-length 33",
            2,
            "--seq-length 33 does not split over 2",
        ),
        (
            "--deepspeed --data-path x --lr-warmup-fraction .1 --lr-warmup-iters 5",
            1,
            "give one of them, not both",
        ),
        (
            "--deepspeed --data-path x --initial-loss-scale 3",
            1,
            "--initial-loss-scale 3 is not a power of two",
        ),
        ("--deepspeed --data-path x --global-batch-size 0", 1, "--global-batch-size 0: must be at least 1"),
        ("--deepspeed --data-path x --log-interval 0", 1, "--log-interval 0: must be at least 1"),
        ("--deepspeed --data-path x --save-interval -1", 1, "--save-interval -1: must be at least 1"),
        ("--deepspeed --data-path x --clip-grad nan", 1, "--clip-grad nan: must be 0 or more"),
        ("--deepspeed --data-path x --weight-decay -1", 1, r"--weight-decay -1\.0: must be 0 or more"),
        (
            "--deepspeed --data-path x --adam-beta2 1.5",
            1,
            r"--adam-beta2 1\.5: must be at least 0 and below 1",
        ),
        ("--deepspeed --data-path x --num-layers 0", 1, "--num-layers 0: must be at least 1"),
        ("--deepspeed --data-path x --seq-length 0", 1, "--seq-length 0: must be at least 1"),
        (
            "--deepspeed --data-path x --hidden-dropout 1.5",
            1,
            r"--hidden-dropout 1\.5: must be at least 0 and below 1",
        ),
        (
            "--deepspeed --data-path x --num-query-groups 3",
            1,
            "32 attention heads do not split over 3 key/value heads",
        ),
        (
            "--deepspeed --data-path x --hidden-size 100",
            1,
            "hidden size 100 does not split over 32 attention heads",
        ),
        ("--deepspeed --data-path x --make-vocab-size-divisible-by 0", 1, "must be at least 1"),
        ("--data-path x --deepspeed stray", 1, "'stray' does not belong to any flag"),
    ],
)
def test_errors_are_one_line(words, world, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(words.split(), world)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--eval-interval 6", "--eval-interval 6: the run ends after 5 iterations"),
        ("--eval-interval 5", None),
        ("--iterations-to-skip 5", "--iterations-to-skip, --skip-batches: 5 is beyond the last iteration, 4"),
        ("--skip-batches 3-7", "--iterations-to-skip, --skip-batches: 7 is beyond the last iteration, 4"),
        ("--skip-batches 3-4", None),
    ],
)
def test_what_a_short_run_does_not_reach_is_noted(words, note):
    notes = resolve([*GOOD, "--train-iters", "5", *words.split()], 1)[1]
    assert [text[: len(note or "")] for text in notes if "iteration" in text] == ([note] if note else [])


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{", '{"model_type": "gpt2"}'])
def test_a_malformed_config_json_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        resolve([*GOOD, "--load", str(tmp_path)], 1)


def test_a_damaged_run_json_does_not_hide_the_checkpoint_before(tmp_path):
    """The architecture is that of the checkpoint which will be loaded: the one in `latest`, if it is
    intact."""
    import hashlib

    for step, layers in ((2, 4), (4, 5), (6, 6)):
        model = families.preset("internlm-tiny")
        run, _ = resolve([*GOOD, "--model", "internlm-tiny"], 1)
        text = json.dumps(
            schema.to_dict(dataclasses.replace(run, model=dataclasses.replace(model, num_layers=layers)))
        )
        folder = tmp_path / f"step_{step:07}"
        folder.mkdir()
        (folder / "run.json").write_text(text)
        entry = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"files": {"run.json": entry}}))
    (tmp_path / "latest").write_text("step_0000004\n")
    assert resolve([*GOOD, "--load", str(tmp_path)], 1)[0].model.num_layers == 5
    newest = tmp_path / "step_0000004" / "run.json"
    newest.write_text(newest.read_text().replace('"num_layers": 5', '"num_layers": 9'))
    (tmp_path / "step_0000006" / "run.json").write_text("{")
    assert resolve([*GOOD, "--load", str(tmp_path)], 1)[0].model.num_layers == 4


def test_auto_resume_prefers_save_to_load(tmp_path, weights):
    """A checkpoint in --save is resumed; without one, the run starts from --load as --finetune requires."""
    words = [*GOOD, "--load", str(weights), "--finetune", "--save", str(tmp_path / "ckpt"), "--auto-resume"]
    run, notes = resolve(words, 1)
    assert (run.train.load, run.train.finetune) == (str(weights), True)
    assert f"--auto-resume: {tmp_path}/ckpt holds no checkpoint yet, so this is the start of the run" in notes
    (tmp_path / "ckpt" / ".step_0000001.tmp").mkdir(parents=True)  # the very first save was killed
    assert resolve(words, 1)[0].train.load == str(weights)
    (tmp_path / "ckpt" / "step_0000001").mkdir()
    run, notes = resolve(words, 1)
    assert (run.train.load, run.train.finetune) == (str(tmp_path / "ckpt"), False)
    with pytest.raises(UserError, match="--auto-resume continues the run in --save; give --save"):
        resolve([*GOOD, "--auto-resume"], 1)
    assert resolve([*GOOD, "--auto-resume", "--save-interval", "5"], 1)[0].train.save == "./ckpt"


def test_virtual_stages_by_the_layers_in_each():
    words = [
        "--data-path",
        "data",
        "--pp",
        "2",
        "--global-batch-size",
        "8",
        "--num-layers-per-virtual-pipeline-stage",
        "4",
    ]
    assert (
        resolve(words, 2)[0].parallel.num_virtual_stages_per_pipeline_rank == 4
    )  # of InternLM-7B's 32 layers
    assert resolve(words, 2)[0].train.global_batch_size == 8
    assert resolve(["--data-path", "data", "--tp", "2", "--cp", "2"], 8)[0].train.global_batch_size == 2


def test_sequence_parallel_at_size_one_is_switched_off_with_a_note():
    run, notes = resolve([*GOOD, "--sequence-parallel"], 1)
    assert not run.parallel.sequence_parallel
    assert any("does nothing at tensor-parallel size 1" in text for text in notes)


FROZEN = Path(__file__).parent / "flags.txt"


def test_the_set_of_flags_is_frozen():
    """A new flag is added to tests/flags.txt on purpose; no flag is ever removed, because scripts use it."""
    assert sorted({*parser.spellings(TrainCommand), *TRAIN}) == FROZEN.read_text().split()


def test_every_flag_of_the_recipes_exists():
    for recipe in (Path(__file__).parent.parent / "examples" / "intern").glob("pretrain_*.sh"):
        used = {word for word in recipe.read_text().split() if word.startswith("--") and len(word) > 2}
        assert {word.rstrip('"}') for word in used} <= set(parser.spellings(TrainCommand)) | set(TRAIN), (
            recipe
        )
