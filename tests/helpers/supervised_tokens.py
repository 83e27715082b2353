"""Supervised tokens of a conversation, computed by hand."""

from ascendspeed.data.document import Truncation


def lost_by_hand(documents, length):
    """What is lost of documents that are cut and kept."""
    found = Truncation()
    for one in documents:
        answers, before = [], False
        for place, learnt in enumerate(one.loss_mask.tolist()):
            if learnt and not before:
                answers.append([place, place])
            if learnt:
                answers[-1][1] = place
            before = learnt
        if len(one.tokens) > length and any(one.loss_mask[1:length]):
            lost = sum(first >= length for first, _ in answers)
            found += Truncation(1, lost, sum(first < length <= last for first, last in answers))
    return found
