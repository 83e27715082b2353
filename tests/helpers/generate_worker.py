"""One rank of a generation test: samples, scores and log-probabilities of every case; rank 0 writes them.

A case: {"model": ModelConfig, "weights": safetensors, "tp": n, "pp": n, "prompts": [[id]], "params": {name: Params},
"requests": [[context, continuation]]}.
"""

import json
import sys
from pathlib import Path

from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.distributed import device


def main() -> None:
    """Runs the cases; every rank must have the same results."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare("cpu")

    from safetensors.torch import load_file

    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models.gpt import gpt_model, layer_spec
    from helpers.engine_worker import leave_groups

    found = {}
    for name, case in job["cases"].items():
        print(name, flush=True)  # the last one in the log of a rank that failed
        layout = ParallelConfig(
            tensor_model_parallel_size=case["tp"], pipeline_model_parallel_size=case["pp"]
        )
        leave_groups()
        grid, model = process_groups.initialize(here, layout, seed=1), ModelConfig(**case["model"])
        built = gpt_model.build_model(
            model, layout, layer_spec.transformer_config(model, layout, TrainConfig())
        )
        gpt_model.load_weights(built, model, layout, load_file(case["weights"]).items())
        found[name] = answers(LanguageModel(built, model, grid, here), case)
        assert all(theirs == found[name] for theirs in grid.all_gather_object(found[name])), (
            f"{name}: the ranks differ"
        )
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(found))
    process_groups.destroy()


def answers(asked, case):
    """Everything that the case asks of a model, as JSON holds it."""
    from ascendspeed.inference.engine import SamplingParams, sample, score_continuations, token_logprobs

    texts = {
        name: [
            [[one.tokens, one.reason, one.score] for one in each]
            for each in sample(asked, case["prompts"], SamplingParams(**params))
        ]
        for name, params in case["params"].items()
    }
    scores = [
        [one.logprob, one.is_greedy, one.token_count]
        for one in score_continuations(asked, case["requests"], 3)
    ]
    return {
        "texts": texts,
        "scores": scores,
        "logprobs": [each.tolist() for each in token_logprobs(asked, case["prompts"], 2)],
    }


if __name__ == "__main__":
    main()
