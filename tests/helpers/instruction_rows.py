"""Rows of instruction data for tests."""

import random

from helpers.corpus import words


def conversations(count):
    """Conversations of one to three turns, all different."""
    texts = iter(words(6 * count))
    generator = random.Random(count)
    result = []
    for _ in range(count):
        messages = []
        for _ in range(generator.randint(1, 3)):
            messages.append({"from": "human", "value": next(texts)})
            messages.append({"from": "gpt", "value": next(texts)})
        result.append(messages)
    return result


ROWS = [{"id": number, "conversations": messages} for number, messages in enumerate(conversations(120))]
