"""Registry of packers. A new packer is a class in a file of its own and a line in `PACKERS`."""

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.packing.algorithms import FirstFit, OnePerRow
from ascendspeed.data.packing.base import Packer
from ascendspeed.data.packing.internevo import InternEvoCut, InternEvoWhole
from ascendspeed.utils.errors import UserError

PACKERS: tuple[type[Packer], ...] = (FirstFit, OnePerRow, InternEvoCut, InternEvoWhole)
"""The values of `--packing`; `DataConfig.packing` lists the same names for `--help`."""


def create_packer(data: DataConfig, default: type[Packer]) -> Packer:
    """Creates the packer of `--packing`, or `default`. Raises `UserError` if --max-segment-length does not
    apply to it."""
    packer = _packer_class(data, default)
    if data.max_segment_length is not None and not packer.uses_segment_length:
        names = " and ".join(packer.name for packer in PACKERS if packer.uses_segment_length)
        raise UserError(
            f"--max-segment-length {data.max_segment_length} belongs to --packing {names}, "
            f"not to {packer.name}; leave it out"
        )
    return packer.from_config(data)


def create_stream_packer(data: DataConfig, default: type[Packer] = FirstFit) -> Packer:
    """Creates the packer of `--packing` for masked documents in a stream. Raises `UserError` if it cannot
    pack streams."""
    packer = _packer_class(data, default)
    if not packer.packs_streams:
        names = " or ".join(packer.name for packer in PACKERS if packer.packs_streams)
        raise UserError(f"--packing {data.packing}: documents that are tokenized in training take {names}")
    return packer.from_config(data)


def _packer_class(data: DataConfig, default: type[Packer]) -> type[Packer]:
    if data.packing is None:
        return default
    for packer in PACKERS:
        if packer.name == data.packing:
            return packer
    names = ", ".join(packer.name for packer in PACKERS)
    raise UserError(f"--packing {data.packing} does not exist; there are: {names}")
