"""Matrix products in fp32 through oneDNN, for CPUs on which torch's own (MKL's) are slower.

MKL does not use the AVX-512 units of an AMD CPU, and packs a weight anew in every product; oneDNN uses them,
and takes a weight that was packed once. `torch.ops.mkldnn._linear_pointwise`, which torch's own compiler
calls, is a private operation: it is used with the versions of torch that it was tested with, after a
comparison with torch's product at the start. The choice is made once, alike on all ranks.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.distributed.cpu_products import Linear, Products, all_ranks, rank
from ascendspeed.distributed.device import Device, cpu_info

TORCH_VERSIONS = ("2.13",)
"""Versions of torch whose operation was tested (`tests/test_onednn.py`)."""
MIN_SIZE = 32
"""Least size of each of the three dimensions of a product that oneDNN computes with a plain weight."""
MIN_MULTIPLICATIONS = 1 << 23
"""Least multiplications of such a product: a call of oneDNN takes about 40 us more than one of torch."""
MIN_PACKED_ELEMENTS = 1 << 18
"""Least elements of a weight that is packed."""
MIN_TRAINING_GAIN = 1.2
"""Least ratio of torch's time to oneDNN's for choosing oneDNN in training, where noise must not change the
choice and with it the bits of a resumed run."""
MIN_INFERENCE_GAIN = 1.05
"""Least ratio in inference: about 1.2 (a busy machine) to 2.9 were measured."""
PACKED_ROWS = 8
"""Rows of the measured product with a packed weight, as in the decoding of a batch."""
MEASURED_ELEMENTS = 1 << 22
"""Elements of the weights with which inference is measured, 16 MiB."""
ROUNDS = 5


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k], weight [n, k], plain or packed -> x weight^T [..., n]; without a gradient.

    A small product with a plain weight is torch's. The sizes alone decide, and alike for a product and for
    those of its gradients, so that equal runs give equal bits.
    """
    if weight.is_mkldnn:
        return _multiply(x, weight)
    outputs, inputs = weight.shape
    rows = x.numel() // max(1, inputs)
    if not (x.dtype == weight.dtype == torch.float32 and _is_large(rows, outputs, inputs)):
        return F.linear(x, weight)
    return _multiply(x, weight)


def linear_of_packed(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` that leaves products with plain weights of every size to torch."""
    return _multiply(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def pack(weight: Tensor) -> Tensor:
    """Copies a weight [n, k] into oneDNN's own layout, for `linear`; a small one is returned as it is.

    `to_dense()` of the result gives the plain weight back, bit for bit.
    """
    if weight.dtype != torch.float32 or weight.numel() < MIN_PACKED_ELEMENTS:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)


def choose(products: Products, device: Device) -> tuple[Linear | None, str]:
    """Returns the product that replaces torch's (None: torch's own), and the text for the log.

    Collective on a CPU.
    """
    if products.choice in ("torch", "fp32"):
        return None, "torch"
    if device.kind != "cpu" or products.dtype != "fp32":
        return None, "torch" if products.choice == "auto" else "torch (oneDNN is for fp32 on a CPU)"
    if products.choice == "auto" and not _is_worth_measuring(products):
        return None, "torch (oneDNN gains nothing with small matrices)"
    obstacle = _obstacle(products)
    gain = None
    if obstacle is None and products.choice == "auto" and rank() == 0:
        gain = measured_gain(products)
        if gain < (MIN_TRAINING_GAIN if products.rows else MIN_INFERENCE_GAIN):
            obstacle = f"oneDNN is {gain:.2f} times as fast on this CPU"
    if not all_ranks(obstacle is None):
        return None, f"torch ({obstacle or 'oneDNN cannot be used on the machine of another rank'})"
    source = "oneDNN" if gain is None else f"oneDNN ({gain:.1f} times as fast as torch on this CPU)"
    if products.choice == "auto" and not all_ranks(_has_avx512()):  # of inference
        return linear_of_packed, f"{source}, for packed weights"
    return linear, source


def measured_gain(products: Products) -> float:
    """Ratio of torch's time to oneDNN's for a product of such sizes (in training with those of its
    gradients)."""
    outputs, inputs = min(products.outputs, 4096), min(products.inputs, 1024)
    weight = torch.full((outputs, inputs), 0.01)
    if products.rows is None:
        # Several small weights: a step of decoding reads all weights of a model, which no cache holds.
        weights = [weight.clone() for _ in range(-(-MEASURED_ELEMENTS // weight.numel()))]
        x, packed = torch.ones(PACKED_ROWS, inputs), [pack(weight) for weight in weights]
        return _time_ratio(
            lambda: [F.linear(x, weight) for weight in weights],
            lambda: [linear(x, weight) for weight in packed],
        )
    rows = min(products.rows, 512)
    x, gradient = torch.ones(rows, inputs), torch.ones(rows, outputs)

    def run(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        multiply(x, weight)
        multiply(gradient, weight.t())
        multiply(gradient.t(), x.t())

    return _time_ratio(lambda: run(F.linear), lambda: run(_multiply))


def _time_ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Least time of `first` / least time of `second`, in turns after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for call, seconds in zip((first, second), times, strict=True):
                start = time.perf_counter()
                call()
                if number:
                    seconds.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    # As in torch's own product the result must be no view: autograd forbids to write into a view that a
    # function returned.
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.size(0)])


def _is_large(*sizes: int) -> bool:
    rows, outputs, inputs = sizes
    return min(sizes) >= MIN_SIZE and rows * outputs * inputs >= MIN_MULTIPLICATIONS


def _is_worth_measuring(products: Products) -> bool:
    if products.rows is None:
        return products.outputs * products.inputs >= MIN_PACKED_ELEMENTS
    return _is_large(products.rows, products.outputs, products.inputs)


def _obstacle(products: Products) -> str | None:
    """Returns why this rank cannot use oneDNN or, if `choice` is auto, need not measure it; None: it can."""
    if ".".join(torch.__version__.split(".")[:2]) not in TORCH_VERSIONS:
        return f"oneDNN was not tested with torch {torch.__version__}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    try:
        is_right = _gives_the_product()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN: {str(error).splitlines()[0]}"
    if not is_right:
        return "oneDNN's product is not torch's"
    if products.choice == "onednn":
        return None
    cpu = cpu_info()
    if cpu.get("vendor_id") != "AuthenticAMD":
        return f"MKL is expected to be fast on this CPU, {cpu.get('vendor_id', 'of another make')}"
    if products.rows is not None and not _has_avx512():
        return "oneDNN gains nothing in training on this CPU, which has no AVX-512"
    return None


def _has_avx512() -> bool:
    return "avx512f" in cpu_info().get("flags", "").split()


def _gives_the_product() -> bool:
    """Compares a small product of plain and packed weights with torch's."""
    x, weight = (torch.arange(n * 40.0).remainder(7).view(n, 40) for n in (33, 48))
    expected = F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    # Small integers: every order of summation gives the same bits.
    return all(torch.equal(_multiply(x, w), expected) for w in (weight, packed))
