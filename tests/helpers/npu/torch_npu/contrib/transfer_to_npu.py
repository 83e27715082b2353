"""Effects of importing torch_npu's transfer_to_npu: torch.cuda's public names become torch.npu's."""

import torch

for _name in torch.npu.__all__:
    setattr(torch.cuda, _name, getattr(torch.npu, _name))
for _name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "seed", "initial_seed"):
    setattr(torch.cuda.random, _name, getattr(torch.npu, _name))
torch.cuda.default_generators = torch.npu.default_generators
torch.cuda.DoubleTensor = torch.npu.FloatTensor  # as torch_npu does
torch.Tensor.cuda = torch.Tensor.npu
torch.Tensor.is_cuda = False

_type = torch.Tensor.type


def _npu_type(self, *args, **kwargs):
    """torch.npu.FloatTensor, whatever the CPU or its redirection calls it."""
    if args or kwargs:
        return _type(self, *args, **kwargs)
    return "torch.npu." + _type(self).rpartition(".")[2]


torch.Tensor.type = _npu_type
