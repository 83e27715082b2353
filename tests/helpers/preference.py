"""Preference pairs of random tokens, a tiny model on disk, and TRL's trainers on it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ascendspeed.config import schema
from ascendspeed.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PreferenceConfig,
    Run,
    TrainConfig,
)
from ascendspeed.data import dataset
from ascendspeed.data.indexed.masked_pair import PREFERENCE, MaskedPairWriter
from ascendspeed.models import param_mapping
from ascendspeed.models.families import read_config
from helpers import launch, oracle
from helpers.models import tensors_of

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=125,
    max_position_embeddings=64,
    add_qkv_bias=False,
    add_dense_bias=False,
    init_method_std=0.1,
)
PAIRS, GLOBAL_BATCH, ROW = 24, 4, 48
STEPS = 20
REWARD_TOKEN = 7
LR = 2e-3

Curve = list[list[float]]


def write_pairs(prefix: Path) -> None:
    """Pairs with a common prompt and answers of different lengths."""
    random = np.random.RandomState(3)
    tokens, lengths, masks = [], [], []
    for _ in range(PAIRS):
        prompt = random.randint(3, MODEL.vocab_size, random.randint(2, 8))
        for _ in range(2):
            answer = random.randint(3, MODEL.vocab_size, random.randint(1, 14))
            tokens.append(np.concatenate([prompt, answer]))
            lengths.append(len(tokens[-1]))
            masks.append(np.arange(lengths[-1]) >= len(prompt))
    with MaskedPairWriter(prefix, PREFERENCE) as writer:
        writer.add(np.concatenate(tokens), np.array(lengths, np.int32), np.concatenate(masks))
        writer.commit({})


def run_of(folder: Path) -> Run:
    """A run over `write_pairs` from the weights of `write_model`, both in `folder`."""
    return Run(
        MODEL,
        ParallelConfig(),
        # Two answers that end alike have gradients that almost cancel: with 1e-8 Adam turns their rounding
        # into steps of the learning rate.
        OptimConfig(lr=LR, weight_decay=0.1, clip_grad=1.0, adam_eps=1e-5),
        DataConfig(data_path=(str(folder / "p"),), split="1,0,0", seq_length=ROW),
        TrainConfig(global_batch_size=GLOBAL_BATCH, load=str(folder / "hf"), log_dir=str(folder)),
        preference=PreferenceConfig(stage="dpo", beta=0.3),
    )


def reference_model() -> Any:
    """The model in Hugging Face's classes."""
    return oracle.hugging_face(MODEL, tensors_of(MODEL)).eval()


def write_inputs(folder: Path) -> None:
    """Pairs and weights."""
    write_pairs(folder / "p")
    reference_model().save_pretrained(folder / "hf")


def curves(folder: Path, cases: dict[str, Any], world: int = 1) -> dict[str, Curve]:
    """Every case in one start of processes."""
    job = {"run": schema.to_dict(run_of(folder)), "cases": cases}
    return launch.ranks(world, "preference_worker.py", job, Path(tempfile.mkdtemp(dir=folder)))


def pairs_in_order(run: Run, steps: int) -> list[dict[str, list[int]]]:
    """Pairs of the first steps, in the order of the run, as TRL takes them."""
    run = replace(run, data=replace(run.data, packing="none"))
    samples = dataset.build_splits(run.data, run.train.seed, MODEL.vocab_size, ["train"], pairs=True)["train"]
    rows = []
    for number in range(steps * GLOBAL_BATCH):
        sample = samples.sample(number)
        row: dict[str, list[int]] = {}
        starts = [*(sample.position_ids == 0).nonzero().flatten().tolist(), ROW]
        for name, begin, end in zip(("chosen", "rejected"), starts, starts[1:], strict=False):
            tokens, mask = sample.tokens[begin:end], sample.loss_mask[begin:end].bool()
            prompt = int(mask.nonzero()[0]) + 1
            row["prompt_ids"] = tokens[:prompt].tolist()
            row[f"{name}_ids"] = tokens[prompt:].tolist()
        rows.append(row)
    return rows


def adamw(model: Any, run: Run) -> torch.optim.AdamW:
    """AdamW as the engines set it: no weight decay on one-dimensional weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": run.optim.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optim = run.optim
    return torch.optim.AdamW(groups, lr=LR, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)


def with_adapters(model: Any, run: Run, **settings: Any) -> Any:
    """peft's model, with the initial adapters of the run. `settings`: further ones of peft."""
    from peft import LoraConfig, get_peft_model

    from ascendspeed.models.lora import adapter, targets

    lora = targets.resolve_config(MODEL, run.lora)
    modules = list(lora.lora_target_modules)
    config = LoraConfig(r=lora.lora_rank, lora_alpha=lora.lora_alpha, target_modules=modules, **settings)
    wrapped = get_peft_model(model, config)
    initial = dict(adapter.initial_tensors(MODEL, lora, run.train.seed))
    parameters = dict(wrapped.named_parameters())
    for layer in range(MODEL.num_layers):
        for target in targets.selected_targets(MODEL, lora):
            for which in "AB":
                name = f"base_model.model.{target.hf_module.format(l=layer)}.lora_{which}.default.weight"
                parameters[name].data.copy_(initial[target.megatron_name(which, layer)])
    return wrapped


def trl_curve(run: Run, steps: int, rows: list[dict[str, list[int]]], **settings: Any) -> Curve:
    """TRL's DPOTrainer over the rows: loss, gradient norm and rewards of every step."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # holds ids

    words = {str(number): number for number in range(MODEL.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    model, frozen = reference_model(), reference_model()
    if run.lora.lora_rank:
        model, frozen = with_adapters(model, run), None
    optimizer = adamw(model, run)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=GLOBAL_BATCH,
            max_steps=steps,
            logging_steps=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            max_grad_norm=run.optim.clip_grad,
            beta=run.preference.beta,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        trainer = Trainer(
            model=model,
            ref_model=frozen,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train()
    rewards = ("chosen", "rejected", "margins", "accuracies")
    keys = ("loss", "grad_norm", *(f"rewards/{name}" for name in rewards))
    return [[line[key] for key in keys] for line in trainer.state.log_history if "loss" in line]


def torch_curve(run: Run, steps: int, rows: list[dict[str, list[int]]]) -> Curve:
    """A plain loop over the Hugging Face model with the losses as the papers state them, a pair at a time."""
    policy, frozen, settings = reference_model(), reference_model(), run.preference
    optimizer = adamw(policy, run)
    curve = []
    for step in range(steps):
        batch = rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        scored = [
            [
                (logprob(policy, row, name), logprob(frozen, row, name).detach())
                for name in ("chosen", "rejected")
            ]
            for row in batch
        ]
        sizes = [[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in batch]
        ratios = [[float(own - other) for own, other in pair] for pair in scored]
        means = [max(0.0, sum(column) / len(batch)) for column in zip(*ratios, strict=True)]
        losses, rewards = [], []
        for pair, size in zip(scored, sizes, strict=True):
            loss, reward = paper_loss(settings, pair, size, means)
            losses.append(loss)
            rewards.append(reward)
        total = torch.stack(losses).mean()
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), run.optim.clip_grad)
        optimizer.step()
        chosen, rejected = (sum(column) / len(batch) for column in zip(*rewards, strict=True))
        right = sum(good > bad for good, bad in rewards) / len(batch)
        curve.append([total.item(), norm.item(), chosen, rejected, chosen - rejected, right])
    return curve


def reward_head(folder: Path, run: Run) -> torch.Tensor:
    """The new head of a reward model."""
    model = replace(read_config(folder / "hf" / "config.json"), reward_head=True)
    parameter = next(p for p in param_mapping.parameters(model) if p.name == "output_layer.weight")
    return param_mapping.random_tensor(model, parameter, run.train.seed)


class PlainRewardModel(torch.nn.Module):
    """The backbone of Hugging Face's model and a linear head at the last token."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.backbone = reference_model().model
        self.head = torch.nn.Linear(MODEL.hidden_size, 1, bias=False)
        self.head.weight.data.copy_(head)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, s] -> score."""
        return self.head(self.backbone(ids).last_hidden_state[0, -1])[0]


def hf_reward_model(folder: Path, run: Run) -> Any:
    """Hugging Face's sequence classifier with the weights of the run's start."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(folder / "hf", num_labels=1).eval()
    model.score.weight.data.copy_(reward_head(folder, run))
    return model


def adapted_reward_model(folder: Path, run: Run) -> Any:
    """`hf_reward_model` with adapters of peft for sequence classification, which train the head whole."""
    return with_adapters(hf_reward_model(folder, run), run, task_type="SEQ_CLS")


def reward_curve(
    folder: Path, steps: int, token: int | None = None, swapped: bool = False, model: Any = None
) -> Curve:
    """A plain loop over a model of Hugging Face's classes, by default one whose weights are all trained. The
    score is read at the last token, which is `token` if that is given; a conversation at a time."""
    run = run_of(folder)
    rows = pairs_in_order(run, steps)
    model = model or PlainRewardModel(reward_head(folder, run))
    score = model.score if isinstance(model, PlainRewardModel) else lambda ids: model(ids).logits[0, 0]
    optimizer = adamw(model, run)
    last = [] if token is None else [token]
    names = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    curve = []
    for step in range(steps):
        scores = []
        for row in rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]:
            ids = [torch.tensor([row["prompt_ids"] + row[f"{name}_ids"] + last]) for name in names]
            scores.append(torch.stack([score(i) for i in ids]))
        chosen, rejected = torch.stack(scores).T
        loss = -torch.sigmoid(chosen - rejected).log().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_grad)
        optimizer.step()
        means = chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).float().mean()
        curve.append([loss.item(), norm.item(), *(float(mean) for mean in means)])
    return curve


def logprob(model: Any, row: dict[str, list[int]], name: str) -> torch.Tensor:
    """log p(answer | prompt)."""
    answer = torch.tensor(row[f"{name}_ids"])
    logits = model(torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])).logits[0]
    logprobs = logits.log_softmax(-1)[-len(answer) - 1 : -1]
    return logprobs.gather(1, answer[:, None]).sum()


def paper_loss(
    settings: Any, pair: Any, sizes: list[int], means: list[float]
) -> tuple[torch.Tensor, list[float]]:
    """Loss of one pair and the two rewards; `means`: mean log-ratios of the batch, at least 0."""
    (good, good_before), (bad, bad_before) = pair
    beta, sigmoid = settings.beta, torch.sigmoid
    ratios = good - good_before, bad - bad_before
    average = good / sizes[0], bad / sizes[1]
    rewards = [float(beta * ratio) for ratio in ratios]
    if settings.loss == "dpo":
        loss = -sigmoid(beta * (ratios[0] - ratios[1])).log()
    elif settings.loss == "ipo":
        loss = (ratios[0] / sizes[0] - ratios[1] / sizes[1] - 1 / (2 * beta)) ** 2
    elif settings.loss == "kto":
        desirable = settings.kto_desirable_weight * (1 - sigmoid(beta * (ratios[0] - means[1])))
        undesirable = settings.kto_undesirable_weight * (1 - sigmoid(beta * (means[0] - ratios[1])))
        loss = (desirable + undesirable) / 2
    else:
        rewards = [float(beta * value) for value in average]
        odds = [value.exp() / (1 - value.exp()) for value in average]
        if settings.loss == "orpo":
            loss = -average[0] - settings.orpo_lambda * sigmoid((odds[0] / odds[1]).log()).log()
        else:
            loss = -sigmoid(beta * (average[0] - average[1]) - settings.simpo_gamma).log()
    return loss, rewards
