"""Graphs of decode passes: one launch in place of hundreds, for each of a few numbers of sequences."""

import functools
import logging
from collections.abc import Sequence

from torch import Tensor

from ascendspeed.cli.parser import flag_of
from ascendspeed.distributed import cuda_graphs
from ascendspeed.distributed.cuda_graphs import Capture, Replay
from ascendspeed.distributed.device import Device
from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.models.gpt.decode_buffers import DecodeBuffers
from ascendspeed.models.gpt.paged_kv_cache import SequenceSlice
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

logger = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Largest relative difference of a row of hidden states between a replay and the operations one by one."""


def check_device(device: Device) -> None:
    """Raises `UserError` unless the device has graphs; before any weight is read."""
    if not device.has_graphs:
        raise UserError(
            f"{flag_of('cuda_graphs')} is for GPUs of NVIDIA, and this process runs on {device.kind}: "
            "leave it out"
        )


def open_capture(model: LanguageModel, block_size: int) -> Capture:
    """Returns the device's capture for a paged cache of a model. Raises `UserError` if it cannot work."""
    check_device(model.device)
    flag, kernel = flag_of("cuda_graphs"), model.paged_kernel
    if model.grid.world > 1:
        raise UserError(f"{flag} works on one process only, without --tp and --pp: leave it out")
    if model.config.num_experts:
        raise UserError(f"{flag} does not work with experts, which are chosen on the host: leave it out")
    dtype, head_dim = model.gpt.config.params_dtype, model.config.head_dim
    if kernel is None:
        raise UserError(
            f"{flag} needs a kernel that reads the paged cache: there is none for fp32 and an int8 cache, "
            "otherwise the line `kernels:` of the log says why; leave it out"
        )
    if not kernel.supports(dtype, head_dim, block_size):
        raise UserError(
            f"{flag}: {kernel.source} does not take {dtype}, heads of {head_dim} and blocks of {block_size}: "
            "leave it out"
        )
    return cuda_graphs.open_capture()


class DecodeGraphs:
    """Runs passes of single tokens by graphs, which are captured when they are first needed.

    A pass of fewer sequences than those of a graph is padded. If a capture fails, or if its replay is not
    what the same operations compute one by one, there are no graphs from then on.
    """

    def __init__(
        self, model: LanguageModel, max_running: int, max_blocks: int, scratch_block: int, capture: Capture
    ) -> None:
        """`max_blocks`: most blocks of a sequence; `scratch_block`: a block of the model's paged cache that
        belongs to no sequence."""
        self.model, self.max_running = model, max_running
        self.replays = 0
        """Passes that were replays."""
        self.problem = ""
        """Reason why there are no graphs any more."""
        self._max_blocks, self._scratch_block, self._capture = max_blocks, scratch_block, capture
        self._graphs: dict[int, tuple[DecodeBuffers, Replay]] = {}

    def takes(self, slices: Sequence[SequenceSlice]) -> bool:
        """True if graphs run such a pass: single tokens only."""
        is_decode = all(part.count == 1 for part in slices)
        return is_decode and not self.problem and len(slices) <= self.max_running

    def run(self, tokens: Sequence[int], slices: Sequence[SequenceSlice]) -> Tensor:
        """Returns the final hidden states [n, h] of a pass that `takes` accepts; the next one overwrites
        them."""
        rows = padded_rows(len(slices), self.max_running)
        if rows not in self._graphs:
            return self._capture_pass(rows, tokens, slices)
        buffers, replay = self._graphs[rows]
        buffers.fill(tokens, slices)
        self.replays += 1
        return replay()[: len(slices)]

    def _capture_pass(self, rows: int, tokens: Sequence[int], slices: Sequence[SequenceSlice]) -> Tensor:
        """Runs a pass without a graph and captures one for so many rows; returns the hidden states."""
        buffers = DecodeBuffers(self.model.cache, rows, self._max_blocks, self._scratch_block)
        run = functools.partial(_run, self.model, buffers)
        buffers.fill(tokens, slices)
        run()  # libraries allocate what they need before the capture
        try:
            replay = self._capture(run)
            self.problem = _problem(buffers, run, replay)
            if not self.problem:
                self._graphs[rows] = buffers, replay
        except Exception as error:  # of whatever the driver or a kernel refuses
            self.problem = f"{type(error).__name__}: {first_line(error)}"
        if self.problem:
            self._graphs.clear()
            logger.warning(f"{flag_of('cuda_graphs')}: {self.problem}; decoding goes on without graphs")
        buffers.fill(tokens, slices)
        return run()[: len(slices)]  # the keys of these tokens are right, whatever a replay wrote


def padded_rows(count: int, most: int) -> int:
    """Returns the rows of the graph for `count` sequences: a power of 2, or `most`."""
    return min(1 << (count - 1).bit_length(), most)


def _run(model: LanguageModel, buffers: DecodeBuffers) -> Tensor:
    hidden = model.forward_paged(buffers.begin_pass())
    assert hidden is not None
    return hidden


def _problem(buffers: DecodeBuffers, run: Replay, replay: Replay) -> str:
    """Compares a replay with the operations one by one, on the inputs of the capture and on others; returns
    what is wrong, or ""."""
    if not _are_close(replay().clone(), run()):
        return "its first replay differs from the same operations one by one"
    buffers.fill_with_scratch()
    return "" if _are_close(replay().clone(), run()) else "a replay with other inputs is wrong"


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    """True if every row [n, h] is the same up to rounding; False if it is NaN."""
    actual, expected = actual.float(), expected.float()
    errors, sizes = (actual - expected).norm(dim=-1), expected.norm(dim=-1)
    return bool((errors <= TOLERANCE * sizes).all())
