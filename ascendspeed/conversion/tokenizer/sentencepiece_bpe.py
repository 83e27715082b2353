"""A sentencepiece model as merges: what tokenizer.json needs, and which models it cannot say."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from ascendspeed.utils.safe_io import checked_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece's types of pieces


class InexactTokenizerError(Exception):
    """What cannot be said in a tokenizer.json, in words."""


def read(path: Path) -> Any:
    """The model as it is stored. Raises `Inexact` when it is none."""
    from sentencepiece import (
        sentencepiece_model_pb2,
    )  # here: it needs protobuf, which reading weights does not

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(checked_file(path).read_bytes())
    except Exception as error:  # protobuf's own DecodeError, of whichever implementation
        raise InexactTokenizerError(f"is no sentencepiece model ({error})") from None
    return model


def parse(path: Path) -> Any:
    """The model. Raises `Inexact` when it makes its ids in another way than by merging characters."""
    model = read(path)
    text, trainer, kinds = model.normalizer_spec, model.trainer_spec, {piece.type for piece in model.pieces}
    faults = {
        "is not BPE": trainer.model_type != trainer.BPE,
        "normalises the text": bool(
            text.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        ),
        "removes spaces": text.remove_extra_whitespaces,
        "does not write spaces as ▁": not text.escape_whitespaces,
        "puts spaces behind words": trainer.treat_whitespace_as_suffix,
        "begins the text with a space and has user-defined pieces": text.add_dummy_prefix
        and USER_DEFINED in kinds,
        "has no piece for what is unknown": UNKNOWN not in kinds,
    }
    for fault, found in faults.items():
        if found:
            raise InexactTokenizerError(fault)
    return model


class Merge(NamedTuple):
    """One way to make a piece of two."""

    score: float
    made: int
    """Number of the piece."""
    left: str
    right: str


def merges(pieces: Any) -> list[Merge]:
    """Every way to make a piece of two, in the order in which sentencepiece prefers them. Raises `Inexact`.

    The best score goes first. Of equal scores sentencepiece takes what stands further left in the text, which no order says for
    every text; but where two of them compete for the same symbols, "xy" and "yz" in x y z, the one that can stand on the left goes
    first. Two ways to make one piece compete only in runs of one pattern, which fill up from the left: the longer left part goes
    first.
    """
    found = _found(pieces)
    ordered: list[Merge] = []
    for _, tied in groupby(found, attrgetter("score")):
        ordered += _leftmost_first(list(tied), pieces)
    return ordered


def _found(pieces: Any) -> list[Merge]:
    kinds = {piece.piece: piece.type for piece in pieces if piece.type in (NORMAL, UNUSED)}
    found = []
    for number, piece in enumerate(pieces):
        text, kind = piece.piece, kinds.get(piece.piece)
        if kind is None:
            continue
        splits = [at for at in range(1, len(text)) if text[:at] in kinds and text[at:] in kinds]
        if kind == UNUSED and (splits or len(text) == 1):
            raise InexactTokenizerError(f"makes the unused piece {text!r} and takes it apart again")
        found += [Merge(piece.score, number, text[:at], text[at:]) for at in splits]
    return sorted(found, key=lambda merge: (-merge.score, merge.made, -len(merge.left)))


def competing(tied: Sequence[Merge]) -> Iterator[tuple[Merge, Merge]]:
    """Pairs of merges for different pieces that want the same symbol: the first on its right, the second on its left."""
    by_left = defaultdict(list)
    for merge in tied:
        by_left[merge.left].append(merge)
    return (
        (first, second)
        for first in tied
        for second in by_left.get(first.right, ())
        if first.made != second.made
    )


def _leftmost_first(tied: list[Merge], pieces: Any) -> list[Merge]:
    if len({merge.made for merge in tied}) == 1:
        return tied
    after = TopologicalSorter({merge.made: () for merge in tied})
    pairs = [(first.made, second.made) for first, second in competing(tied)]
    if not pairs:
        return tied
    for first, second in pairs:
        after.add(second, first)
    try:
        rank = {made: i for i, made in enumerate(after.static_order())}
    except CycleError as error:
        names = ", ".join(repr(pieces[made].piece) for made in error.args[1][1:])
        raise InexactTokenizerError(
            f"gives {names} one score, so that their place in the text decides"
        ) from None
    return sorted(tied, key=lambda merge: rank[merge.made])
