"""Estimate of the time of a step: roofline of the computation, links, and pipeline bubble. No torch.

No figure of it was measured. It orders layouts; the rates of a cluster decide.
"""

from dataclasses import dataclass

from ascendspeed.config.schema import Run
from ascendspeed.models import estimates
from ascendspeed.planning.device_table import DeviceRates
from ascendspeed.planning.links import Group, gather_seconds, reduce_seconds, send_seconds

POINTWISE_BYTES = (105, 38)
"""Bytes that a layer's pointwise operations move per token in both passes, per hidden and per FFN width;
counted on a layer of InternLM-7B in bf16 without optional kernels."""
GRADIENT_BYTES = {0: 12, 1: 8, 2: 44, 3: 44}
"""ZeRO stage -> bytes per parameter and micro-batch to sum gradients in fp32."""
MEGATRON_GRADIENT_BYTES = 8
UPDATE_BYTES = 52
"""Bytes per parameter of norm, clipping, AdamW, and writing the bf16 weights."""
BACKWARD = 2 / 3
"""Share of the computation that is the backward pass, beside which gradients are exchanged."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one step, per device."""

    compute: float
    """Matrix products and pointwise operations of all micro-batches, recomputation too."""
    exchange: float
    """Tensor-, context- and pipeline-parallel messages."""
    replicas: float
    """Gradients and weights between data-parallel ranks, as far as the backward pass does not hide them."""
    bubble: float
    """Waiting of the pipeline."""
    update: float
    tokens: int
    """Tokens of a step over all devices."""
    devices: int
    model_flops: float
    """FLOPs of a step over all devices, without recomputation."""
    peak_tflops: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.exchange + self.replicas + self.bubble + self.update

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization."""
        return self.model_flops / self.step / self.devices / (self.peak_tflops * 1e12)

    @property
    def bubble_share(self) -> float:
        """Share of the step that is waiting of the pipeline."""
        return self.bubble / self.step


def estimate(run: Run, devices: int, device: DeviceRates) -> TimeEstimate:
    """Estimates the time of a step."""
    parallel, train, model = run.parallel, run.train, run.model
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    dp = devices // parallel.model_size
    count = train.global_batch_size // (train.micro_batch_size * dp)
    tokens = train.micro_batch_size * run.data.seq_length
    flops = estimates.flops_per_token(model, run.data.seq_length, run.lora)
    parameters = estimates.parameters_per_device(model, parallel)
    factor = 1 + _recomputed_share(run) / 3
    a, b = POINTWISE_BYTES
    moved = tokens * model.num_layers * (a * model.hidden_size + b * max(model.ffn_widths)) / (tp * pp * cp)
    stage = parallel.zero_stage if parallel.deepspeed else None
    sums = MEGATRON_GRADIENT_BYTES if stage is None else GRADIENT_BYTES[stage]
    trained = 0.0 if run.lora.lora_rank else 1.0
    micro = factor * (tokens * flops / (tp * pp * cp) / (device.ceiling_tflops * 1e12)) + (
        factor * moved + trained * sums * parameters
    ) / (device.memory_gb_s * 1e9)
    messages = _exchange_seconds(run, devices, tokens, factor, device)
    replicas = _replica_seconds(run, parameters * trained, dp * cp, count, micro, device)
    sharing = dp * cp // parallel.num_distributed_optimizer_instances
    shards = sharing if stage or parallel.use_distributed_optimizer else 1
    bubble = (pp - 1) / parallel.num_virtual_stages_per_pipeline_rank * (micro + messages)
    return TimeEstimate(
        compute=count * micro,
        exchange=count * messages,
        replicas=replicas,
        bubble=bubble,
        update=trained * UPDATE_BYTES * parameters / shards / (device.memory_gb_s * 1e9),
        tokens=train.global_batch_size * run.data.seq_length,
        devices=devices,
        model_flops=flops * train.global_batch_size * run.data.seq_length,
        peak_tflops=device.tflops,
    )


def _recomputed_share(run: Run) -> float:
    """Share of the layers whose forward pass runs twice."""
    train, parallel = run.train, run.parallel
    if train.recompute_granularity != "full":
        return 0.0
    if train.recompute_method == "uniform":
        return 1.0
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    return min(1.0, train.recompute_num_layers * stages / run.model.num_layers)


def _exchange_seconds(run: Run, devices: int, tokens: int, factor: float, device: DeviceRates) -> float:
    """Messages of one micro-batch between the ranks of a model replica, on one pipeline stage."""
    parallel, model = run.parallel, run.model
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    layers = model.num_layers / pp
    hidden = 2.0 * tokens * model.hidden_size / cp  # bytes in bf16
    tensor, context = Group(tp, 1), Group(cp, tp)
    if parallel.sequence_parallel:  # 4 forward, 4 backward and 2 gathers again for the weights' gradients
        per_layer = (10 + 4 * (factor - 1) * 3) * gather_seconds(hidden, tensor, device)
    else:
        per_layer = (4 + 2 * (factor - 1) * 3) * reduce_seconds(hidden, tensor, device)
    keys = 2 * 2.0 * tokens * model.kv_heads * model.head_dim / tp
    per_layer += 3 * gather_seconds(keys, context, device)
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    stages = Group(pp, devices // pp)
    sent = hidden / (tp if parallel.sequence_parallel else 1)
    return layers * per_layer + 2 * virtual * send_seconds(sent, stages, device)


def _replica_seconds(
    run: Run, parameters: float, replicas: int, count: int, micro: float, device: DeviceRates
) -> float:
    """Exchange between data-parallel ranks in one step that the backward pass does not hide."""
    parallel = run.parallel
    group = Group(replicas, parallel.tensor_model_parallel_size)
    gradients, weights = 4.0 * parameters, 2.0 * parameters
    scatter, gather = gather_seconds(gradients, group, device), gather_seconds(weights, group, device)
    hidden = BACKWARD * micro
    if (instances := parallel.num_distributed_optimizer_instances) > 1:
        sharing = replicas // instances
        inner = Group(sharing, group.stride)
        between = reduce_seconds(gradients / sharing, Group(instances, group.stride * sharing), device)
        scatter = gather_seconds(gradients, inner, device) + between
        gather = gather_seconds(weights, inner, device)
    if not parallel.deepspeed:
        if not parallel.use_distributed_optimizer:
            scatter, gather = reduce_seconds(gradients, group, device), 0.0
        if parallel.overlap_grad_reduce:
            scatter = max(0.0, scatter - hidden)
        return scatter + (max(0.0, gather - micro / 3) if parallel.overlap_param_gather else gather)
    if parallel.zero_stage < 2:
        return scatter + gather
    per_pass = scatter + (2 * gather if parallel.zero_stage == 3 else 0.0)
    exposed = count * max(0.0, per_pass - (hidden if parallel.zero_stage == 2 else micro))
    return exposed + (gather if parallel.zero_stage == 2 else 0.0)
