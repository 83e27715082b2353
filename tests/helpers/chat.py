"""Chat templates, control tokens and vocabularies for tests."""

import io
import json
import re

import sentencepiece

from helpers.corpus import REAL, words

NAMES = ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")


UNUSED = {f"<|{name}|>": f"[UNUSED_TOKEN_{141 + i}]" for i, name in enumerate(NAMES)}


def vocabulary(folder, pieces, added=None):
    """Writes a tokenizer.model like InternLM's with the given strings as ordinary pieces, and names for added
    tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(300)),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        user_defined_symbols=list(pieces),
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    raw = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if added:
        numbers = [
            raw.piece_to_id(string) if string else raw.get_piece_size() + i
            for i, string in enumerate(added.values())
        ]
        named = dict(zip(numbers, added, strict=True))
        config["added_tokens_decoder"] = {
            str(number): {"content": name, "special": True} for number, name in named.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = {
    "v1": lambda folder: vocabulary(folder, ["<eoh>", "<eoa>"]),
    "v2": lambda folder: vocabulary(folder, UNUSED.values(), UNUSED),
    "v2-old": lambda folder: vocabulary(folder, UNUSED.values()),
    "v3": lambda folder: vocabulary(folder, [], dict.fromkeys(UNUSED)),
    "v1-real": lambda folder: REAL / "internlm",
    "v2-real": lambda folder: REAL / "internlm2",
}


def piecewise(tok, raw, text):
    """Ids of a rendered text; control tokens are split off first, as tokenizers do."""
    ids = []
    for part in re.split(r"(<s>|<\|\w+\|>)", text):
        if part == "<s>":
            ids.append(1)
        elif part in UNUSED:
            ids.append(tok.required_id(part) if tok.token_to_id(part) else raw.piece_to_id(UNUSED[part]))
        else:
            ids += raw.encode(part)
    return ids
