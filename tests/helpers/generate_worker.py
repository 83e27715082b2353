"""One rank of a generation test: computes samples, scores and log-probabilities; rank 0 writes them.

A case: {"model": ModelConfig, "weights": safetensors, "tp": n, "pp": n, "prompts": [[id]], "params": {name:
SamplingParams}, "requests": [[context, continuation]], "packed": oneDNN computes with packed weights of every
size, "quantize": weights in int8, "kv_cache_dtype": that of the cache}.
"""

import json
import sys
from pathlib import Path

from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.distributed import device


def main() -> None:
    """Runs the cases and checks that every rank has the same results."""
    job = json.loads(Path(sys.argv[1]).read_text())
    cpu = device.prepare("cpu")

    from safetensors.torch import load_file

    from ascendspeed.distributed import onednn, process_groups
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models.gpt import gpt_model, layer_spec
    from helpers.engine_worker import leave_groups

    results = {}
    for name, case in job["cases"].items():
        print(name, flush=True)  # the last one in the log of a rank that failed
        layout = ParallelConfig(
            tensor_model_parallel_size=case["tp"], pipeline_model_parallel_size=case["pp"]
        )
        leave_groups()
        grid, model = process_groups.initialize(cpu, layout, seed=1), ModelConfig(**case["model"])
        kernels = Kernels()
        if case.get("packed"):
            onednn.MIN_PACKED_ELEMENTS = 1
            kernels = Kernels(linear=onednn.linear, pack_weight=onednn.pack)
        settings = layer_spec.transformer_config(model, layout, TrainConfig(), kernels=kernels)
        built = gpt_model.build_model(model, layout, settings)
        writer = {"write": gpt_model.quantizing_writer(8, built)} if case.get("quantize") else {}
        gpt_model.load_weights(built, model, layout, load_file(case["weights"]).items(), **writer)
        lm = LanguageModel(built, model, grid, cpu, case.get("kv_cache_dtype", "auto"))
        results[name] = run_case(lm, case)
        if case.get("packed"):
            assert built.decoder.layers[0].mlp.linear_fc1.weight.is_mkldnn
        assert all(other == results[name] for other in grid.all_gather_object(results[name])), (
            f"{name}: the ranks differ"
        )
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(results))
    process_groups.destroy()


def run_case(model, case):
    """Returns the results of a case in the form that JSON keeps."""
    from ascendspeed.inference.engine import SamplingParams, sample, score_continuations, token_logprobs

    texts = {
        name: [
            [[item.tokens, item.reason, item.score] for item in group]
            for group in sample(model, case["prompts"], SamplingParams(**params))
        ]
        for name, params in case["params"].items()
    }
    scores = [
        [item.logprob, item.is_greedy, item.token_count]
        for item in score_continuations(model, case["requests"], 7)  # long segments are cut
    ]
    return {
        "texts": texts,
        "scores": scores,
        "logprobs": [values.tolist() for values in token_logprobs(model, case["prompts"], 2)],
    }


if __name__ == "__main__":
    main()
