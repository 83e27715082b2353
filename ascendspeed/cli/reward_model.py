"""Model and data of a run of --stage rm, which makes a reward model of a language model. No torch."""

from dataclasses import replace

from ascendspeed.config.schema import DataConfig, ModelConfig, PreferenceConfig
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError


def resolve(
    preference: PreferenceConfig, data: DataConfig, model: ModelConfig, load: str | None
) -> ModelConfig:
    """Returns the model of the run: with a scalar head for --stage rm. Raises `UserError` for a stage, a
    family or a token that does not fit."""
    token = data.reward_token_id
    if not preference.trains_reward_model:
        if model.reward_head:
            raise UserError(f"--load {load} holds a reward model: add --stage rm, or --load a language model")
        if token is not None:
            raise UserError(f"--reward-token-id {token} belongs to --stage rm; add it, or leave the flag out")
        return model
    if FAMILIES[model.family].reward_architecture is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.reward_architecture)
        raise UserError(
            f"--stage rm: models of family {model.family} have no class for reward models; choose {known}"
        )
    if token is not None and not 0 <= token < model.vocab_size:
        raise UserError(f"--reward-token-id {token} is not in the vocabulary of {model.vocab_size} tokens")
    if model.reward_head and token not in (None, model.scored_token_id):
        raise UserError(
            f"--reward-token-id {token}: --load {load} reads its score at token {model.scored_token_id}; "
            "leave the flag out"
        )
    if model.reward_head:
        return model
    return replace(model, reward_head=True, scored_token_id=token)


def data_of(data: DataConfig, model: ModelConfig) -> DataConfig:
    """Returns the data settings with the token at which a loaded reward model is scored."""
    return replace(data, reward_token_id=model.scored_token_id) if model.reward_head else data
