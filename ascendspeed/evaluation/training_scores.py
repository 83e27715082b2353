"""Scores of a model on benchmarks while it is trained (--eval-tasks)."""

import importlib.util
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendspeed.config.schema import ParallelConfig, Run, TrainConfig
from ascendspeed.evaluation.args import EvaluationArgs, EvaluationJob, build_job
from ascendspeed.evaluation.harness_index import CODE_TASKS
from ascendspeed.inference.args import EngineArgs, EngineSpec
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    from ascendspeed.distributed.device import Device
    from ascendspeed.distributed.process_groups import ProcessGrid
    from ascendspeed.training.engines import Engine
    from ascendspeed.training.metric_lines import ScoreLine

logger = logging.getLogger(__name__)


def resolve(run: Run) -> EvaluationJob:
    """Reads the questions of --eval-tasks. Raises UserError, with the names of its flags."""
    train, optim = run.train, run.optim
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--eval-tasks needs a package: pip install lm_eval")
    for name in set(CODE_TASKS) & {word for words in train.eval_tasks for word in words.lower().split()}:
        raise UserError(
            f"--eval-tasks {name} would execute the answers of the model, which training does not"
        )
    parallel = run.parallel
    engine = EngineArgs(
        load=train.load,
        tokenizer_name_or_path=run.data.tokenizer_name_or_path,
        bf16=optim.bf16,
        fp16=optim.fp16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        cpu_linear=train.cpu_linear,
    )
    spec = EngineSpec(engine, run.model, None, str(run.data.tokenizer_name_or_path))
    tasks = EvaluationArgs(
        task=train.eval_tasks, task_data_path=train.eval_tasks_data_path, limit=train.eval_tasks_limit
    )
    try:
        return build_job(tasks, lambda: spec)
    except UserError as error:
        raise UserError(str(error).replace("--task", "--eval-tasks")) from None


class TrainingScores:
    """Scores the live weights with a model of inference that exists as long as it is needed.

    It is the model of the evaluation command, with a copy of this rank's weights: packing, sequence-parallel
    layers and recomputation of the training's own model do not matter to it, and it changes nothing there.
    """

    def __init__(self, run: Run, job: EvaluationJob, grid: "ProcessGrid", device: "Device") -> None:
        """Loads tokenizer and tasks. Raises UserError."""
        from ascendspeed.distributed import fused_kernels
        from ascendspeed.distributed.cpu_products import Products
        from ascendspeed.evaluation import runner
        from ascendspeed.inference.session import generation_stop_ids
        from ascendspeed.tokenization import tokenizer

        self._run, self._job, self._grid, self._device = run, job, grid, device
        self._tokenizer = tokenizer.load(job.spec.tokenizer)
        runner.check_vocabulary(self._tokenizer, run.model)
        self._max_length = runner.input_length(job, run.model)
        self._harness = runner.load_harness_tasks(job)
        of_model = generation_stop_ids(
            self._tokenizer, run.model.family, run.data.chat_template, {Path(job.spec.tokenizer)}
        )
        self._stop_ids = runner.stop_ids_of(job, self._tokenizer, of_model)
        train = run.train
        self._layout = _layout_of(run.parallel)
        products = Products.of_inference(train.cpu_linear, run.optim.dtype, run.model, self._layout)
        self._kernels = fused_kernels.select_kernels(
            device,
            rms_norm=train.use_fused_rmsnorm,
            rotary=train.use_fused_rotary_pos_emb,
            swiglu=train.mlp_layer_fusion,
            products=products,
        )

    def __call__(self, engine: "Engine", step: int) -> "list[ScoreLine]":
        """Answers all questions with the weights of `engine` after iteration `step`. Collective."""
        from ascendspeed.distributed.process_groups import rng_states, set_rng_states
        from ascendspeed.evaluation import runner
        from ascendspeed.evaluation.answer_cache import AnswerCache

        began, states = time.perf_counter(), rng_states()
        model = self._copy(engine)
        backend = runner.EngineBackend(
            model, self._tokenizer, self._job.evaluation.batch_size, self._stop_ids
        )
        answers = AnswerCache(None, {})
        grades, results = runner.answer(self._job, backend, answers, self._max_length, self._harness)
        scores = [*runner.score_own_tasks(self._job, grades), *(result.score for result in results)]
        model.free_cache()
        set_rng_states(states)
        logger.info(f" scored {len(answers.records)} answers in {time.perf_counter() - began:.1f} s")
        return [_line(score, step) for score in scores]

    def _copy(self, engine: "Engine") -> Any:
        """Model of inference with the weights of `engine`."""
        import torch

        from ascendspeed.inference.engine.language_model import LanguageModel
        from ascendspeed.models.gpt import gpt_model
        from ascendspeed.models.gpt.layer_spec import transformer_config

        model = self._run.model
        settings = transformer_config(
            model, self._layout, TrainConfig(), self._run.optim.dtype, self._kernels
        )
        gpt = gpt_model.build_model(model, self._layout, settings).to(self._device.torch)
        targets = gpt_model.named_parameters(gpt)
        with torch.no_grad():
            for name, weight in engine.weights():
                targets.pop(name).copy_(weight)
        assert not targets, f"no weights for {sorted(targets)}"
        return LanguageModel(gpt, model, self._grid, self._device)


def _layout_of(parallel: ParallelConfig) -> ParallelConfig:
    """Layout of evaluation with the tensor- and pipeline-parallel shards of a training layout."""
    return ParallelConfig(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        decoder_first_pipeline_num_layers=parallel.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=parallel.decoder_last_pipeline_num_layers,
        make_vocab_size_divisible_by=parallel.make_vocab_size_divisible_by,
    )


def _line(score: Any, step: int) -> "ScoreLine":
    from ascendspeed.training.metric_lines import ScoreLine

    means = score.groups["all"]
    name = score.benchmark.name.replace(" ", "_")
    return ScoreLine(step, name, score.metric.replace(" ", "_"), means["micro"], means["questions"])
