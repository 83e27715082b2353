"""How each generation of InternLM writes a conversation down, as data; and which model takes which.

A pattern is text in which `{content}`, `{name}` and the control tokens stand in braces. Control tokens are found in the tokenizer
by their strings, so that no id is written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError

EOS = "eos"
"""Among the strings of a control token: whatever ends a document in this tokenizer."""


@dataclass(frozen=True)
class ChatTemplate:
    """One way to write a conversation down, after the one BOS that begins it."""

    turns: Mapping[str, str]
    """Role -> pattern of its whole turn."""
    answer: str
    """Pattern of what opens the assistant's next turn."""
    controls: Mapping[str, tuple[str, ...]]
    """Name in braces -> strings of the token in tokenizers, the first that is there counts."""
    stops: tuple[str, ...]
    """Controls that end the assistant's turn."""
    name: str = ""
    """Pattern of the name of who speaks (`{name}`); empty: nobody has a name here."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """Kind of tool -> pattern of a call in the assistant's turn; empty: the models know no tools."""
    guarded: tuple[str, ...] = ()
    """Strings that are pieces of some of these vocabularies, and that text must not become."""


V1 = ChatTemplate(
    # The newest `build_inputs` of the original model code: no <eoh>. `<|User|>` and its like are plain text in this vocabulary.
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
V1_EOH = replace(  # the first chat models and the fine-tuning tools of 2023
    V1,
    turns=V1.turns | {"user": "<|User|>:{content}{eoh}\n"},
    controls=V1.controls | {"eoh": ("<eoh>",)},
)

NAMES = ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")
UNUSED = {name: f"[UNUSED_TOKEN_{141 + i}]" for i, name in enumerate(NAMES)}
"""What the tokens are called where a vocabulary's JSON files do not name them yet."""

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
OF_FAMILY = {"internlm": "v1", "internlm2": "v2", "internlm3": "v3"}


def choose_template(
    tokenizer: Tokenizer, family: str | None = None, name: str | None = None
) -> tuple[str, ChatTemplate]:
    """(name, template): the one that is asked for by name, else that of the model's family, else what the tokenizer tells.

    An InternLM that was exported as a Llama is known by its tokenizer. Raises `UserError` when there is no telling, or the
    tokenizer lacks a control token that the template cannot do without.
    """
    found = name or OF_FAMILY.get(family or "") or _told_by(tokenizer)
    if found is None:
        raise UserError(
            f"no chat template is known for a model of family {family or 'unknown'} with the tokenizer in {tokenizer.path}; "
            f"say which it takes: --chat-template {'|'.join(TEMPLATES)}"
        )
    if found not in TEMPLATES:
        raise UserError(f"--chat-template {found} does not exist; there are {', '.join(TEMPLATES)}")
    template = TEMPLATES[found]
    patterns = "".join((*template.turns.values(), template.answer))
    needed = {control for control in template.controls if f"{{{control}}}" in patterns}
    for control in sorted(needed):
        if first_token_id(tokenizer, template.controls[control]) is None:
            there = " nor ".join(repr(string) for string in template.controls[control])
            raise UserError(
                f"{tokenizer.path}: the tokenizer has no token {there}, which the chat template {found} needs; "
                "is it the tokenizer of this model? Another template: --chat-template"
            )
    return found, template


def _told_by(tokenizer: Tokenizer) -> str | None:
    for name in ("v2.5", "v2"):
        controls = TEMPLATES[name].controls
        if all(
            first_token_id(tokenizer, controls[control]) is not None
            for control in ("im_start", "im_end", "action_start")
        ):
            return name
    if all(first_token_id(tokenizer, (string,)) is not None for string in ("<eoh>", "<eoa>")):
        return "v1"
    return None


def first_token_id(tokenizer: Tokenizer, strings: tuple[str, ...]) -> int | None:
    """Id of the first of the strings that is a token."""
    for string in strings:
        number = tokenizer.eos if string == EOS else tokenizer.token_to_id(string)
        if number is not None:
            return number
    return None
