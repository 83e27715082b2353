"""Imports for the fork server: all that a CPU rank needs to start at once. No process group."""

import gc

from ascendspeed.distributed import device

device.prepare("cpu")

import deepspeed  # noqa: E402, F401
import megatron.core.models.gpt  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from ascendspeed.inference.engine import language_model  # noqa: E402, F401
from ascendspeed.training import data_setup, fault_tolerance, loop, setup  # noqa: E402, F401
from ascendspeed.training.engines import deepspeed as _deepspeed  # noqa: E402, F401
from ascendspeed.training.engines import megatron as _megatron  # noqa: E402, F401
from helpers import oracle, toy  # noqa: E402, F401

gc.set_threshold(50_000, 20, 20)  # ranks live for seconds
gc.freeze()  # or every collection in a child walks, and copies, the millions of objects of these packages
