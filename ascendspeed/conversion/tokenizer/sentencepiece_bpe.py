"""Converts a sentencepiece BPE model to the ordered merges of tokenizer.json; detects models for which that
is not exact.
"""

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
    """A property of the tokenizer that tokenizer.json cannot express; the message begins with a verb."""


def read(path: Path) -> Any:
    """Reads the stored model. Raises `InexactTokenizerError` if the file is not a sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which reading weights does not

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(checked_file(path).read_bytes())
    except Exception as error:  # DecodeError, a class of its own in each implementation of protobuf
        raise InexactTokenizerError(f"is no sentencepiece model ({error})") from None
    return model


def parse(path: Path) -> Any:
    """Reads the model. Raises `InexactTokenizerError` if it does more than merge characters."""
    model = read(path)
    text = model.normalizer_spec
    trainer = model.trainer_spec
    types = {piece.type for piece in model.pieces}
    problems = {
        "is not BPE": trainer.model_type != trainer.BPE,
        "normalises the text": bool(
            text.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        ),
        "removes spaces": text.remove_extra_whitespaces,
        "does not write spaces as ▁": not text.escape_whitespaces,
        "puts spaces behind words": trainer.treat_whitespace_as_suffix,
        "begins the text with a space and has user-defined pieces": text.add_dummy_prefix
        and USER_DEFINED in types,
        "has no piece for what is unknown": UNKNOWN not in types,
    }
    for problem, applies in problems.items():
        if applies:
            raise InexactTokenizerError(problem)
    return model


class Merge(NamedTuple):
    """A piece as the concatenation of two others."""

    score: float
    piece: int
    """Id of the piece."""
    left: str
    right: str


def merges(pieces: Any) -> list[Merge]:
    """Returns every merge in the order in which sentencepiece prefers them. Raises `InexactTokenizerError`.

    The best score comes first. Among equal scores sentencepiece takes the leftmost in the text, which no
    fixed order expresses for every text; but if two of them compete for the same symbols, "xy" and "yz" in x
    y z, the one that can be on the left comes first. Two merges for one piece compete only in runs of one
    pattern, which fill up from the left: the longer left part comes first.
    """
    ordered: list[Merge] = []
    for _, tied in groupby(_all_merges(pieces), attrgetter("score")):
        ordered += _leftmost_first(list(tied), pieces)
    return ordered


def _all_merges(pieces: Any) -> list[Merge]:
    types = {piece.piece: piece.type for piece in pieces if piece.type in (NORMAL, UNUSED)}
    all_merges = []
    for number, piece in enumerate(pieces):
        text = piece.piece
        piece_type = types.get(text)
        if piece_type is None:
            continue
        splits = [at for at in range(1, len(text)) if text[:at] in types and text[at:] in types]
        if piece_type == UNUSED and (splits or len(text) == 1):
            raise InexactTokenizerError(f"makes the unused piece {text!r} and takes it apart again")
        all_merges += [Merge(piece.score, number, text[:at], text[at:]) for at in splits]
    return sorted(all_merges, key=lambda merge: (-merge.score, merge.piece, -len(merge.left)))


def competing(tied: Sequence[Merge]) -> Iterator[tuple[Merge, Merge]]:
    """Yields pairs of merges for different pieces that want the same symbol: the first on its right, the
    second on its left.
    """
    by_left = defaultdict(list)
    for merge in tied:
        by_left[merge.left].append(merge)
    return (
        (first, second)
        for first in tied
        for second in by_left.get(first.right, ())
        if first.piece != second.piece
    )


def _leftmost_first(tied: list[Merge], pieces: Any) -> list[Merge]:
    """Orders merges of equal score so that of two competing ones the left one comes first."""
    if len({merge.piece for merge in tied}) == 1:
        return tied
    pairs = [(first.piece, second.piece) for first, second in competing(tied)]
    if not pairs:
        return tied
    predecessors = TopologicalSorter({merge.piece: () for merge in tied})
    for first, second in pairs:
        predecessors.add(second, first)
    try:
        rank = {piece: i for i, piece in enumerate(predecessors.static_order())}
    except CycleError as error:
        names = ", ".join(repr(pieces[piece].piece) for piece in error.args[1][1:])
        raise InexactTokenizerError(
            f"gives {names} one score, so that their place in the text decides"
        ) from None
    return sorted(tied, key=lambda merge: rank[merge.piece])
