"""Needle in a haystack: what a model finds in long texts; under the launcher with --tp x --pp processes, or alone.

python tasks/evaluation/needle.py --load model_from_hf/internlm2-chat-7b --bf16 --chat --lengths 32768 65536 131072 200000
"""

import sys

from ascendspeed.cli.train_args import world_size
from ascendspeed.evaluation.needle import resolve
from ascendspeed.utils import errors


def main() -> None:
    """Parse -> device -> model -> answers -> report."""
    job, notes = resolve(sys.argv[1:], world_size())

    from ascendspeed.distributed import device as devices

    device = devices.prepare(job.place.where.device, job.place.where.distributed_backend)

    # From here on torch.cuda means the device, so Megatron-core may be imported.
    from ascendspeed.distributed import process_groups
    from ascendspeed.evaluation import needle

    needle.run(job, device, notes)
    process_groups.destroy()


if __name__ == "__main__":
    errors.run(main, clean_up=True)
