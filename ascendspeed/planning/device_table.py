"""Rates of devices and links: data sheets, and ceilings that were measured. No torch."""

from dataclasses import dataclass

from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class DeviceRates:
    """Rates of one device and of its links, each per direction."""

    name: str
    tflops: float
    """Dense bf16 TFLOP/s of the data sheet; MFU refers to it."""
    ceiling_tflops: float
    """TFLOP/s that large matrix products reach."""
    memory_gb_s: float
    """GB/s that the memory reaches."""
    link_gb_s: float
    """GB/s to the devices of the same node."""
    network_gb_s: float
    """GB/s to other nodes, of this device's own network adapter."""
    source: str


REACHED = 0.8
"""Share of a data sheet's rates that is assumed where nothing was measured."""
LATENCY = 10e-6
"""Seconds to start one message of a collective; an assumption."""
NODE = 8
"""Devices of a node."""

DEVICES = {
    rates.name: rates
    for rates in (
        DeviceRates(
            "h200",
            989,
            788,
            4000,
            450,
            50,
            "H200 SXM data sheet (4.8 TB/s, NVLink 900 GB/s), 400 Gbit/s; "
            "788 TFLOP/s and 4.0 TB/s: largest rates that torch reached on one card",
        ),
        DeviceRates(
            "h100",
            989,
            989 * REACHED,
            3350 * REACHED,
            450,
            50,
            "H100 SXM data sheet (3.35 TB/s, NVLink 900 GB/s), 400 Gbit/s; 80 % assumed",
        ),
        DeviceRates(
            "a100",
            312,
            312 * REACHED,
            2039 * REACHED,
            300,
            25,
            "A100 80GB SXM data sheet (2,039 GB/s, NVLink 600 GB/s), 200 Gbit/s; 80 % assumed",
        ),
        DeviceRates(
            "a800",
            312,
            312 * REACHED,
            2039 * REACHED,
            200,
            25,
            "A800 80GB SXM data sheet (2,039 GB/s, NVLink 400 GB/s), 200 Gbit/s; 80 % assumed",
        ),
    )
}


def rates_of(name: str) -> DeviceRates:
    """The rates of a device. Raises `UserError` for an unknown one."""
    if name not in DEVICES:
        raise UserError(f"--device-type {name} has no rates; choose from {', '.join(DEVICES)}")
    return DEVICES[name]
