"""Runs a script on the stand-in of an NPU: `npu_worker.py SCRIPT FLAGS...`, or a job of engine_worker.py.

NPU_STANDIN_LOG names a file for the calls of the process; NPU_STANDIN_BREAK takes back a correction of this
project: "sums" (fp64 collectives), "types" (names of tensor types), "norm" (ZeRO-3's gradient norm).
"""

import json
import os
import runpy
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
os.environ.pop("DS_ACCELERATOR", None)  # that of the server, or of the test
sys.path.insert(0, str(HELPERS / "npu"))

if accelerator := sys.modules.get("deepspeed.accelerator.real_accelerator"):
    accelerator.ds_accelerator = None  # chosen anew: torch_npu is there now
for name in [name for name in sys.modules if name.startswith("deepspeed.ops.op_builder.npu")]:
    del sys.modules[name]  # imported without torch_npu

from deepspeed.accelerator.npu_accelerator import NPU_Accelerator  # noqa: E402

from ascendspeed.distributed import device  # noqa: E402

# Tensors of the stand-in say that they are on the CPU, and ZeRO-3 compares.
NPU_Accelerator.current_device_name = lambda self: "cpu"
NPU_Accelerator.on_accelerator = lambda self, tensor: True


def take_back(correction: str) -> None:
    """Removes one of this project's corrections for NPUs, as a control."""
    if correction == "sums":
        device.Device.reduces_fp64 = property(lambda self: True)
    elif correction == "types":
        device._name_types_as_cuda = lambda prefix: None
    elif correction == "norm":
        NPU_Accelerator.is_fp64_supported = property(lambda self: lambda: True, lambda self, value: None)


if __name__ == "__main__":
    take_back(os.environ.get("NPU_STANDIN_BREAK", ""))
    del sys.argv[0]
    if sys.argv[0].endswith(".json"):
        sys.argv.insert(0, str(HELPERS / "engine_worker.py"))
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if os.environ.get("NPU_STANDIN_LOG") and os.environ.get("RANK", "0") == "0":
            import torch_npu

            log = Path(os.environ["NPU_STANDIN_LOG"])
            log.write_text("\n".join(sorted(torch_npu.CALLS)) + "\n")
            log.with_suffix(".json").write_text(json.dumps(torch_npu.CALLS))
