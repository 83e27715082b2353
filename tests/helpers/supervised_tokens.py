"""Answers that a truncation loses, counted by a loop."""

from ascendspeed.data.document import Truncation


def lost_by_hand(documents, length):
    """Returns the losses of documents that are truncated to `length` tokens and kept."""
    truncation = Truncation()
    for document in documents:
        answers = []  # [first token, last token]
        previous = False
        for index, supervised in enumerate(document.loss_mask.tolist()):
            if supervised and not previous:
                answers.append([index, index])
            if supervised:
                answers[-1][1] = index
            previous = supervised
        if len(document.tokens) > length and any(document.loss_mask[1:length]):
            lost = sum(first >= length for first, _ in answers)
            truncation += Truncation(1, lost, sum(first < length <= last for first, last in answers))
    return truncation
