"""The training loop with a stand-in engine: what it asks for, says, keeps and refuses."""

from dataclasses import replace

import pytest
import torch

from ascendspeed.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.errors import UserError
from ascendspeed.log import EvalLine, Logger, TrainLine, read

MODEL = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=16, max_position_embeddings=8)
RUN = Run(
    MODEL,
    ParallelConfig(deepspeed=True),
    OptimConfig(lr=1.0, min_lr=0.0, lr_decay_style="linear"),
    DataConfig(data_path=("x",), seq_length=8),
    TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=10),
)


class Recorder:
    """An engine that only counts: the loss of step i is losses[i], and a skipped step is no update."""

    def __init__(self, losses=None, skipped=(), scale=1.0):
        self.losses, self.skipped, self.scale = losses, set(skipped), scale
        self.updates, self.calls, self.lrs = 0, [], []

    def step(self, batches, lr):
        from ascendspeed.engines import StepResult

        number = len(self.calls)
        self.calls.append(batches)
        self.lrs.append(lr)
        skipped = number in self.skipped
        self.updates += not skipped
        loss = float("nan") if skipped else self.losses[number] if self.losses else 1.0
        return StepResult(loss=loss, tokens=10 * (number + 1), grad_norm=0.5, skipped=skipped, loss_scale=self.scale)

    def loss(self, batches):
        found = list(batches)
        return 2.0 * len(found), len(found)

    def fragments(self):
        from ascendspeed.checkpoint import KINDS, Fragment
        from ascendspeed.weights import Cut

        for kind in KINDS:
            yield Fragment("w", kind, Cut((4,)), 0, 0, torch.full((4,), float(self.updates)))

    def scalars(self):
        return {"updates": self.updates}

    def rng(self):
        return {"torch": torch.get_rng_state()}


@pytest.fixture
def loop(cpu, tmp_path):
    """Runs the loop; returns the state, the engine and the log's lines."""
    from ascendspeed import parallel, train
    from ascendspeed.checkpoint import TrainState

    grid = parallel.initialize(cpu, ParallelConfig(), seed=1)

    def go(run, engine=None, start=None):
        engine = engine or Recorder()
        with Logger(0, tmp_path / "logs") as log:
            state = train.train(
                run, grid, cpu, engine, lambda split, consumed: [(split, consumed)], log, start or TrainState(0, 0, 0)
            )
        return state, engine, list(read(tmp_path / "logs" / "train.log"))

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
    assert [line.loss for line in lines] == pytest.approx([(10 * 1 + 20 * 4) / 30, (30 * 2 + 40 * 3) / 70], rel=1e-7)


def test_the_last_iterations_are_logged_whatever_the_interval(loop):
    _, _, lines = loop(changed(log_interval=4))
    assert [line.iteration for line in lines] == [4, 8, 10]


def test_fp16_may_look_for_its_loss_scale(loop):
    run = replace(changed(max_skipped_steps=2), optim=replace(RUN.optim, fp16=True))
    state, _, _ = loop(run, Recorder(skipped=[0, 1, 2, 3], scale=2.0**30))
    assert state.step == 10
    with pytest.raises(UserError, match="2 iterations in a row were skipped"):
        loop(run, Recorder(skipped=[0, 1, 2, 3], scale=1.0))


def test_a_finished_run_says_so(loop, capsys):
    from ascendspeed.checkpoint import TrainState

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
        UserError, match=r"3 iterations in a row were skipped \(last: 6\); the last checkpoint is that of iteration 4"
    ):
        loop(run, Recorder(skipped=[1, 3, 4, 5]))


def test_evaluation_takes_the_same_batches_every_time(loop):
    _, _, lines = loop(changed(eval_interval=5, eval_iters=3))
    found = [line for line in lines if isinstance(line, EvalLine)]
    assert [(line.iteration, line.loss, line.split) for line in found] == [(5, 2.0, "validation"), (10, 2.0, "validation")]


def test_checkpoints_at_intervals_and_at_the_end(loop, tmp_path):
    loop(changed(save=str(tmp_path / "ckpt"), save_interval=4))
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("step_*")) == ["step_0000004", "step_0000008", "step_0000010"]
    assert (tmp_path / "ckpt" / "latest").read_text().strip() == "step_0000010"


def test_keep_leaves_the_newest(loop, tmp_path):
    loop(changed(save=str(tmp_path / "ckpt"), save_interval=2, keep=2))
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("step_*")) == ["step_0000008", "step_0000010"]


def test_exit_interval_saves_and_stops(loop, tmp_path):
    state, _, _ = loop(changed(save=str(tmp_path / "ckpt"), exit_interval=3))
    assert state.step == 3
    assert [p.name for p in (tmp_path / "ckpt").glob("step_*")] == ["step_0000003"]


def test_a_resumed_run_goes_on_where_it_was(loop):
    from ascendspeed.checkpoint import TrainState

    _, engine, lines = loop(RUN, start=TrainState(7, 28, 224))
    assert engine.calls[0] == [("train", 28)]
    assert [line.iteration for line in lines if isinstance(line, TrainLine)] == [8, 9, 10]
