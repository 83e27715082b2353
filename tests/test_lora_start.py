"""Start and resume of LoRA runs: flags, base weights, the commands from the first step to peft's logits."""

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers import launch, oracle
from helpers.conversion import command as tool
from helpers.log_lines import log_lines
from helpers.lora_start import LORA, MODEL, NAMES, RUN
from safetensors.torch import load_file

from ascendspeed.config.schema import LoraConfig, ParallelConfig, Run
from ascendspeed.conversion import weights_identity
from ascendspeed.models.lora import targets
from ascendspeed.training.metric_lines import read_lines
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The weights of one seed in several formats, and those of another."""
    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
    from ascendspeed.models import param_mapping

    folder = tmp_path_factory.mktemp("bases")

    def source(seed: int) -> CheckpointReader:
        tensors = {
            name: tensor.bfloat16().float() for name, tensor in param_mapping.random_tensors(MODEL, seed)
        }
        return CheckpointReader(
            "random",
            folder,
            MODEL,
            {},
            dict.fromkeys(tensors, torch.float32),
            from_factory(tensors.__getitem__),
            None,
        )

    convert.write_hf(source(5), folder / "hf")
    convert.write_hf(source(5), folder / "bf16", dtype=torch.bfloat16)
    convert.write_hf(source(5), folder / "llama", family="llama")
    convert.write_megatron(source(5), folder / "ranks", 2, 2)
    convert.write_hf(source(6), folder / "other")
    return {path.name: path for path in folder.iterdir()}


def test_weights_are_known_in_every_format(bases):
    from ascendspeed.conversion.formats.registry import open_reader

    fingerprints = {
        name: weights_identity.sampled(open_reader(path)) for name, path in bases.items() if name != "ranks"
    }
    fingerprints["ranks"] = weights_identity.sampled(open_reader(bases["ranks"], bases["hf"]))
    assert fingerprints.pop("other") not in fingerprints.values()
    assert len(set(fingerprints.values())) == 1


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (EMBEDDING, slice(0, 100)),
        (EMBEDDING, slice(-16, -15)),
        (HEAD, slice(15, 16)),
        (HEAD, slice(-1, None)),
        *(
            pytest.param(
                f"decoder.layers.3.{linear}.weight",
                rows,
                marks=[] if linear == LINEARS[0] else pytest.mark.slow,
            )
            for linear in LINEARS
            for rows in (slice(0, 1), slice(-1, None), slice(1, -1))
        ),
        ("decoder.layers.1.input_layernorm.weight", slice(5, 6)),
    ],
)
def test_weights_that_differ_in_some_rows_are_others(name, rows, bases):
    from ascendspeed.conversion.formats.registry import open_reader

    source = open_reader(bases["hf"])

    def changed(name: str, rows: slice) -> str:
        def block(which, tile):
            read = source.read_block(which, tile).clone()
            touched = torch.zeros(dict(source.tensors())[name].shape[0], dtype=torch.bool)
            touched[rows] = True
            if which == name:
                read[touched[tile.row : tile.row + tile.rows]] += 1
            return read

        return weights_identity.sampled(replace(source, read_block=block))

    assert changed(name, rows) != weights_identity.sampled(source)
    assert changed(name, slice(0, 0)) == weights_identity.sampled(source)  # control


@pytest.fixture
def start(cpu):
    """Returns the result of `find_start` and its log."""
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import setup

    grid = process_groups.initialize(cpu, ParallelConfig(), seed=1)

    def go(lora: dict | None = None, **train):
        run = replace(
            RUN, train=replace(RUN.train, **train), lora=replace(LORA, **lora) if lora is not None else LORA
        )
        with log_lines() as lines:
            begin = setup.find_start(run, grid, cpu)
        return begin, "\n".join(lines)

    return go


def save(folder: Path, run: Run, tensors: dict[str, torch.Tensor]) -> str:
    from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.models import param_mapping

    fragments = [
        Fragment(name, kind, param_mapping.ShardSpec(tuple(t.shape)), 0, 0, t.flatten())
        for name, t in tensors.items()
        for kind in KINDS
    ]
    state = TrainState(2, 8, 64, {"updates": 2})
    save_checkpoint(folder, state, run, fragments, {"torch": torch.get_rng_state()}, 0, 1, lambda: None)
    return str(folder)


@pytest.fixture
def full(tmp_path) -> str:
    """A training checkpoint of all weights."""
    from ascendspeed.models import param_mapping

    return save(
        tmp_path / "full", replace(RUN, lora=LoraConfig()), dict(param_mapping.random_tensors(MODEL, 1))
    )


@pytest.fixture
def saved(start, bases, tmp_path) -> str:
    """A training checkpoint of adapters on a copy of the weights."""
    from ascendspeed.models.lora.adapter import initial_tensors

    shutil.copytree(bases["hf"], tmp_path / "base")
    opened, _ = start(load=str(tmp_path / "base"))
    return save(
        tmp_path / "ckpt", opened.saved_run(RUN), {name: t + 1 for name, t in initial_tensors(MODEL, LORA, 7)}
    )


def test_fresh_adapters_beside_weights(start, bases):
    opened, log = start(load=str(bases["hf"]))
    tensors = dict(opened.tensors)
    assert sum(".lora." in name for name in tensors) == 2 * 3 * 4
    assert sum(".lora." not in name for name in tensors) == 27
    count = targets.parameter_count(MODEL, LORA)
    assert f"adapters of rank 4 on q_proj v_proj down_proj: {count} parameters are trained" in log
    named = opened.saved_run(RUN).lora
    assert (named.lora_base, len(named.lora_base_fingerprint)) == (str(bases["hf"].resolve()), 64)


def test_adapters_belong_to_weights(start, bases, tmp_path):
    with pytest.raises(UserError, match="adapters need base weights; name them by --load"):
        start()
    with pytest.raises(UserError, match="adapters need base weights; name them by --load"):
        start(load=str(tmp_path / "new"), save=str(tmp_path / "new"))
    with pytest.raises(
        UserError, match="--lora-base /x is for a --load that holds adapters; this one holds weights"
    ):
        start({"lora_base": "/x"}, load=str(bases["hf"]))


def test_adapters_of_peft_to_start_from(start, bases, tmp_path):
    reference = oracle.native(MODEL)[0]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), init_lora_weights=False)
    peft.get_peft_model(reference, config).save_pretrained(tmp_path / "peft")
    peft_tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    load = {"lora_load": str(tmp_path / "peft")}
    tensors = dict(start(load, load=str(bases["hf"]))[0].tensors)
    for which in "AB":
        name = f"base_model.model.model.layers.2.self_attn.v_proj.lora_{which}.weight"
        assert torch.equal(
            tensors[f"decoder.layers.2.self_attention.linear_qkv.lora.v_proj_{which}"], peft_tensors[name]
        )
    with pytest.raises(UserError, match=r"q_proj has rank 4, but --lora-rank is 8; give that one"):
        start(load | {"lora_rank": 8}, load=str(bases["hf"]))
    with pytest.raises(UserError, match=r"q_proj has an alpha of 8, but --lora-alpha is 9; give that one"):
        start(load | {"lora_alpha": 9.0}, load=str(bases["hf"]))
    with pytest.raises(UserError, match=r"it lacks model\.layers\.0\.mlp\.gate_proj"):
        start(load | {"lora_target_modules": (*NAMES, "gate_proj")}, load=str(bases["hf"]))
    with pytest.raises(UserError, match=r"has left over model\.layers\.0\.self_attn\.v_proj"):
        start(load | {"lora_target_modules": ("q_proj", "down_proj")}, load=str(bases["hf"]))


def test_adapters_go_on(start, saved, bases, tmp_path):
    """With the weights beneath where they lay, or where they are now; never with others."""
    base = tmp_path / "base"
    opened, log = start(load=saved, save=saved)
    assert opened.state.step == 2
    assert f"base weights of the adapters from {base}" in log
    assert sum(".lora." not in name for name, _ in opened.tensors) == 27
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(
        UserError, match=f"adapters of the weights in {base}, which are not there; name their folder now"
    ):
        start(load=saved)
    opened, _ = start({"lora_base": str(moved)}, load=saved)
    assert opened.saved_run(RUN).lora.lora_base == str(moved)
    with pytest.raises(UserError, match=r"holds adapters of other weights than those in .*/other"):
        start({"lora_base": str(bases["other"])}, load=saved)
    shutil.copytree(
        bases["other"], base
    )  # the likely mistake: another model of the same architecture, under the same name
    with pytest.raises(UserError, match=r"holds adapters of other weights than those in .*/base"):
        start(load=saved)


def test_adapters_that_were_written_for_peft_know_their_weights(start, saved, bases, tmp_path):
    from ascendspeed.conversion.formats.peft import BASE, open_adapter, write

    written = tmp_path / "adapter"
    write(open_adapter(saved), written)
    load = {"lora_load": str(written)}
    _, log = start(load, load=str(bases["bf16"]))
    assert log.endswith(f"adapters from {written}")
    with pytest.raises(
        UserError,
        match=rf"--load .*/other does not hold the weights that {written} was trained on \(.*/base\)",
    ):
        start(load, load=str(bases["other"]))
    (written / BASE).unlink()  # control
    _, log = start(load, load=str(bases["other"]))
    assert "which do not say whether they belong to these weights" in log


def test_exported_adapters_name_weights_whose_modules_have_their_names(saved, tmp_path, capsys):
    """Named llama, the adapters are for the model exported as a Llama, wherever that lies."""

    def exported(name: str, *words: str) -> str | None:
        tool("../lora/export_lora.py", "--from", saved, "--to", tmp_path / name, *words)
        return peft.LoraConfig.from_pretrained(tmp_path / name).base_model_name_or_path

    assert exported("kept") == str(tmp_path / "base")
    assert exported("based", "--names", "llama", "--base", "x/llama") == "x/llama"
    assert "note" not in capsys.readouterr().out
    assert exported("llama", "--names", "llama") is None
    assert "note: adapter_config.json names no weights: --base names those" in capsys.readouterr().out


def test_what_may_change_and_what_not(start, saved, full):
    flags = "--lora-rank 4 --lora-alpha 8 --lora-target-modules q_proj v_proj down_proj"
    for changes, names in (
        ({"lora_rank": 8}, "lora_rank"),
        ({"lora_alpha": 9.0, "lora_rank": 5}, "lora_rank, lora_alpha"),
    ):
        remedy = (
            r"cannot change: give these flags, or merge the adapters \(tools/lora/merge_lora.py\) "
            r"and --load the result"
        )
        for train in ({}, {"finetune": True}):
            with pytest.raises(UserError, match=f"holds adapters of {flags}; {names}.* {remedy}"):
                start(changes, load=saved, **train)
    _, log = start({"lora_dropout": 0.1, "lora_load": "/x"}, load=saved)
    assert "note: lora_dropout was 0.0 when the checkpoint was saved and is 0.1 now" in log
    assert "note: --lora-load /x was the start of the run" in log
    off = dataclasses.asdict(LoraConfig())
    with pytest.raises(
        UserError,
        match=f"continue training them with {flags}, or train all weights, with the adapters merged, "
        "with --finetune",
    ):
        start(off, load=saved)
    with pytest.raises(
        UserError, match="holds all weights of a model: to train adapters on them add --finetune"
    ):
        start(load=full)


def test_finetune(start, saved, full, bases):
    """Adapters on a checkpoint; new adapters on a LoRA checkpoint; all weights with adapters merged."""
    from ascendspeed.models import param_mapping

    opened, _ = start(load=full, finetune=True)
    tensors = dict(opened.tensors)
    assert torch.equal(
        tensors["output_layer.weight"], dict(param_mapping.random_tensors(MODEL, 1))["output_layer.weight"]
    )
    assert opened.saved_run(RUN).lora.lora_base.endswith("full/step_0000002")
    opened, _ = start(load=saved, finetune=True)
    tensors = dict(opened.tensors)
    assert (opened.state.step, opened.resume) == (0, None)
    assert torch.equal(tensors["decoder.layers.0.mlp.linear_fc2.lora.down_proj_B"], torch.ones(128, 4))
    opened, _ = start(dataclasses.asdict(LoraConfig()), load=saved, finetune=True)
    tensors = dict(opened.tensors)
    assert not any(".lora." in name for name in tensors)
    before = load_file(bases["hf"] / "model.safetensors")["model.layers.0.feed_forward.w2.weight"]
    assert not torch.allclose(tensors["decoder.layers.0.mlp.linear_fc2.weight"], before)


ENGINES = [
    pytest.param((), False, id="megatron"),
    pytest.param((), True, id="megatron, and the same at once", marks=pytest.mark.slow),
    pytest.param(
        ("--deepspeed", "--zero-stage", "2", "--bf16"), True, id="deepspeed", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("engine", "at_once"), ENGINES)
def test_from_the_first_step_to_pefts_logits(engine, at_once, bases, tmp_path):
    """A resumed run: adapters in peft and merged adapters give equal logits, other than the base model's."""
    from ascendspeed.data.indexed.megatron_pair import PairWriter

    generator = np.random.default_rng(0)
    with PairWriter(str(tmp_path / "text_document"), np.dtype(np.int32)) as writer:
        writer.add(generator.integers(0, 2048, 8000).astype(np.int32), np.full(100, 80))
        writer.commit({})
    flags = (
        "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --split 100,0,0"
    )
    flags += f" --lora-rank 4 --lora-alpha 8 --lora-dropout 0.1 --lora-target-modules {' '.join(NAMES)}"
    words = ["pretrain_intern.py", "--data-path", tmp_path / "text_document", *flags.split(), *engine]
    checkpoint = tmp_path / "ckpt"
    launch.must(
        *words,
        "--load",
        bases["hf"],
        "--save",
        checkpoint,
        "--log-dir",
        tmp_path / "again",
        "--exit-interval",
        "2",
    )
    assert not (checkpoint / "adapter").exists()
    output = launch.must(*words, "--load", checkpoint, "--save", checkpoint, "--log-dir", tmp_path / "again")
    assert f"adapters for peft in {checkpoint / 'adapter'}" in output
    size = sum(path.stat().st_size for path in (checkpoint / "step_0000004").iterdir())
    assert size < 12 * targets.parameter_count(MODEL, LORA) + 50_000
    if at_once:
        launch.must(
            *words, "--load", bases["hf"], "--save", tmp_path / "whole", "--log-dir", tmp_path / "log"
        )
        curves = [
            [(line.loss, line.grad_norm) for line in read_lines(tmp_path / log / "train.log")]
            for log in ("log", "again")
        ]
        assert curves[0] == curves[1]
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (checkpoint / "adapter" / name).read_bytes() == (
                tmp_path / "whole" / "adapter" / name
            ).read_bytes()
    tool(
        "../lora/merge_lora.py",
        "--base",
        bases["llama"],
        "--adapter",
        checkpoint / "adapter",
        "--save",
        tmp_path / "merged",
    )
    tool("../lora/export_lora.py", "--from", checkpoint, "--to", tmp_path / "exported", "--base", "hub/name")
    tool("convert.py", "--from", checkpoint, "--to", tmp_path / "converted", "--format", "hf-llama")
    tokens = torch.arange(60).view(2, 30)

    def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
        return model.eval()(tokens).logits.detach()

    expected = logits(tmp_path / "merged")
    assert (logits(bases["llama"], checkpoint / "adapter") - expected).abs().max() < 1e-5
    assert (logits(bases["llama"], tmp_path / "exported") - expected).abs().max() < 1e-5
    assert torch.equal(logits(tmp_path / "converted"), expected)
    assert (logits(bases["llama"]) - expected).abs().max() > 1e-2  # control
    settings = peft.LoraConfig.from_pretrained(checkpoint / "adapter")
    assert (settings.base_model_name_or_path, settings.r, settings.task_type) == (
        str(bases["hf"]),
        4,
        "CAUSAL_LM",
    )
