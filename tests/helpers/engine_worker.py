"""One rank of an engine test: runs the cases of a job over the same batches; rank 0 writes their curves.

A run with --deepspeed uses the DeepSpeed engine, others Megatron-core's. Cases may differ in layout. A case:

{"changes": {group: {field: value}}, "weights": safetensors (else random ones), "load": folder,
"save": folder, "resave": folder to save to before the first step, "first": step, "last": step,
"weight_gradient": a factor; linears add that multiple of their weight gradient to its fp32 sum themselves,
"data": safetensors with the fields of a `Batch`, each [steps, samples, s] (else the oracle's random batches),
"restore": a step before which "load" is loaded again, "sizes": samples of every batch (else all),
"compile": the backend of torch.compile for the layers,
"evaluate": also the loss of batch 0 before training, "onednn": oneDNN computes the products of the linears,
"in_fp32": those and attention in bf16 are computed in fp32; both add the curve "case: products" [[their
number, null]], "break": a deliberate mistake,
"poison": a step; two are inserted before it: NaN gradients on one rank, and no supervised tokens}.
"""

import gc
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from ascendspeed.config import schema
from ascendspeed.distributed import device


def main() -> None:
    """Reads the job, runs every case, writes case -> [[loss, gradient norm], ...]; [null, null]: skipped.

    Losses of routers follow, if a case has them.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare(job.get("device", "cpu"), deterministic=job.get("deterministic", False))

    import torch
    from safetensors.torch import load_file

    from ascendspeed.checkpoint.discovery import open_checkpoint
    from ascendspeed.checkpoint.fragment import TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.config import lr_schedule
    from ascendspeed.data.dataset import Batch
    from ascendspeed.distributed import fp32_products, fused_kernels, process_groups
    from ascendspeed.distributed.layer_compiler import LayerCompiler
    from ascendspeed.models.param_mapping import random_tensors
    from helpers import oracle

    base, fused = schema.from_dict(job["run"]), fused_kernels.select_kernels(here, varlen=here.kind != "cpu")
    plain = oracle.batches(
        base.model.vocab_size,
        job["steps"],
        base.train.global_batch_size,
        base.data.seq_length,
        job["data_seed"],
    )

    def batches_of(path):
        columns = load_file(path)
        return [{name: column[i] for name, column in columns.items()} for i in range(job["steps"])]

    def micro_batches(run, grid, batch):
        size, rows = run.train.micro_batch_size, len(batch["tokens"]) // grid.dp
        local_batch = {k: v[grid.dp_rank * rows : (grid.dp_rank + 1) * rows] for k, v in batch.items()}
        local_batch.setdefault("position_ids", torch.arange(run.data.seq_length).expand(rows, -1))
        return [Batch(**{k: v[i : i + size] for k, v in local_batch.items()}) for i in range(0, rows, size)]

    def step(engine, run, grid, batch):
        lr = lr_schedule.lr_at(engine.updates, run.optim, run.train.train_iters)
        with oracle.products_in_fp32() if run.optim.optimizer == "muon" else nullcontext():
            result = engine.step(micro_batches(run, grid, batch), lr)
        routers = [value for value in (result.aux_loss, result.z_loss) if value is not None]
        return [None, None] if result.skipped else [result.loss, result.grad_norm, *routers]

    def save(folder, at, engine, run, grid):
        state = TrainState(at, 0, 0, engine.scalars())
        save_checkpoint(
            folder, state, run, engine.fragments(), engine.rng(), grid.rank, grid.world, grid.barrier
        )

    places = None
    curves = {}
    for name, case in job["cases"].items():
        print(name, flush=True)  # the last one in the log of a rank that failed
        run = base
        data = batches_of(case["data"]) if case.get("data") else plain
        if sizes := case.get("sizes"):
            data = [{k: v[:n] for k, v in batch.items()} for batch, n in zip(data, sizes, strict=True)]
        for group, values in case.get("changes", {}).items():
            run = replace(run, **{group: replace(getattr(run, group), **values)})
        groups = (run.parallel.layout_key, run.parallel.num_distributed_optimizer_instances)
        if places != groups:
            leave_groups()
        places = groups
        grid = process_groups.initialize(here, run.parallel, run.train.seed)  # the generators start anew
        given = (
            load_file(case["weights"]).items()
            if case.get("weights")
            else random_tensors(run.model, run.train.seed)
        )
        tensors = (
            None if case.get("load") and not run.lora.lora_rank else given
        )  # a checkpoint of adapters has no weights
        if case.get("break") == "documents see each other":
            without_documents()
        kernels = fused
        if case.get("onednn") or case.get("in_fp32"):
            multiply = fp32_products.linear if case.get("in_fp32") else onednn_product
            linear = CountedLinear(multiply, case.get("break"))
            wide = torch.float32 if case.get("in_fp32") else None
            kernels = replace(fused, linear=linear, attention_dtype=wide)
        if compiler := case.get("compile"):
            kernels = replace(kernels, layer_compiler=LayerCompiler(compiler))
        if factor := case.get("weight_gradient"):
            kernels = replace(kernels, weight_gradient=partial(add_weight_gradient, factor))
        if run.parallel.deepspeed:
            engine = deepspeed_engine(case.get("break"))(run, grid, here, kernels, tensors)
        else:
            kind = "fsdp" if run.parallel.use_torch_fsdp2 else "megatron"
            engine = megatron_engine(case.get("break"), kind)(run, grid, here, kernels, tensors)
        if case.get("load"):
            engine.restore(open_checkpoint(case["load"]))
        if case.get("resave"):
            save(case["resave"], case.get("first", 0), engine, run, grid)
        if case.get("break") == "moments":
            for fragment in engine.fragments():
                if fragment.kind == "exp_avg":
                    fragment.tensor.zero_()
        if case.get("evaluate"):
            total, tokens = engine.loss(micro_batches(run, grid, data[0]))
            curves[f"{name}: evaluated"] = [[total / tokens, None]]
        first, last, curves[name] = case.get("first", 0), case.get("last", job["steps"]), []
        for i in range(first, last):
            if case.get("restore") == i:
                engine.restore(open_checkpoint(case["load"]))
            if case.get("poison") == i:
                weight = next(
                    engine.modules[0].parameters()
                    if hasattr(engine, "modules")
                    else engine.module.parameters()
                )
                hook = weight.register_hook(lambda g, rank=grid.rank: g * float("nan") if rank == 0 else g)
                curves[name].append(step(engine, run, grid, data[i]))
                hook.remove()
                nothing = dict(data[i], loss_mask=torch.zeros_like(data[i]["loss_mask"]))
                curves[name].append(step(engine, run, grid, nothing))
            curves[name].append(step(engine, run, grid, data[i]))
        parallel = run.parallel
        if not (parallel.deepspeed or parallel.use_torch_fsdp2) and case.get("break") is None:
            check_replicas(engine, grid)
        if case.get("onednn") or case.get("in_fp32"):
            curves[f"{name}: products"] = [[linear.count, None]]
        if case.get("save"):
            save(case["save"], last, engine, run, grid)
        del engine
        gc.collect()
    # Neither engine, nor a family, needs torch's compiler, which takes seconds to load.
    compiles = any("compile" in case for case in job["cases"].values())
    assert compiles or "torch._inductor.compile_fx" not in sys.modules
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(curves))
    process_groups.destroy()


def add_weight_gradient(factor, x, gradient, total):
    """The product of a CUDA device in two steps, with a result that is rounded to bf16 in between."""
    total.add_(gradient.t() @ x, alpha=factor)


def leave_groups():
    """Ends megatron-core's groups, whose threads and sockets it would only forget."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or ():
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def check_replicas(engine, grid):
    """Ranks that hold the same part of a parameter hold the same bits, tied copies too, dropout or not."""
    from hashlib import sha256

    import torch

    from ascendspeed.models.gpt import gpt_model

    if engine.run.parallel.overlap_param_gather:
        engine._refresh_weights()  # the weights of the last step are gathered with the next one
    local_tensors = {}
    for module in engine.modules:
        for name, parameter in gpt_model.named_parameters(module).items():
            name = (
                gpt_model.EMBEDDING
                if name == gpt_model.OUTPUT and module.share_embeddings_and_output_weights
                else name
            )
            part = grid.tp_rank if engine.shard_specs[name].dim is not None else 0
            digest = sha256(parameter.detach().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            assert local_tensors.setdefault((name, part), digest) == digest, name
    seen = {}
    for rank_tensors in grid.all_gather_object(local_tensors):
        for key, digest in rank_tensors.items():
            assert seen.setdefault(key, digest) == digest, f"{key} differs between ranks"
    assert {name for name, _ in seen} == set(engine.shard_specs)


def onednn_product(x, weight):
    """oneDNN's product of fp32 matrices of any size."""
    from ascendspeed.distributed import onednn

    if not x.numel() or x.dtype != weight.dtype or str(x.dtype) != "torch.float32":
        return x @ weight.t()
    return onednn._multiply(x, weight)


class CountedLinear:
    """A product that counts its calls."""

    def __init__(self, multiply, mistake):
        self.multiply, self.count, self.swaps_rows = multiply, 0, mistake == "rows of weight gradients"

    def __call__(self, x, weight):
        self.count += 1
        out = self.multiply(x, weight)
        # The first operand of a weight's gradient is the only one that is a transposed view.
        return out.flip(0) if self.swaps_rows and not x.is_contiguous() else out


def deepspeed_engine(mistake):
    """Makes the DeepSpeed engine, with a mistake made on purpose."""
    from ascendspeed.training.engines.deepspeed import DeepSpeedEngine
    from ascendspeed.training.engines.deepspeed_config import ds_config

    class WithoutHook(DeepSpeedEngine):
        def _sum_over_tensor_parallel(self, gradient):
            return gradient

    class InARowShard(DeepSpeedEngine):
        def __init__(self, *args):
            super().__init__(*args)
            self.sequence_shard = InARow(*self.sequence_shard)

    mistaken = {"sequence-parallel hook": WithoutHook, "chunks in a row": InARowShard}
    kind = mistaken.get(mistake, DeepSpeedEngine)
    return lambda run, grid, here, kernels, tensors: kind(
        run, grid, here, ds_config(run, grid.world), kernels, tensors
    )


def megatron_engine(mistake, kind="megatron"):
    """The Megatron engine or that with FSDP, with a mistake made on purpose."""
    from ascendspeed.training.engines.fsdp import FsdpEngine
    from ascendspeed.training.engines.megatron import MegatronEngine

    engine = FsdpEngine if kind == "fsdp" else MegatronEngine

    class Mistaken(engine):
        def __init__(self, *args):
            with without_adapters(mistake):
                super().__init__(*args)
            if mistake == "batched messages":  # megatron-core's default
                self.config.overlap_p2p_comm, self.config.batch_p2p_comm = False, True
            if mistake == "sequence-parallel sum":
                for module in self.modules:
                    for parameter in module.parameters():
                        parameter.sequence_parallel = False
            if mistake == "chunks in a row":
                self.sequence_shard = InARow(*self.sequence_shard)
            if mistake == "sum over the copies":
                for chunk in self.chunks:
                    chunk.ddp_config.num_distributed_optimizer_instances = 1
            if mistake == "rounded half away":  # no mistake, but the weights of --store-param-remainders
                for chained in self.optimizer.chained_optimizers:
                    round_half_away(chained)
            if mistake == "shared step":  # what megatron-core's own loading leaves
                for part in self.optimizer.chained_optimizers:
                    states = list(part.optimizer.state.values())
                    for state in states:
                        state["step"] = states[0]["step"]
            if mistake == "other masks in the second pass":
                from megatron.core.tensor_parallel import random

                random._set_all_rng_states = lambda *states: None  # to the end of the process: the last case
            if mistake == "fused matrices":
                for shard in self.muon.shards:
                    shard.blocks = [[(0, shard.spec.shape[0])]]
            if mistake == "weight decay on all":
                for group in self.optimizer.param_groups:
                    group["weight_decay"] = self.run.optim.weight_decay

        def _all_reduce_sum(self, values, group=None):
            if mistake == "mean of means" and group is not None:
                return values * self.grid.dp
            return super()._all_reduce_sum(values, group)

        def step(self, *args):
            with without_adapters(mistake):
                return super().step(*args)

        def _refresh_weights(self):
            if mistake != "masters not published":
                super()._refresh_weights()

    return Mistaken if mistake else engine


def round_half_away(chained):
    """Makes a Megatron-core optimizer round the fp32 masters half away from zero to bf16 weights."""
    import torch

    from ascendspeed.training.engines.megatron_optimizer import weights_and_masters

    def publish():
        for weight, master in weights_and_masters(chained):
            rounded = (master.detach().view(torch.int32) + 0x8000) >> 16
            weight.data.copy_(rounded.to(torch.int16).view(torch.bfloat16))

    chained._copy_main_params_to_model_params = publish


def without_documents():
    """For the rest of the process: positions restart at every document, attention covers the whole row."""
    from ascendspeed.models.gpt import attention

    attention.attend_packed = lambda segments, q, k, v, *_: attention.attend(q, k, v)


def without_adapters(mistake):
    """For `adapters: name`: that function of the adapters does nothing meanwhile."""
    from ascendspeed.models.lora import layers

    name = (mistake or "").partition("adapters: ")[2]
    return (
        patch.object(layers, name, lambda x, *_, **__: x if name != "_begin" else None)
        if name
        else nullcontext()
    )


class InARow:
    """A sequence cut into as many pieces as there are ranks."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def take(self, whole, dim):
        return whole.chunk(self.size, dim)[self.rank]


if __name__ == "__main__":
    main()
