"""Rows of instruction data for tests."""

import random

from helpers.corpus import words


def talks(count):
    """Conversations of one to three turns, all different."""
    texts = iter(words(6 * count))
    chance = random.Random(count)
    turns = [[(next(texts), next(texts)) for _ in range(chance.randint(1, 3))] for _ in range(count)]
    return [
        [
            {"from": who, "value": text}
            for turn in one
            for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        for one in turns
    ]


ROWS = [{"id": i, "conversations": talk} for i, talk in enumerate(talks(120))]
