"""Documents with masks: packed first-fit into rows, as a naive loop packs them, and read as a row assembled
by hand."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.log_lines import log_lines
from helpers.packing import SEED, SEQ, VOCAB, build, write
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.cli.train_args import resolve
from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits, dataset_facts, micro_batches
from ascendspeed.data.indexed import masked_pair
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import PairWriter, pair_file
from ascendspeed.data.packing.algorithms import first_fit, one_per_row
from ascendspeed.utils.errors import UserError


def naive_first_fit(lengths, row):
    """Documents of each row."""
    rows, free = [], []
    for document, length in enumerate(min(length, row) for length in lengths):
        number = next((n for n, positions in enumerate(free) if positions >= length), len(rows))
        if number == len(rows):
            rows.append([])
            free.append(row)
        rows[number].append(document)
        free[number] -= length
    return rows


def rows_of(packing):
    return [packing.documents[a:b].tolist() for a, b in pairwise(packing.bounds)]


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 50))
def test_first_fit_is_what_a_naive_loop_finds(lengths, row):
    packing = first_fit(np.array(lengths, np.int64), row)
    assert rows_of(packing) == naive_first_fit(lengths, row)
    assert (packing.stops - packing.starts).tolist() == [min(lengths[d], row) for d in packing.documents]
    assert not packing.starts.any()
    assert len(packing) == len(packing.bounds) - 1
    assert packing.tokens == sum(min(length, row) for length in lengths)


def test_next_fit_and_best_fit_would_be_seen():
    """By hand; next fit and best fit put the third document beside the second."""
    assert rows_of(first_fit(np.array([6, 7, 3, 4]), 10)) == [[0, 2], [1], [3]]


@given(LENGTHS, st.integers(1, 50))
def test_one_each(lengths, row):
    packing = one_per_row(np.array(lengths, np.int64), row)
    assert rows_of(packing) == [[number] for number in range(len(lengths))]
    assert packing.stops.tolist() == [min(length, row) for length in lengths]


def by_hand(documents, passes, pack=naive_first_fit):
    """Rows as lists of (token, label or None, position)."""
    order = np.random.RandomState(SEED).permutation(len(documents))
    shuffled = [documents[d] for d in order]
    shuffled = [(ids, supervised) for ids, supervised in shuffled if any(supervised[1:SEQ])]
    rows = []
    for row in pack([len(ids) for ids, _ in shuffled], SEQ):
        row_tokens = []
        for document in row:
            ids, supervised = (column[:SEQ] for column in shuffled[document])
            for i in range(len(ids)):
                counts = i + 1 < len(ids) and supervised[i + 1]
                row_tokens.append((ids[i], ids[i + 1] if counts else None, i))
        rows.append(row_tokens)
    return [
        rows[r] for epoch in range(passes) for r in np.random.RandomState(SEED + epoch).permutation(len(rows))
    ]


def check(sample, row):
    tokens, labels, mask, positions = (column.tolist() for column in sample)
    filling = SEQ - len(row)
    assert tokens[: len(row)] == [token for token, _, _ in row]
    assert [label if counts else None for label, counts in zip(labels, mask, strict=True)] == [
        *(label for _, label, _ in row),
        *[None] * filling,
    ]
    assert positions == [position for _, _, position in row] + list(range(filling))
    assert all(0 <= i < VOCAB for i in tokens + labels)
    assert [column.dtype for column in sample] == [torch.int64, torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("packing", ["first-fit", "none"])
def test_rows_are_those_assembled_by_hand(tmp_path, packing):
    documents = write(tmp_path / "p", 60)
    pack = (
        naive_first_fit if packing == "first-fit" else lambda lengths, row: [[d] for d in range(len(lengths))]
    )
    expected = by_hand(documents, 3, pack)
    samples = build(tmp_path / "p", packing=packing)["train"]
    assert len(expected) == 3 * len(samples)
    for number, row in enumerate(expected):
        check(samples.sample(number), row)
    # Controls: the mask one further, positions that do not restart, another order.
    first = (
        next(row for row in expected if len({p for _, _, p in row}) < len(row))
        if packing == "first-fit"
        else expected[0]
    )
    sample = samples.sample(expected.index(first))
    for wrong in (
        (sample[0], sample[1], sample[2].roll(1), sample[3]),
        (sample[0], sample[1], torch.ones(SEQ), sample[3]),
        samples.sample(expected.index(first) + 1),
    ):
        with pytest.raises(AssertionError):
            check(wrong, first)
    if packing == "first-fit":
        with pytest.raises(AssertionError):
            check((*sample[:3], torch.arange(SEQ)), first)


def test_every_supervised_token_is_a_label_once_in_an_epoch(tmp_path):
    documents = write(tmp_path / "p", 200, longest=SEQ)
    expected = sorted(
        token
        for ids, supervised in documents
        for token, counts in zip(ids[1:], supervised[1:], strict=True)
        if counts
    )
    for packing in ("first-fit", "none"):
        samples = build(tmp_path / "p", packing=packing)["train"]
        for epoch in (0, 1):
            numbers = range(epoch * len(samples), (epoch + 1) * len(samples))
            labels = [
                label for n in numbers for label in samples.sample(n)[1][samples.sample(n)[2] > 0].tolist()
            ]
            assert sorted(labels) == expected


def test_note_at_the_start(tmp_path):
    documents = write(tmp_path / "p", 100, longest=60)
    samples = build(tmp_path / "p")["train"]
    cut = sum(len(ids) > SEQ and any(supervised[1:SEQ]) for ids, supervised in documents)
    lost = sum(not any(supervised[1:SEQ]) for _, supervised in documents)
    ends = sum(
        len(ids) // 2 < SEQ < len(ids) and any(supervised[1:SEQ]) for ids, supervised in documents
    )  # half of each is supervised
    supervised = sum(sum(supervised[1:SEQ]) for _, supervised in documents)
    taken = sum(min(len(ids), SEQ) for ids, supervised in documents if any(supervised[1:SEQ]))
    assert cut
    assert lost
    share = taken / (SEQ * len(samples))
    assert samples.notes == [
        f"{tmp_path}/p: {100 - lost} documents in {len(samples)} rows of {SEQ} tokens, {share:.1%} filled, "
        f"{supervised:,} of {taken:,} tokens in the loss; {cut} documents cut to --seq-length {SEQ}: 0 "
        f"answers lost, {ends} cut; "
        f"{lost} left out, as nothing of their answers fits"
    ]
    assert (
        build(tmp_path / "p", packing="none")["train"]
        .notes[0]
        .startswith(f"{tmp_path}/p: {100 - lost} documents in {100 - lost} rows")
    )


def test_batches_depend_on_consumed_samples_alone(tmp_path):
    write(tmp_path / "p", 80)
    samples = build(tmp_path / "p")["train"]

    def tokens(batches):
        return torch.cat([torch.cat([b.tokens, b.labels, b.position_ids], 1) for b in batches]).tolist()

    steps = [tokens(micro_batches(samples, consumed, 8, 2)) for consumed in range(0, 400, 8)]
    assert 3 * len(samples) < 400
    for step in (49, 3, 22, 0):  # a resumed run
        again = build(tmp_path / "p")["train"]
        assert tokens(micro_batches(again, step * 8, 8, 2)) == steps[step]
        for size in (2, 4):
            ranks = [micro_batches(again, step * 8, 8, 2, rank, size) for rank in range(size)]
            assert [
                row for n in range(len(ranks[0])) for rank in ranks for row in tokens([rank[n]])
            ] == steps[step]


def test_splits_and_blends_with_plain_text(tmp_path):
    documents = write(tmp_path / "p", 100, longest=SEQ)
    text_ids = np.arange(30_000, 31_000, dtype=np.int32)
    with PairWriter(tmp_path / "t", np.dtype(np.int32)) as writer:
        writer.add(text_ids, np.full(100, 10, np.int32))
        writer.commit({})
    splits = build(tmp_path / "p", ("train", "valid"), split="80,20,0")
    tokens = {
        name: {
            t
            for n in range(len(samples))
            for t, p in zip(*(x.tolist() for x in samples.sample(n)[::3]), strict=True)
            if t or p == 0
        }
        for name, samples in splits.items()
    }
    first_of_valid = documents[80][0][0]
    assert max(tokens["train"]) == first_of_valid - 1
    assert min(tokens["valid"] - {0}) == first_of_valid
    blend = build_splits(
        DataConfig(
            data_path=("1", str(tmp_path / "p"), "3", str(tmp_path / "t")), seq_length=SEQ, split="1,0,0"
        ),
        SEED,
        VOCAB,
        ("train",),
    )["train"]
    kinds = ["plain" if int(blend.sample(n)[0][0]) >= 30_000 else "packed" for n in range(200)]
    assert kinds.count("packed") == 50
    assert len(blend.notes) == 1
    text = next(blend.sample(n) for n in range(200) if kinds[n] == "plain")
    assert text[2].tolist() == [1.0] * SEQ
    assert text[3].tolist() == list(range(SEQ))


def test_errors_at_the_start(tmp_path):
    write(tmp_path / "p", 20, SEQ)
    with pytest.raises(UserError, match=r"/p: --split 1,0,0 gives valid 0 of 20 documents$"):
        build(tmp_path / "p", ("valid",))
    with pytest.raises(
        UserError, match=r"--split 8,2 gives valid 4 of 20 documents; none .* at --seq-length 1$"
    ):
        build(tmp_path / "p", ("valid",), seq_length=1, split="8,2")
    valid = (str(tmp_path / "p"),)
    with pytest.raises(
        UserError, match=r"/p: valid has all of the 20 documents; none fills a row or has a supervised token"
    ):
        build(tmp_path / "p", ("valid",), seq_length=1, valid_data_path=valid)
    highest = dataset_facts(f"{tmp_path}/p")["max_token"]
    data = DataConfig(data_path=(f"{tmp_path}/p",), seq_length=SEQ, split="1,0,0")
    with pytest.raises(
        UserError, match=f"p has the token id {highest}, but the model's vocabulary has {highest} ids"
    ):
        build_splits(data, SEED, highest, ("train",))
    for key in masked_pair.KEYS:
        pair_file(masked_pair.pair_prefix(tmp_path / "p", key), "meta").unlink()
    samples = build_splits(data, SEED, highest, ("train",))["train"]
    with pytest.raises(UserError, match=f"p has the token id {highest}"):
        [samples.sample(n) for n in range(len(samples))]
    with PairWriter(tmp_path / "t", np.dtype(np.int32)) as writer:
        writer.add(np.arange(100), np.array([100], np.int32))
        writer.commit({})
    with pytest.raises(UserError, match=r"--is-instruction-dataset: .*t is plain text"):
        build(tmp_path / "t", is_instruction_dataset=True)


def test_no_pack_on_the_command_line():
    words = ["--data-path", "x", "--num-layers", "2", "--deepspeed"]
    assert resolve([*words, "--no-pack"], 1)[0].data.packing == "none"
    assert resolve([*words, "--no-pack", "--packing", "none"], 1)[0].data.packing == "none"
    assert resolve([*words, "--packing", "first-fit"], 1)[0].data.packing == "first-fit"
    with pytest.raises(UserError, match="--no-pack and --packing first-fit contradict each other"):
        resolve([*words, "--no-pack", "--packing", "first-fit"], 1)


def test_unsupervised_documents_are_left_out_and_counted(tmp_path):
    """Includes short documents: one token, or a prompt alone."""
    masks = [
        [False, True, True],
        [True],
        [False] * 5,
        [False] * SEQ + [True],
        [True, False, False],
        [False, True],
    ]
    lengths = np.array([len(mask) for mask in masks], np.int32)

    def write_masks(supervised):
        with MaskedPairWriter(tmp_path / "p") as writer:
            writer.add(np.arange(lengths.sum()), lengths, supervised)
            writer.commit({})

    write_masks(np.concatenate(masks))
    for packing in ("none", "first-fit"):
        samples = build(tmp_path / "p", packing=packing)["train"]
        assert len(samples) == (2 if packing == "none" else 1)
        assert all(samples.sample(n)[2].any() for n in range(len(samples)))
        (note,) = samples.notes
        assert "2 documents in" in note
        assert (
            "3 of 5 tokens in the loss; 1 left out, as nothing of their answers fits; 3 left out, as they "
            "have no supervised token" in note
        )
    assert sum(samples.sample(0)[2].tolist()) == 3
    write_masks(np.zeros(lengths.sum(), bool))
    with pytest.raises(UserError, match="p: no token of its 6 documents is supervised"):
        build(tmp_path / "p")
    for key in masked_pair.KEYS:  # of another tool
        pair_file(masked_pair.pair_prefix(tmp_path / "p", key), "meta").unlink()
    with pytest.raises(UserError, match="none fills a row or has a supervised token"):
        build(tmp_path / "p")


def test_packing_is_ignored_for_the_text_part_of_a_blend(tmp_path):
    write(tmp_path / "p", 40)
    with PairWriter(tmp_path / "t", np.dtype(np.int32)) as writer:
        writer.add(np.arange(100), np.array([100], np.int32))
        writer.commit({})
    data = DataConfig(data_path=("1", f"{tmp_path}/p", "1", f"{tmp_path}/t"), seq_length=SEQ, split="1,0,0")
    with log_lines() as lines:
        build_splits(data, SEED, VOCAB, ("train",))
        assert not lines
        build_splits(dataclasses.replace(data, packing="none"), SEED, VOCAB, ("train",))
    assert lines == [f"{tmp_path}/t: plain text, cut where a sample ends; --packing none means nothing to it"]
