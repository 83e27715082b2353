"""Training steps of the dense families by the real engine against plain torch over Hugging Face's models."""

from dataclasses import asdict

import pytest
from helpers import oracle
from helpers.engines import DATA_SEED, RUN, run_cases, worst
from helpers.family_models import MODELS
from safetensors.torch import save_file

from ascendspeed.config import lr_schedule
from ascendspeed.models import param_mapping

STEPS = 5
NAMES = ("internlm3-bias", "qwen2-tied", "baichuan", "gemma", "llama3.1")
ODD = ("baichuan", "gemma")  # whose forward pass does more with a weight than multiply by it


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """name -> the file of the weights, and plain torch's losses and gradient norms."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    data = oracle.batches(125, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)
    lrs = [lr_schedule.lr_at(i, RUN.optim, STEPS) for i in range(STEPS)]
    for name in NAMES:
        reference, published = oracle.native(MODELS[name])
        save_file(
            {
                p.name: param_mapping.hf_to_megatron(MODELS[name], p, published).contiguous()
                for p in param_mapping.parameters(MODELS[name])
            },
            folder / name,
        )
        found[name] = str(folder / name), oracle.train(reference.train(), data, lrs, vars(RUN.optim))
    return found


def case(expected, name: str, stage: int, **changes) -> dict:
    model = asdict(MODELS[name]) | changes
    return {
        "weights": expected[name][0],
        "changes": {"model": model, "parallel": {"zero_stage": stage, "sequence_parallel": True}},
    }


@pytest.mark.slow
def test_losses_equal_hugging_face_under_tensor_and_sequence_parallel(expected, tmp_path):
    cases = {f"{name}, zero 2": case(expected, name, 2) for name in NAMES}
    cases |= {f"{name}, zero {stage}": case(expected, name, stage) for name in ODD for stage in (0, 3)}
    cases["gemma, control: embeddings not scaled"] = case(expected, "gemma", 2, scale_embeddings=False)
    cases["llama3.1, control: frequencies not scaled"] = case(
        expected,
        "llama3.1",
        2,
        rope_scaling_type="linear",
        rope_scaling_factor=1.0,
    )
    cases["baichuan, control: head as it is"] = case(expected, "baichuan", 2, normalize_head=False)
    for name, curve in run_cases("tp2-dp1", cases, tmp_path, STEPS, train_iters=STEPS).items():
        losses, norms = worst(curve, expected[name.partition(",")[0]][1])
        if "control" in name:
            assert losses > 1e-3, name
        else:
            assert (losses < 1e-5, norms < 1e-4) == (True, True), (name, losses, norms)
