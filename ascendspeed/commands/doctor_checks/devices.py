"""Checks devices and drivers, and torch in another process: `import torch` may fail or hang."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascendspeed.commands.doctor_checks.check import Check

PROBE = """
import json
import torch

found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "devices": []}
kinds = [("cuda", torch.cuda)] + ([("npu", torch.npu)] if hasattr(torch, "npu") else [])
for kind, module in kinds:
    if module.is_available():
        for i in range(module.device_count()):
            properties = module.get_device_properties(i)
            found["devices"].append([kind, properties.name, properties.total_memory])
found["cuda"] = torch.version.cuda
if torch.cuda.is_available() and torch.distributed.is_nccl_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""
SECONDS = 120
"""Time in which torch has to answer."""
CANN = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
SOURCE_CANN = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def check_devices() -> Iterator[Check]:
    """Yields the drivers, torch, and the devices that torch sees."""
    driver = nvidia_driver()
    if driver:
        yield Check("NVIDIA driver", "ok", driver)
    chips = len(list(Path("/dev").glob("davinci[0-9]*")))
    if chips:
        yield from _check_cann(chips)
    found, failure = probe()
    if found is None:
        remedy = SOURCE_CANN if chips else "pip install --force-reinstall -r requirements.txt"
        yield Check("import torch", "error", failure, remedy)
        return
    yield from describe(found, bool(driver), chips)


def describe(found: dict[str, Any], has_driver: bool, chips: int) -> Iterator[Check]:
    """Yields checks of what torch sees, beside what the machine has."""
    yield Check(
        "torch", "ok", f"{found['torch']}, CUDA {found['cuda'] or 'none'}, {found['threads']} threads"
    )
    if "nccl" in found:
        yield Check("NCCL", "ok", found["nccl"])
    kinds = {kind for kind, _, _ in found["devices"]}
    for kind, name, memory in found["devices"]:
        yield Check("device", "ok", f"{kind}: {name}, {memory / 2**30:.0f} GiB")
    if has_driver and "cuda" not in kinds:
        reason = (
            "this torch has no CUDA" if not found["cuda"] else "torch cannot use it; is the driver too old?"
        )
        yield Check("GPU", "error", f"a driver, but no usable GPU: {reason}", "pip install 'torch>=2.13,<3'")
    if chips and "npu" not in kinds:
        yield Check(
            "NPU", "error", f"{chips} chips, but torch sees none", "pip install -r requirements-npu.txt"
        )
    if not kinds:
        yield Check("device", "info", "the CPU only")


def probe() -> tuple[dict[str, Any] | None, str]:
    """Returns what torch sees, or None and the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        return json.loads(done.stdout.splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer in {SECONDS} s"
    except (ValueError, IndexError, OSError):
        lines = done.stderr.strip().splitlines()
        return None, lines[-1][:200] if lines else f"exit code {done.returncode}"


def nvidia_driver() -> str:
    """Version of the NVIDIA driver; empty if there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        return str(version)
    except Exception:  # the package or the library of the driver is missing
        pass
    if not shutil.which("nvidia-smi"):
        return ""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _check_cann(chips: int) -> Iterator[Check]:
    """Yields the version of CANN, and whether its environment is set."""
    home = os.environ.get("ASCEND_HOME_PATH")
    folder = next((Path(path) for path in (home, *CANN) if path and Path(path).is_dir()), None)
    if folder is None:
        yield Check("CANN", "error", f"{chips} NPUs, but no CANN", "install the CANN toolkit of your driver")
        return
    lines = [path.read_text(errors="replace") for path in sorted(folder.glob("*version*")) if path.is_file()]
    version = next((line for text in lines for line in text.splitlines() if "ersion" in line), "unknown")
    yield Check("CANN", "ok" if home else "error", f"{folder}: {version}", "" if home else SOURCE_CANN)
