"""Start of a run: `--load` and `--save` together, and the checks of data and tokenizer."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.log_lines import log_lines
from helpers.start import MODEL, RUN

from ascendspeed.config.schema import OptimConfig, ParallelConfig
from ascendspeed.utils.errors import UserError


def changed(**train):
    return replace(RUN, train=replace(RUN.train, **train))


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoint of step 2 of another run."""
    from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.models import param_mapping

    fragments = [
        Fragment(name, kind, param_mapping.ShardSpec(tuple(t.shape)), 0, 0, t.flatten())
        for name, t in param_mapping.random_tensors(MODEL, 1)
        for kind in KINDS
    ]
    state = TrainState(2, 8, 64, {"updates": 2})
    save_checkpoint(
        tmp_path / "ckpt", state, RUN, fragments, {"torch": torch.get_rng_state()}, 0, 1, lambda: None
    )
    return str(tmp_path / "ckpt")


@pytest.fixture
def start(cpu):
    """Returns the result of `find_start` and its log."""
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import setup

    grid = process_groups.initialize(cpu, ParallelConfig(), seed=1)

    def go(run):
        with log_lines() as lines:
            begin = setup.find_start(run, grid, cpu)
        return begin, "\n".join(lines)

    return go


def test_without_load_the_weights_are_random(start):
    opened, log = start(RUN)
    assert opened.resume is None
    assert "random weights, seed 1234" in log


def test_load_equal_to_save_and_empty_is_an_announced_fresh_start(start, tmp_path):
    opened, log = start(changed(load=str(tmp_path / "ckpt"), save=str(tmp_path / "ckpt")))
    assert opened.resume is None
    assert "is empty: a fresh start from random weights" in log


def test_load_of_nothing_is_an_error(start, tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        start(changed(load=str(tmp_path / "none"), save=str(tmp_path / "ckpt")))
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"holds no checkpoint: .*found notes\.txt"):
        start(changed(load=str(tmp_path / "stuff")))


def test_a_run_is_resumed_never_overwritten(start, saved, tmp_path):
    with pytest.raises(UserError, match="already holds checkpoints: continue them with --load"):
        start(changed(save=saved))
    opened, log = start(
        changed(save=f"{saved}/../ckpt/", load=saved, seed=9)
    )  # another spelling of the same folder
    assert opened.tensors is None
    assert opened.state.step == 2
    assert "resumes from" in log
    assert "seed was 1234 when the checkpoint was saved and is 9 now" in log


def test_every_setting_that_changes_the_curve_is_announced(start, saved):
    run = replace(
        changed(load=saved, hidden_dropout=0.1), optim=OptimConfig(adam_beta2=0.99, lr_warmup_iters=3)
    )
    _, log = start(run)
    for name in ("hidden_dropout", "adam_beta2", "lr_warmup_iters"):
        assert f"note: {name} was " in log
    assert "note: lr was" not in log


def test_finetune_takes_the_weights_only_and_never_into_the_same_folder(start, saved, tmp_path):
    opened, log = start(changed(save=str(tmp_path / "other"), load=saved, finetune=True))
    assert opened.state.step == 0
    assert "start anew (--finetune)" in log
    with pytest.raises(UserError, match="continue that run with --auto-resume, or choose another folder"):
        start(changed(save=saved, load=saved, finetune=True))


def test_weights_where_checkpoints_shall_go_are_loaded_not_passed_over(start, tmp_path):
    """--load equal to --save is a fresh start only when the folder is empty."""
    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
    from ascendspeed.models import param_mapping

    source = CheckpointReader(
        "random",
        tmp_path,
        MODEL,
        {},
        {p.name: torch.float32 for p in param_mapping.parameters(MODEL)},
        from_factory(dict(param_mapping.random_tensors(MODEL, 5)).__getitem__),
        None,
    )
    convert.write_hf(source, tmp_path / "both")
    opened, log = start(changed(load=str(tmp_path / "both"), save=str(tmp_path / "both")))
    assert "weights from" in log
    assert "random weights" not in log
    name, tensor = next(iter(opened.tensors))
    assert torch.equal(tensor, dict(param_mapping.random_tensors(MODEL, 5))[name])
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="holds no checkpoint"):
        start(changed(load=str(tmp_path / "stray"), save=str(tmp_path / "stray")))


def test_a_disk_that_is_too_small_is_known_before_step_0(start, tmp_path, monkeypatch):
    """internlm-tiny by hand: 4 layers of 201,472 parameters, 2 x 2048 x 128 and a norm.

    12 bytes each, and 64 MiB that must stay free.
    """
    required = (4 * 201_472 + 2 * 2048 * 128 + 128) * 12 + (64 << 20)
    paths = []

    def disk(free):
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path: (paths.append(str(path)), shutil._ntuple_diskusage(2**40, 0, free))[1],
        )

    run = changed(save=str(tmp_path / "not" / "yet"))
    disk(required - 1)
    words = (
        rf"a checkpoint takes 0.01 GiB, and 0.08 GiB are free in {tmp_path}/not/yet, "
        "of which 64 MiB must stay free; free some space or choose another --save"
    )
    with pytest.raises(UserError, match=words):
        start(run)
    assert set(paths) == {str(tmp_path)}  # the nearest folder that is there
    disk(required)
    assert "not enough" not in start(run)[1]  # one checkpoint, at the end
    _, log = start(changed(save=str(tmp_path), save_interval=5))
    assert "which is not enough for the 2 that the run keeps at a time; see --keep and --save-interval" in log
    _, log = start(changed(save=str(tmp_path), save_interval=1, keep=1))
    assert "the 2 that the run keeps" in log  # the new one, and the old one until then
    disk(0)
    start(RUN)  # nothing is saved


def test_a_save_that_cannot_be_is_known_before_step_0(start, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--save .*file: rank 0 cannot save there: File exists; choose another --save"
    ):
        start(changed(save=str(tmp_path / "file")))
    start(changed(save=str(tmp_path / "new")))
    assert list((tmp_path / "new").iterdir()) == []  # the trial is gone


class Two:
    """A grid of two ranks, of which this one is rank 1; rank 0 says the `others`, one after the other."""

    rank, world = 1, 2

    def __init__(self, *others):
        self.others = list(others)

    def all_gather_object(self, local):
        return [self.others.pop(0), local]


def test_storage_that_is_not_shared_is_known_before_step_0(cpu, tmp_path):
    from ascendspeed.training import save_dir

    (tmp_path / ".try_shared").touch()
    save_dir.check_writable(tmp_path, Two(".try_shared", ""))  # the control
    with pytest.raises(
        UserError,
        match=r"rank 1 cannot save there: it does not see a file that rank 0 made; use storage that all",
    ):
        save_dir.check_writable(tmp_path, Two(".try_elsewhere", ""))
    with pytest.raises(UserError, match="rank 0 cannot save there: No space left"):
        save_dir.check_writable(tmp_path, Two(None, "No space left"))


def test_ranks_that_would_begin_at_different_places_are_told(cpu, saved, tmp_path):
    from ascendspeed.training import save_dir

    run = changed(load=saved, save=saved)
    save_dir.check_same_view(run, Two((saved, False, {"load": True, "save": True})))  # the control
    for theirs in (
        (None, False, {"load": False, "save": False}),
        (saved, True, {"load": True, "save": True}),
    ):
        with pytest.raises(
            UserError, match=r"the ranks do not see the same files there: rank 0: --load .*; rank 1: --load"
        ):
            save_dir.check_same_view(run, Two(theirs))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_killed_first_save_leaves_is_no_reason_not_to_start(start, tmp_path, monkeypatch, stride):
    """At operations that change files; and what a new file system holds by itself."""
    from helpers.checkpoints import die_at, in_child

    from ascendspeed.checkpoint.fragment import KINDS, Fragment, TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.models.param_mapping import ShardSpec

    small = replace(MODEL, num_layers=1)
    fragments = [Fragment("w", kind, ShardSpec((4,)), 0, 0, torch.ones(4)) for kind in KINDS]
    ends, status = set(), 1
    for count in range(0, 100, stride):
        folder = tmp_path / str(count)
        run = replace(changed(load=str(folder), save=str(folder)), model=small)

        def killed(folder=folder, count=count, run=run):
            die_at(count, monkeypatch)
            save_checkpoint(folder, TrainState(2, 8, 64, {}), run, fragments, {}, 0, 1, lambda: None)

        status = in_child(killed)
        opened, log = start(run)
        ends.add(opened.state.step)
        assert ("a fresh start" in log) == (opened.resume is None)
        if status == 0:
            break
    assert status == 0
    assert ends == {0, 2}
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    for left in (".latest.tmp", ".owner"):
        (tmp_path / "disk" / left).touch()
    assert "a fresh start" in start(changed(load=str(tmp_path / "disk"), save=str(tmp_path / "disk")))[1]
    (tmp_path / "disk" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        start(changed(load=str(tmp_path / "disk"), save=str(tmp_path / "disk")))


def test_another_model_in_the_checkpoint_is_an_error(start, saved):
    run = replace(changed(load=saved), model=replace(MODEL, num_layers=5))
    with pytest.raises(UserError, match="holds another model than this run"):
        start(run)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small pair made with a tokenizer of 600 pieces, and two tokenizers."""
    from helpers.corpus import sentencepiece_dir

    from ascendspeed.data.preprocess import EncoderConfig, preprocess

    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    tokenizers = {size: sentencepiece_dir(folder / str(size), size) for size in (500, 600)}
    preprocess(
        [folder / "text.txt"],
        str(folder / "p"),
        EncoderConfig(str(tokenizers[600]), "GeneralPretrainHandler"),
    )
    return str(folder / "p_text_document"), tokenizers


def test_a_tokenizer_that_is_not_the_datas_is_an_error(cpu, data):
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import data_setup

    prefix, tokenizers = data
    grid = process_groups.initialize(cpu, ParallelConfig(), seed=1)

    def with_tokenizer(size, vocab=2048):
        given = replace(RUN.data, data_path=(prefix,), tokenizer_name_or_path=str(tokenizers[size]))
        return data_setup.open_data(replace(RUN, data=given, model=replace(MODEL, vocab_size=vocab)), grid)

    with log_lines() as lines:
        run, batches = with_tokenizer(600)
    assert batches("train", 0)
    assert "train data: " in lines[0]
    assert run.train == RUN.train
    with pytest.raises(
        UserError, match=r"was made with a tokenizer of 600 ids, but --tokenizer-name-or-path .* has 500"
    ):
        with_tokenizer(500)
    with pytest.raises(UserError, match="has 600 ids, but the model's vocabulary 550"):
        with_tokenizer(600, 550)


def test_epochs_are_iterations(cpu, data):
    from ascendspeed.data import dataset
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import data_setup

    grid, given = (
        process_groups.initialize(cpu, ParallelConfig(), seed=1),
        replace(RUN.data, data_path=(data[0],)),
    )
    run = replace(
        RUN, data=given, model=replace(MODEL, vocab_size=2048), train=replace(RUN.train, train_epochs=2.5)
    )
    samples = len(dataset.build_splits(given, run.train.seed, 2048, ["train"])["train"])
    with log_lines() as lines:
        resolved, _ = data_setup.open_data(run, grid)
    assert resolved.train.train_iters == -(
        -samples * 5 // (2 * 4)
    )  # 4 samples an iteration; the last one is whole
    assert resolved.train.train_iters * 4 >= 2.5 * samples > (resolved.train.train_iters - 1) * 4
    assert lines[0] == f"--train-epochs 2.5: {resolved.train.train_iters} iterations"
    with pytest.raises(UserError, match="must be below --train-iters"):
        data_setup.open_data(replace(run, optim=replace(run.optim, lr_warmup_iters=10**6)), grid)
