"""The training loop with a stand-in engine: what it asks for, says, keeps and refuses."""

import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.log_lines import log_lines

from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.training.metric_lines import EvalLine, TrainLine, read_lines
from ascendspeed.training.metrics_log import MetricsLogger
from ascendspeed.utils.errors import UserError

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    vocab_size=16,
    max_position_embeddings=8,
)
RUN = Run(
    MODEL,
    ParallelConfig(deepspeed=True),
    OptimConfig(lr=1.0, min_lr=0.0, lr_decay_style="linear"),
    DataConfig(data_path=("x",), seq_length=8),
    TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=10),
)


class Recorder:
    """An engine that only counts: the loss of step i is losses[i], and a skipped step is no update."""

    def __init__(self, losses=None, skipped=(), scale=1.0, loss=float("nan"), bad=(), at=None):
        self.losses, self.skipped, self.scale = losses, set(skipped), scale
        self.loss_skipped, self.bad, self.at = loss, bad, at or {}
        self.updates, self.calls, self.lrs = 0, [], []

    def step(self, batches, lr):
        from ascendspeed.training.engines import StepResult

        number = len(self.calls)
        self.at.get(number, lambda: None)()
        self.calls.append(batches)
        self.lrs.append(lr)
        skipped = number in self.skipped
        self.updates += not skipped
        loss = self.loss_skipped if skipped else self.losses[number] if self.losses else 1.0
        return StepResult(
            loss=loss,
            items=10 * (number + 1),
            grad_norm=0.5,
            skipped=skipped,
            loss_scale=self.scale,
            bad=self.bad,
        )

    def loss(self, batches):
        microbatches = list(batches)
        return 2.0 * len(microbatches), len(microbatches)

    def fragments(self):
        from ascendspeed.checkpoint.fragment import KINDS, Fragment
        from ascendspeed.models.param_mapping import ShardSpec

        for kind in KINDS:
            yield Fragment("w", kind, ShardSpec((4,)), 0, 0, torch.full((4,), float(self.updates)))

    def scalars(self):
        return {"updates": self.updates}

    def restore(self, checkpoint):
        self.updates = checkpoint.state.engine["updates"]

    def rng(self):
        return {"torch": torch.get_rng_state()}


@pytest.fixture
def loop(cpu, tmp_path):
    """Runs the loop; returns the state, the engine and the log's lines; `loop.watch` is what watched."""
    from ascendspeed.checkpoint.fragment import TrainState
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import loop as train
    from ascendspeed.training.fault_tolerance import RunMonitor

    grid = process_groups.initialize(cpu, ParallelConfig(), seed=1)

    def go(run, engine=None, start=None):
        engine = engine or Recorder()
        begin = SimpleNamespace(state=start or TrainState(0, 0, 0), resume=None, saved_run=lambda run: run)
        with MetricsLogger(0, tmp_path / "logs") as log, RunMonitor(run, grid) as go.watch:
            state = train.train(
                run, grid, cpu, engine, lambda split, consumed: [(split, consumed)], log, begin, go.watch
            )
        return state, engine, list(read_lines(tmp_path / "logs" / "train.log"))

    return go


def changed(**train):
    return replace(RUN, train=replace(RUN.train, **train))


def test_every_batch_follows_from_the_consumed_samples(loop):
    state, engine, lines = loop(RUN)
    assert engine.calls == [[("train", 4 * i)] for i in range(10)]
    assert (state.step, state.samples, state.tokens) == (10, 40, 320)
    assert engine.lrs == pytest.approx([1 - i / 10 for i in range(10)])
    assert [line.iteration for line in lines] == list(range(1, 11))
    assert lines[-1].samples == 40
    assert lines[-1].global_batch_size == 4


def test_the_interval_loss_is_the_mean_over_tokens(loop):
    losses = [1.0, 4.0, 2.0, 3.0]
    _, _, lines = loop(changed(log_interval=2, train_iters=4), Recorder(losses))
    assert [line.loss for line in lines] == pytest.approx(
        [(10 * 1 + 20 * 4) / 30, (30 * 2 + 40 * 3) / 70], rel=1e-7
    )


def test_a_pause_is_no_part_of_an_iterations_time(loop, monkeypatch):
    """On a clock that an iteration moves by 100 s and an evaluation by 10,000 s."""
    from ascendspeed.training import loop as train

    real, ahead = time.perf_counter, [0.0]

    def passes(seconds):
        ahead[0] += seconds

    class Slow(Recorder):
        def loss(self, batches):
            passes(10_000)
            return super().loss(batches)

    clock = SimpleNamespace(perf_counter=lambda: real() + ahead[0], strftime=time.strftime)
    monkeypatch.setattr(train, "time", clock)
    run = changed(log_interval=2, eval_interval=1, eval_iters=1, train_iters=6)
    _, _, lines = loop(run, Slow(at=dict.fromkeys(range(6), lambda: passes(100))))
    times = [line.ms_per_iteration for line in lines if isinstance(line, TrainLine)]
    assert times == pytest.approx([100_000] * 3, rel=0.5)


def test_the_last_iterations_are_logged_whatever_the_interval(loop):
    _, _, lines = loop(changed(log_interval=4))
    assert [(line.iteration, line.interval) for line in lines] == [(4, 4), (8, 4), (10, 2)]


def test_fp16_may_look_for_its_loss_scale(loop):
    run = replace(changed(max_skipped_steps=2), optim=replace(RUN.optim, fp16=True))
    state, _, _ = loop(run, Recorder(skipped=[0, 1, 2, 3], scale=2.0**30))
    assert state.step == 10
    with pytest.raises(UserError, match="2 iterations in a row were skipped"):
        loop(run, Recorder(skipped=[0, 1, 2, 3], scale=1.0))


def test_a_finished_run_says_so(loop, capsys):
    from ascendspeed.checkpoint.fragment import TrainState

    _, engine, _ = loop(RUN, start=TrainState(10, 40, 320))
    assert not engine.calls
    assert "nothing to do: iteration 10 of --train-iters 10 is done" in capsys.readouterr().out


def test_a_skipped_step_is_logged_and_does_not_move_the_schedule(loop):
    _, engine, lines = loop(changed(log_interval=5), Recorder(skipped=[2]))
    assert engine.lrs[2] == engine.lrs[3]
    assert (lines[0].skipped, lines[0].nans, lines[0].loss) == (1, 1, 1.0)
    assert (lines[1].skipped, lines[1].nans) == (0, 0)


def test_too_many_skipped_steps_in_a_row_stop_the_run(loop, tmp_path):
    run = changed(max_skipped_steps=3, save=str(tmp_path / "ckpt"), save_interval=2)
    with pytest.raises(
        UserError,
        match=r"3 iterations in a row were skipped \(last: 6\); "
        "the last good checkpoint is .*step_0000004; lower --lr",
    ):
        loop(run, Recorder(skipped=[1, 3, 4, 5]))


def test_evaluation_takes_the_same_batches_every_time(loop):
    _, _, lines = loop(changed(eval_interval=5, eval_iters=3))
    evaluations = [line for line in lines if isinstance(line, EvalLine)]
    assert [(line.iteration, line.loss, line.split) for line in evaluations] == [
        (5, 2.0, "validation"),
        (10, 2.0, "validation"),
    ]


def test_checkpoints_at_intervals_and_at_the_end(loop, tmp_path):
    loop(changed(save=str(tmp_path / "ckpt"), save_interval=4))
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("step_*")) == [
        "step_0000004",
        "step_0000008",
        "step_0000010",
    ]
    assert (tmp_path / "ckpt" / "latest").read_text().strip() == "step_0000010"


def test_keep_leaves_the_newest(loop, tmp_path):
    loop(changed(save=str(tmp_path / "ckpt"), save_interval=2, keep=2))
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("step_*")) == ["step_0000008", "step_0000010"]


def test_exit_interval_saves_and_stops(loop, tmp_path):
    state, _, _ = loop(changed(save=str(tmp_path / "ckpt"), exit_interval=3))
    assert state.step == 3
    assert [p.name for p in (tmp_path / "ckpt").glob("step_*")] == ["step_0000003"]


def ramped(**train):
    return changed(
        global_batch_size=8,
        rampup_batch_size=(2, 2, 20),
        train_samples=50,
        train_iters=9,
        iterations_to_skip=(3,),
        skip_batches="5-6",
        **train,
    )


def test_a_ramp_and_skipped_iterations(loop, capsys):
    """The batch and the learning rate follow from the position; a resumed run has the same."""
    state, engine, lines = loop(ramped(), Recorder(skipped=[1]))
    starts = [0, 2, 4, 6, 8, 12, 16, 22, 30]  # sizes 2 2 2 2 4 4 6 8 8
    assert [call[0][1] for call in engine.calls] == [starts[i] for i in (0, 1, 2, 4, 7, 8)]
    assert (state.step, state.samples, state.skipped_samples) == (9, 38, 2 + 2 + 4 + 6)
    assert engine.lrs == pytest.approx([1 - done / 50 for done in (0, 2, 2, 4, 8, 16)])
    assert [line.global_batch_size for line in lines] == [2, 2, 2, 2, 4, 4, 6, 8, 8]
    assert [line.skipped for line in lines] == [0, 1, 0, 1, 0, 1, 1, 0, 0]
    assert "iteration 4 left out (number 3 of --iterations-to-skip or --skip-batches): samples 6-7" in (
        capsys.readouterr().out
    )
    middle, first, _ = loop(ramped(exit_interval=4), Recorder(skipped=[1]))
    assert middle.step == 4
    later = Recorder()
    later.updates = first.updates
    end, then, _ = loop(ramped(), later, start=middle)
    assert first.calls + then.calls == engine.calls
    assert first.lrs + then.lrs == pytest.approx(engine.lrs)
    assert replace(end, engine={}) == replace(state, engine={})


def test_a_resumed_run_goes_on_where_it_was(loop):
    from ascendspeed.checkpoint.fragment import TrainState

    _, engine, lines = loop(RUN, start=TrainState(7, 28, 224))
    assert engine.calls[0] == [("train", 28)]
    assert [line.iteration for line in lines if isinstance(line, TrainLine)] == [8, 9, 10]


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_iteration_then_saves(loop, tmp_path, number, capsys):
    run = changed(save=str(tmp_path / "ckpt"), save_interval=4, eval_interval=3)
    before = signal.getsignal(number)
    state, _, lines = loop(run, Recorder(at={2: lambda: signal.raise_signal(number)}))
    assert state.step == 3
    assert [p.name for p in (tmp_path / "ckpt").glob("step_*")] == ["step_0000003"]
    assert not any(isinstance(line, EvalLine) for line in lines)  # who sent it may be in a hurry
    assert loop.watch.exit_code == 75
    assert f"{signal.Signals(number).name} to rank 0: stopped after iteration 3" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_a_signal_in_the_last_iteration_changes_nothing(loop):
    state, _, _ = loop(RUN, Recorder(at={9: lambda: signal.raise_signal(signal.SIGTERM)}))
    assert (state.step, loop.watch.exit_code) == (10, 0)


def test_a_second_ctrl_c_ends_at_once(loop):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            loop(RUN, Recorder(at={2: twice}))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_on_the_iteration_of_a_checkpoint_saves_it_once(loop, tmp_path, capsys):
    run = changed(save=str(tmp_path / "ckpt"), save_interval=3)
    loop(run, Recorder(at={2: lambda: signal.raise_signal(signal.SIGTERM)}))
    assert capsys.readouterr().out.count(" saved ") == 1


def test_the_clock(loop, tmp_path):
    run = changed(save=str(tmp_path / "ckpt"), exit_duration_in_mins=60.0)
    assert loop(run)[0].step == 10  # control: an hour is enough
    state, _, _ = loop(changed(exit_duration_in_mins=1e-9))
    assert (state.step, loop.watch.exit_code) == (1, 0)


def test_how_to_continue_is_said_only_when_there_is_something_left(loop, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RECIPE", "bash recipe.sh --lr 1")
    loop(changed(save=str(tmp_path / "a"), exit_interval=3))
    assert (
        "to continue: bash recipe.sh --lr 1 --auto-resume  # with the same variables\n"
        in capsys.readouterr().out
    )
    loop(changed(save=str(tmp_path / "b")))
    loop(changed(exit_interval=3))  # nothing was saved
    assert "to continue" not in capsys.readouterr().out
    with pytest.raises(UserError):
        loop(changed(save=str(tmp_path / "c"), save_interval=1, max_skipped_steps=1), Recorder(skipped=[4]))
    assert "to continue" in capsys.readouterr().out


def test_what_ends_before_training_is_not_told_to_go_on(cpu, tmp_path):
    from ascendspeed.distributed import process_groups
    from ascendspeed.training.fault_tolerance import RunMonitor

    (tmp_path / "step_0000001").mkdir()
    grid = process_groups.initialize(cpu, ParallelConfig(), seed=1)
    for begun in (False, True):  # the second is the control
        watch = RunMonitor(changed(save=str(tmp_path)), grid)
        watch.started = begun
        with log_lines() as lines, pytest.raises(UserError), watch:
            raise UserError("--save already holds checkpoints")
        assert bool(lines) == begun


@pytest.mark.parametrize("behind", [False, True])
def test_a_run_whose_folder_another_run_took_stops_without_a_trace(loop, tmp_path, capsys, behind):
    from ascendspeed.checkpoint.discovery import find_checkpoint
    from ascendspeed.checkpoint.ownership import claim_folder

    run = changed(save=str(tmp_path / "ckpt"), save_interval=2, async_save=behind)

    def taken():
        while not (
            tmp_path / "ckpt" / "latest"
        ).exists():  # behind the step, the second iteration's is still being saved
            time.sleep(0.001)
        claim_folder(tmp_path / "ckpt")

    with pytest.raises(
        UserError,
        match=r"step_0000004 was not saved: .*another run saves in .*ckpt \(process \d+ on .*give every",
    ):
        loop(run, Recorder(at={3: taken}))
    assert [p.name for p in (tmp_path / "ckpt").glob("step_*")] == ["step_0000002"]
    assert (tmp_path / "ckpt" / "latest").read_text() == "step_0000002\n"
    assert "to continue" not in capsys.readouterr().out
    start = find_checkpoint(tmp_path / "ckpt").state  # the restart of a killed run: the newest takes over
    assert loop(run, start=start)[0].step == 10


# --- health


def test_a_skipped_iteration_names_rank_and_samples(loop, capsys):
    run = replace(RUN, train=replace(RUN.train, micro_batch_size=2, train_iters=3))
    loop(run, Recorder(skipped=[1], bad=(1,)))
    assert (
        "iteration 2 skipped, nothing was updated: loss NAN; rank 0: samples 6-7; loss scale 1"
        in capsys.readouterr().out
    )
    loop(run, Recorder(skipped=[1], loss=2.0))
    output = capsys.readouterr().out
    assert "a gradient is not finite, every loss is (2.000000E+00); all ranks: samples 4-7" in output


def test_an_engine_that_updates_on_such_a_loss_is_a_mistake(loop):
    with pytest.raises(RuntimeError, match="iteration 3 was not skipped, though its loss is nan"):
        loop(RUN, Recorder(losses=[1.0, 1.0, float("nan"), 1.0]))


def test_a_spike_rolls_back_and_leaves_its_samples_out(loop, tmp_path, capsys):
    """At most as often as allowed, and in a resumed run too."""
    losses = {number: 2.0 + 0.01 * (number % 3) for number in range(60)} | {21: 9.0, 27: 9.0}
    run = changed(train_iters=30, save=str(tmp_path / "ckpt"), save_interval=5, rollback_on_spike=1)
    state, engine, _ = loop(run, Recorder(losses))
    starts = [call[0][1] // 4 for call in engine.calls]
    assert starts == [*range(22), 20, *range(22, 30)]  # 21 is left out the second time
    assert (state.step, state.samples, state.rollbacks, state.left_out) == (30, 120, 1, (21,))
    assert state.skipped_samples == 4
    assert engine.updates == 29
    output = capsys.readouterr().out
    assert "rollback 1 of 1 to " in output
    assert "step_0000020; iteration 22, samples 84-87, will be left out" in output
    assert "iteration 22 left out (number 21 of --rollback-on-spike): samples 84-87" in output
    assert "--rollback-on-spike: 1 of 1 rollbacks are used up; training goes on" in output
    from ascendspeed.checkpoint.load import Checkpoint

    saved = Checkpoint(tmp_path / "ckpt" / "step_0000025").state
    assert (saved.rollbacks, saved.left_out) == (1, (21,))


def test_a_spike_before_the_first_checkpoint_is_only_reported(loop, tmp_path, capsys):
    losses = [2.0] * 20 + [9.0] + [2.0] * 9
    run = changed(train_iters=30, save=str(tmp_path / "ckpt"), save_interval=25, rollback_on_spike=1)
    state, engine, _ = loop(run, Recorder(losses))
    assert (len(engine.calls), state.rollbacks) == (30, 0)
    assert "--rollback-on-spike: no checkpoint yet; training goes on" in capsys.readouterr().out


def warned(loop, capsys, losses) -> list[str]:
    loop(changed(train_iters=len(losses), log_interval=1000), Recorder(losses=losses))
    return [line for line in capsys.readouterr().out.splitlines() if "spike" in line]


def test_a_spike_is_warned_of_once(loop, capsys):
    """By hand: median of ten 2.0, ten 2.1, ten 1.9 is 2.0, median absolute deviation 0.1, sigma 0.14826."""
    calm = [2.0, 2.1, 1.9] * 10
    warnings = warned(loop, capsys, [*calm, 3.3, 3.4, 2.0, 2.1])
    assert len(warnings) == 1
    assert (
        "warning: iteration 31: the loss 3.3000 is a spike, 9 deviations above the median 2.0000 of the last "
        "30" in warnings[0]
    )
    assert warnings[0].endswith("samples 120-123")
    assert len(warned(loop, capsys, [*calm, 3.3, 2.0, 3.3])) == 2


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 2.1, 1.9] * 10 + [3.1],  # 7.4 deviations
        [2.0, 2.1, 1.9] * 10 + [0.1],  # down is good
        [9.0 - 0.1 * i for i in range(60)],  # a curve that falls
        [2.0] * 40 + [2.1] * 40,  # flat, and a ripple of 5 %
        [2.0, 2.1, 1.9] * 4 + [9.0],  # too early to tell
    ],
)
def test_what_is_no_spike(loop, capsys, losses):
    assert warned(loop, capsys, losses) == []
