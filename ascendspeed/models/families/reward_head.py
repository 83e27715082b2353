"""Entries of a reward model's config.json: its class, one label, and the token at which the score is read."""

from collections.abc import Mapping
from typing import Any

from ascendspeed.config.schema import ModelConfig
from ascendspeed.utils.errors import UserError

TOKEN = "reward_token_id"
CLASSIFIER = "ForSequenceClassification"
"""End of the names of transformers' classes with a head of several labels, which is a scalar one for one
label."""


def read(config_json: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """Fields of `ModelConfig` of a reward model; none if the file is of another model.

    Raises `UserError` for a head of several labels and for an ill-typed token.
    """
    named = config_json.get("architectures")
    if architecture is None or not isinstance(named, list) or architecture not in named:
        return {}
    labels = config_json.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config_json.get("num_labels", 2)
    if architecture.endswith(CLASSIFIER) and count != 1:
        raise UserError(f"config.json: {architecture} with {count} labels is not supported, only with 1")
    token = config_json.get(TOKEN)
    if token is not None and (type(token) is not int or token < 0):
        raise UserError(f"config.json: {TOKEN} = {token!r} is not the id of a token")
    return {"reward_head": True, "scored_token_id": token}


def write(config: ModelConfig, architecture: str | None) -> dict[str, Any]:
    """Entries of config.json of a reward model; none for another model. Raises `UserError` for a family
    without reward models."""
    if not config.reward_head:
        return {}
    if architecture is None:
        raise UserError(f"models of family {config.family} have no class for reward models")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    token = {} if config.scored_token_id is None else {TOKEN: config.scored_token_id}
    return {"architectures": [architecture]} | (labels if architecture.endswith(CLASSIFIER) else {}) | token
