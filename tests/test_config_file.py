"""`--config FILE`: settings of this project, MindFormers and InternEvo as flags; `--dump-config`."""

import contextlib
import json
import shlex
from dataclasses import replace

import pytest
import yaml

from ascendspeed.cli.config_file import internevo as internevo_rules
from ascendspeed.cli.config_file import mindformers
from ascendspeed.cli.config_file.literal_python import read_assignments
from ascendspeed.cli.config_file.rules import translate
from ascendspeed.cli.train_args import resolve
from ascendspeed.config import batch_schedule
from ascendspeed.config.schema import Run, to_dict
from ascendspeed.inference.args import resolve as resolve_generation
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

INTERNEVO = """
JOB_NAME = "7b_train"
SEQ_LEN = 2048
HIDDEN_SIZE = 4096
MLP_RATIO = 8 / 3
SAVE_CKPT_FOLDER = "local:llm_ckpts"
CHECKPOINT_EVERY = 50
model_type = "INTERNLM"
ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    auto_resume=False,
    checkpoint_every=CHECKPOINT_EVERY,
    async_upload=True,
    async_upload_tmp_folder=f"/dev/shm/{JOB_NAME}/",
)
data = dict(
    seq_len=SEQ_LEN, micro_num=4, micro_bsz=2, valid_micro_num=4, valid_every=0, pack_sample_into_one=False,
    total_steps=50000, skip_batches="", rampup_batch_size="", min_length=50, train_folder="tokens",
    valid_folder=None, empty_cache_and_diag_interval=200, diag_outlier_ratio=1.1,
)
STEPS = 50000
grad_scaler = dict(fp16=dict(initial_scale=65536, min_scale=1, growth_interval=1000), growth_factor=2)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=STEPS, init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1)
model = dict(
    checkpoint=False, num_attention_heads=32, embed_split_hidden=True, vocab_size=103168, embed_grad_scale=1,
    parallel_output=True, hidden_size=HIDDEN_SIZE, num_layers=16, mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False, dtype="torch.bfloat16", norm_type="rmsnorm", layer_norm_epsilon=1e-5,
    use_flash_attn=True, num_chunks=1,
)
parallel = dict(zero1=dict(size=-1), tensor=dict(size=2, mode="msp"),
    pipeline=dict(size=1), weight=dict(size=1))
"""
MINDFORMERS = """
seed: 0
output_dir: './output'
load_checkpoint: ''
run_mode: 'finetune'
trainer: {type: CausalLanguageModelingTrainer, model_name: 'internlm_7b'}
runner_config: {epochs: 2, batch_size: 2, sink_mode: True, sink_size: 2}
optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.9, beta2: 0.95, eps: 1.e-8, learning_rate: 2.e-5}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-5, lr_end: 0, warmup_ratio: 0.03, total_steps: -1}
train_dataset: {data_loader: {type: MindDataset, dataset_dir: "", shuffle: True}, batch_size: 2}
parallel: {parallel_mode: 1, gradients_mean: False}
parallel_config: {data_parallel: 4, model_parallel: 2, pipeline_stage: 1, micro_batch_num: 16}
recompute_config: {recompute: True, select_recompute: False}
model:
  model_config: {type: InternLMConfig, seq_length: 2048, hidden_size: 4096, num_layers: 32, num_heads: 32,
    vocab_size: 103168, rms_norm_eps: 1.0e-6, compute_dtype: "bfloat16", use_past: False}
  arch: {type: InternLMForCausalLM}
callbacks: [{type: MFLossMonitor}]
"""


@pytest.fixture
def write(tmp_path):
    """Writes a file of a name and returns its path."""

    def write_text(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_text


def dumped(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        resolve([*words, "--dump-config"], 8)
    assert stop.value.code == 0
    return capsys.readouterr().out


COMMAND_LINE = shlex.split(
    "--model internlm2-tiny --data-path 0.3 a 0.7 b --bf16 --lr 2e-4 --tp 2 --sequence-parallel --save out "
    "--no-tie-embeddings --global-batch-size 16 --micro-batch-size 4 --lora-rank 4 --split 90,10,0"
)


def test_what_is_dumped_gives_the_same_run(capsys, write):
    run, _ = resolve(COMMAND_LINE, 8)
    text = dumped(capsys, *COMMAND_LINE)
    assert resolve(["--config", write("run.yaml", text)], 8)[0] == run
    record = json.dumps(to_dict(run))  # run.json, with the record of its inputs
    assert resolve(["--config", write("run.json", record)], 8)[0] == run
    less = {**yaml.safe_load(text), "lora": {}}
    assert resolve(["--config", write("less.yaml", yaml.safe_dump(less))], 8)[0] != run  # control


def test_the_command_line_wins(write):
    path = write("run.yaml", "{model: internlm2-tiny, lr: 1e-3, data_path: [x], train: {train_epochs: 2}}")
    run, _ = resolve(["--config", path, "--lr=2e-3", "--train_iters", "5"], 1)
    assert (run.optim.lr, run.train.train_iters, run.train.train_epochs) == (2e-3, 5, None)
    assert resolve(["--config", path], 1)[0].optim.lr == 1e-3
    record = json.dumps(to_dict(run))
    other, notes = resolve(["--config", write("run.json", record), "--model", "internlm-tiny"], 1)
    assert other.model == families.preset("internlm-tiny")
    assert any("--model replaces the architecture" in note for note in notes)


def internevo(write, *words: str, old: str = "", new: str = "") -> Run:
    path = write("config.py", INTERNEVO.replace(old, new) if old else INTERNEVO)
    return resolve(["--config", path, *words], 8)[0]


def test_internevo(write):
    run = internevo(write, "--global-batch-size", "32")
    assert (run.model.num_layers, run.model.ffn_hidden_size, run.model.norm_epsilon) == (16, 11008, 1e-5)
    assert (run.data.data_path, run.data.min_length, run.data.packing) == (("tokens",), 50, "internevo-cut")
    assert (run.train.train_iters, run.train.micro_batch_size, run.train.save) == (50000, 2, "llm_ckpts")
    assert (run.train.save_interval, run.train.async_save, run.optim.bf16) == (50, True, True)
    parallel = run.parallel
    assert (parallel.tensor_model_parallel_size, parallel.sequence_parallel) == (2, True)
    assert parallel.use_distributed_optimizer
    assert (run.optim.lr, run.optim.min_lr, run.optim.lr_warmup_fraction) == (1e-4, 1e-5, 0.01)
    zero = internevo(write, "--global-batch-size", "32", "--deepspeed", "--zero-stage", "1")
    assert not zero.parallel.use_distributed_optimizer


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("loss = ", "__import__('os').system('x')\nloss = ", "is not a literal; configurations are read"),
        ("min_length=50", "min_length=open('x')", "line 19: \"open\\('x'\\)\" is not a literal"),
        ("min_length=50", "min_lenght=50", "keys that have no meaning here: data.min_lenght"),
        ('norm_type="rmsnorm"', 'norm_type="layernorm"', "the norm is RMSNorm"),
        ("weight=dict(size=1)", "weight=dict(size=8)", "there is no weight parallelism here"),
        ('"local:llm_ckpts"', '"boto3:s3://x"', "only local: paths"),
        ('"INTERNLM"', '"LLAMA2"', "choose one with --model"),
        ("adam_beta2_c=0", "adam_beta2_c=1 / 0", "is not a literal"),
        ('rampup_batch_size=""', 'rampup_batch_size="4 2"', "not START INCREMENT ITERATIONS"),
        ('rampup_batch_size=""', 'rampup_batch_size="1 2 9"', "do not lead from 1 to data.micro_num = 4"),
        ('rampup_batch_size=""', 'rampup_batch_size="8 2 9"', "do not lead from 8 to data.micro_num = 4"),
        (
            "micro_bsz=2, valid_micro_num=4, valid_every=0, pack_sample_into_one=False,\n"
            '    total_steps=50000, skip_batches="", rampup_batch_size=""',
            'micro_bsz=3, rampup_batch_size="1 1 9"',
            "choose a multiple of data.micro_num x data.micro_bsz = 12",
        ),
        ('skip_batches=""', 'skip_batches="7-3"', "'7-3' is not N or FIRST-LAST"),
    ],
)
def test_internevo_is_refused_by_name(write, old, new, message):
    with pytest.raises(UserError, match=message):
        internevo(write, "--global-batch-size", "32", old=old, new=new)


def test_internevo_skips_the_same_batches(write):
    """Numbers and ranges from 0 in both; the bounds of a range belong to it."""
    words = ("--global-batch-size", "32")
    run = internevo(write, *words, old='skip_batches=""', new='skip_batches="2-3,7"')
    skipped = [number for number in range(10) if batch_schedule.is_skipped(run.train, number)]
    assert skipped == [2, 3, 7]
    assert internevo(write, *words).train.skip_batches is None


def internevo_batch_sizes(micro_num: int, ramp: str, steps: int) -> list[int]:
    """Micro-batches of a data-parallel rank in each step, by the rule of InternEvo's `StaticBatchSampler`."""
    start, increment, every = map(int, ramp.split())
    return [min(start + step // every * increment, micro_num) for step in range(steps)]


def batch_sizes_of(run: Run, steps: int) -> list[int]:
    """Global batch size of each step of a run."""
    sizes: list[int] = []
    for _ in range(steps):
        sizes.append(batch_schedule.batch_size_at(run.train, sum(sizes)))
    return sizes


@pytest.mark.parametrize(
    ("micro_num", "ramp"), [(4, "1 1 4"), (8, "2 2 2"), (8, "2 3 5"), (4, "4 2 9"), (6, "2 4 1")]
)
def test_internevo_ramps_by_iterations(write, micro_num, ramp):
    """Eight data-parallel ranks with micro-batches of 2: the batches of InternEvo, step by step."""
    ramped = INTERNEVO.replace('rampup_batch_size=""', f'rampup_batch_size="{ramp}"')
    path = write("config.py", ramped.replace("micro_num=4", f"micro_num={micro_num}", 1))
    run, _ = resolve(["--config", path, "--global-batch-size", str(micro_num * 2 * 8)], 16)
    expected = [size * 2 * 8 for size in internevo_batch_sizes(micro_num, ramp, 40)]
    assert batch_sizes_of(run, 40) == expected
    assert run.train.train_iters == 50000
    assert batch_schedule.iterations_of(run.train, sum(expected)) == 40
    assert batch_schedule.iterations_of(run.train, sum(expected) - 1) == 39
    if len(set(expected)) > 2:  # control: the rule of Megatron-LM, steps of equally many samples
        start, increment, _ = run.train.rampup_batch_size_iters
        ramp_samples = sum(size for size in expected if size < expected[-1])
        by_samples = replace(
            run.train, rampup_batch_size=(start, increment, ramp_samples), rampup_batch_size_iters=None
        )
        assert batch_sizes_of(replace(run, train=by_samples), 40) != expected


def test_internevo_needs_the_global_batch(write):
    with pytest.raises(UserError, match="micro_num = 4: the global batch is"):
        internevo(write)


def test_nothing_is_executed(tmp_path):
    trace = tmp_path / "trace"
    for code in (f"x = open({str(trace)!r}, 'w')", f"x = [open({str(trace)!r}, 'w') for i in (1,)]"):
        with pytest.raises(UserError, match="is not a literal"):
            read_assignments(code, "config.py")
    assert not trace.exists()
    exec(f"x = open({str(trace)!r}, 'w')")  # control
    assert trace.exists()


def test_mindformers(write):
    words = ("--model", "internlm-7b", "--data-path", "x")
    run, notes = resolve(["--config", write("run.yaml", MINDFORMERS), *words], 8)
    assert (run.train.train_epochs, run.train.global_batch_size, run.train.seed) == (2, 8, 0)
    assert (run.optim.lr, run.optim.min_lr, run.optim.lr_warmup_fraction) == (1e-5, 0, 0.03)
    assert (run.train.recompute_granularity, run.train.save) == ("full", "./output")
    assert any("--model replaces the architecture" in note for note in notes)
    misspelt = write("misspelt.yaml", MINDFORMERS.replace("model_parallel:", "modelparallel:"))
    with pytest.raises(UserError, match=r"no meaning here: parallel_config\.modelparallel"):
        resolve(["--config", misspelt, *words], 8)
    records = write("records.yaml", MINDFORMERS.replace('dataset_dir: ""', 'dataset_dir: "/data"'))
    with pytest.raises(UserError, match="MindRecord files are not read"):
        resolve(["--config", records, *words], 8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lr: 1\nlrr: 2\ntrain: {lr: 3}", "unknown: lrr, train.lr; sections are"),
        ("a.yaml", "lr: 1\nlr: 2", "'lr' stands twice"),
        ("a.yaml", "a: [", "line 1: not YAML"),
        ("a.yaml", "lr: \0", r"a.yaml: not YAML: .*not allowed$"),
        ("a.yaml", "lr: {a: 1}", "lr is one value"),
        ("a.yaml", "lr: abc", "lr"),
        ("a.yaml", "- 1", "not a mapping"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []", "not YAML"),
        ("a.toml", "", "reads .yaml, .json"),
    ],
)
def test_mistakes(write, name, text, message):
    with pytest.raises(UserError, match=message):
        resolve(["--config", write(name, text), "--data-path", "x"], 1)


def test_flags_of_the_file(write, tmp_path):
    for words in (["--config"], ["--config", "--lr"], ["--config", "a", "--config", "b"]):
        with pytest.raises(UserError, match="--config"):
            resolve(words, 1)
    with pytest.raises(UserError, match="missing"):
        resolve(["--config", str(tmp_path / "missing.yaml")], 1)


def test_other_commands(write, tmp_path, capsys):
    """Generation reads a file of its own flags, and prints it."""
    path = write("g.yaml", "{prompt: [one, two], max_new_tokens: 3}")
    with pytest.raises(SystemExit):
        resolve_generation(["--config", path, "--max-new-tokens", "4", "--dump-config"], 1)
    values = yaml.safe_load(capsys.readouterr().out)
    flat = {key: value for group in values.values() for key, value in (group or {}).items()}
    assert (flat["prompt"], flat["max_new_tokens"]) == (["one", "two"], 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{lr: 0.1, optim: {lr: 0.2}}", "optim.lr and lr set the same"),
        ("{train_iters: 2, train-iters: 3}", "train-iters and train_iters set the same"),
        ("lr: no", "lr is false, but it is no switch"),
        ("bf16: 'no'", "bf16 is 'no'; choose true or false"),
        ("train_iters: 1:30", "'1:30'"),  # 90 in YAML 1.1
        ("save: !!binary aGVsbG8=", "line 1: not YAML: could not determine a constructor"),
        ("train_iters: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("model: {family: nonsense}", "family = 'nonsense' does not exist; choose from internlm, "),
        ("data_path: [a, [b]]", "data-path is a list of plain values"),
    ],
)
def test_values_that_mean_something_else_are_refused(write, text, message):
    with pytest.raises(UserError, match=message):
        resolve(["--config", write("run.yaml", text)], 1)


def test_numbers_are_those_of_yaml_1_2(write):
    text = "{data_path: [x], train_iters: 010, lr: 1e-3, min_lr: 1.0E-5, seed: 0x10, save: 2026-13-45}"
    run = resolve(["--config", write("run.yaml", text)], 1)[0]
    assert (run.train.train_iters, run.optim.lr, run.optim.min_lr) == (10, 1e-3, 1e-5)  # 8 in YAML 1.1
    assert (run.train.seed, run.train.save) == (16, "2026-13-45")


@pytest.mark.parametrize("value", [{"a": [1]}, [None], "x", True, None, -1, 1e300, "1 2 3"])
def test_foreign_keys_with_values_of_any_type(write, value):
    """Every key of MindFormers' and InternEvo's rules is translated or refused in one line."""
    for rules in (mindformers.RULES, internevo_rules.RULES):
        for key in rules:
            with contextlib.suppress(UserError):
                translate({key: value}, rules, "file", "Program's")
    with pytest.raises(UserError, match="of a wrong type"):
        internevo(write, old="hidden_size=HIDDEN_SIZE", new="hidden_size='x'")


GROWING = "A = 'x'\nB = f'{A}'\n" + "B = f'{B}{B}{B}{B}{B}{B}{B}{B}'\n" * 30


@pytest.mark.parametrize(
    ("text", "message"), [(GROWING, "is not a literal"), ("A = " + "-" * 50_000, "nested too deeply")]
)
def test_literals_do_not_grow_without_bound(text, message):
    with pytest.raises(UserError, match=message):
        read_assignments(text, "config.py")
