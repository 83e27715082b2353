#!/usr/bin/env bash
# Checks the software of an Ascend NPU machine, then checks and measures this project on one NPU, as gpu_first_run.py does on a GPU:
#
#   bash benchmarks/npu_first_run.sh npu-first-run           folder of the report
#   bash benchmarks/npu_first_run.sh dry-run --dry           the same on a CPU with toy sizes
#
# First: source /usr/local/Ascend/ascend-toolkit/set_env.sh. Not run on an NPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -ge 1 ] || { echo "error: the folder of the report is missing: bash benchmarks/npu_first_run.sh FOLDER [--dry]" >&2; exit 2; }
folder=$1
shift
mkdir -p "$folder"
if [[ " $* " != *" --dry "* ]]; then
    [ -n "${ASCEND_HOME_PATH:-}" ] || { echo "error: ASCEND_HOME_PATH is not set: source CANN's set_env.sh first" >&2; exit 2; }
    npu-smi info | tee "$folder/npu-smi.txt"
    python - <<'END'
import sys
import torch
import torch_npu

print(f"torch {torch.__version__}, torch_npu {torch_npu.__version__}, {torch.npu.device_count()} devices: {torch.npu.get_device_name(0)}")
if torch.__version__.split("+")[0] != torch_npu.__version__.split("+")[0].split(".post")[0]:
    sys.exit("error: torch and torch_npu must have one version: pip install -r requirements-npu.txt")
END
fi
exec python benchmarks/gpu_first_run.py --device npu --out "$folder" "$@"
