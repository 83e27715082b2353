"""Generates text with InternLM, or talks with it; under the launcher with --tp x --pp processes, or alone.

python tasks/inference/generate.py --load model_from_hf/internlm2-7b --bf16 --prompt "The capital of France is"
python tasks/inference/generate.py --load model_from_hf/internlm2-chat-7b --bf16 --task chat
"""

import sys

from ascendspeed.cli.train_args import world_size
from ascendspeed.inference.args import resolve
from ascendspeed.utils import errors


def main() -> None:
    """Parse -> device -> model -> answers."""
    job, notes = resolve(sys.argv[1:], world_size())

    from ascendspeed.distributed import device as devices

    device = devices.prepare(job.place.where.device, job.place.where.distributed_backend)

    # From here on torch.cuda means the device, so Megatron-core may be imported.
    from ascendspeed.distributed import process_groups
    from ascendspeed.inference import runner

    runner.run(job, device, notes)
    process_groups.destroy()


if __name__ == "__main__":
    errors.run(main)
