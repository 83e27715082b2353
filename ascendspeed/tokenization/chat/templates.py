"""Chat templates of every InternLM generation as data, and the choice of a template for a model.

A pattern is text with placeholders in braces: `{content}`, `{name}` and the names of control tokens. Control
tokens are looked up in the tokenizer by their strings, so templates contain no ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

EOS = "eos"
"""Placeholder among the strings of a control token: the end-of-document token of the tokenizer."""


@dataclass(frozen=True)
class ChatTemplate:
    """Layout of a conversation after its BOS token."""

    turns: Mapping[str, str]
    """Role -> pattern of its whole turn."""
    answer: str
    """Pattern of the header that opens the assistant's next turn."""
    controls: Mapping[str, tuple[str, ...]]
    """Name of a control token -> its possible strings in tokenizers; the first one that is a token counts."""
    stops: tuple[str, ...]
    """Names of the control tokens that end the assistant's turn."""
    name: str = ""
    """Pattern of the speaker's name (`{name}`); empty: names are not supported."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """Kind of tool -> pattern of a call in the assistant's turn; empty: tools are not supported."""
    guarded: tuple[str, ...] = ()
    """Strings of control tokens that are ordinary pieces of some vocabularies; text must never be encoded as
    one."""


V1 = ChatTemplate(
    # As the latest `build_inputs` of the original model code: no <eoh>. `<|User|>` etc. are plain text in
    # this vocabulary.
    turns={
        "system": "<|System|>:{content}\n",
        "user": "<|User|>:{content}\n",
        "assistant": "<|Bot|>:{content}{eoa}\n",
    },
    answer="<|Bot|>:",
    controls={"eoa": ("<eoa>", EOS)},
    stops=("eoa",),
    guarded=("<eoh>", "<eoa>"),
)
V1_EOH = replace(  # the first chat models, and the fine-tuning tools of 2023
    V1,
    turns={**V1.turns, "user": "<|User|>:{content}{eoh}\n"},
    controls={**V1.controls, "eoh": ("<eoh>",)},
)

NAMES = ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")
UNUSED = {name: f"[UNUSED_TOKEN_{141 + i}]" for i, name in enumerate(NAMES)}
"""Strings of the tokens in vocabularies whose JSON files do not name them."""

V25 = ChatTemplate(
    turns={
        role: "{im_start}" + role + "{name}\n{content}{im_end}\n"
        for role in ("system", "user", "assistant", "environment")
    },
    answer="{im_start}assistant\n",
    controls={name: (f"<|{name}|>",) for name in NAMES},
    stops=("im_end",),
    name=" name={name}",
    calls={kind: "{action_start}{" + kind + "}\n{content}{action_end}" for kind in ("plugin", "interpreter")},
    guarded=(*(f"<|{name}|>" for name in NAMES), *UNUSED.values()),
)
V2 = replace(V25, controls={name: (f"<|{name}|>", UNUSED[name]) for name in NAMES})

TEMPLATES: dict[str, ChatTemplate] = {"v1": V1, "v1-eoh": V1_EOH, "v2": V2, "v2.5": V25, "v3": V25}


def choose_template(
    tokenizer: Tokenizer, name: str | None = None, family: str | None = None
) -> tuple[str, ChatTemplate]:
    """Returns (name, template): `name` (from a flag or the model's family), else the tokenizer's template.

    An InternLM that was exported as a Llama is recognized by its tokenizer. `family` of the model is for the
    error; None: that of the config.json beside the tokenizer. Raises `UserError` if no template
    is known, or if the tokenizer lacks a control token that the template needs.
    """
    chosen = name or _detect_template(tokenizer)
    if chosen is None:
        raise UserError(
            f"no chat template is known for a model of family {family or _family_beside(tokenizer)} "
            f"with the tokenizer in {tokenizer.path}; choose one: --chat-template {'|'.join(TEMPLATES)}"
        )
    if chosen not in TEMPLATES:
        raise UserError(f"--chat-template {chosen} does not exist; choose from {', '.join(TEMPLATES)}")
    template = TEMPLATES[chosen]
    patterns = "".join((*template.turns.values(), template.answer))
    for control in sorted(template.controls):
        if f"{{{control}}}" in patterns and first_token_id(tokenizer, template.controls[control]) is None:
            strings = " nor ".join(repr(string) for string in template.controls[control])
            raise UserError(
                f"{tokenizer.path}: the tokenizer has no token {strings}, which the chat template {chosen} "
                "needs; check that it is the tokenizer of this model, or choose another --chat-template"
            )
    return chosen, template


def _detect_template(tokenizer: Tokenizer) -> str | None:
    """Returns the template whose control tokens the tokenizer has."""
    for name in ("v2.5", "v2"):
        controls = TEMPLATES[name].controls
        required = ("im_start", "im_end", "action_start")
        if all(first_token_id(tokenizer, controls[control]) is not None for control in required):
            return name
    if all(first_token_id(tokenizer, (string,)) is not None for string in ("<eoh>", "<eoa>")):
        return "v1"
    return None


def _family_beside(tokenizer: Tokenizer) -> str:
    """Returns `model_type` of the config.json beside the tokenizer, else `unknown`."""
    path = tokenizer.path / "config.json"
    return str(read_json_object(path).get("model_type") or "unknown") if path.is_file() else "unknown"


def first_token_id(tokenizer: Tokenizer, strings: tuple[str, ...]) -> int | None:
    """Returns the id of the first string that is a token; None if none of them is."""
    for string in strings:
        number = tokenizer.eos if string == EOS else tokenizer.token_to_id(string)
        if number is not None:
            return number
    return None
