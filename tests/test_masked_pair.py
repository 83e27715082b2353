"""Masked pairs, the two files of ids and labels: names, facts, damage, supervised tokens, writers."""

import json
import re

import numpy as np
import pytest
from helpers.packing import SEQ, VOCAB, build, write
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import dataset_facts, dataset_files, open_dataset
from ascendspeed.data.indexed import masked_pair
from ascendspeed.data.indexed.masked_pair import MaskedPair, MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import PairWriter, pair_file
from ascendspeed.utils.errors import UserError


def test_names_of_a_masked_pair(tmp_path):
    write(tmp_path / "p", 20)
    ids, labels = (f"{tmp_path}/p_{key}_document" for key in masked_pair.KEYS)
    assert ids.endswith("p_packed_input_ids_document")
    assert labels.endswith("p_packed_labels_document")
    for name in ("p", "p_packed", "p_packed_input_ids_document"):
        samples = build(tmp_path / name)["train"]
        assert samples.sample(0)[0].tolist() == build(tmp_path / "p")["train"].sample(0)[0].tolist()
        assert masked_pair.find_pairs(f"{tmp_path}/{name}") == (ids, labels)
        assert {str(path) for path in dataset_files(f"{tmp_path}/{name}")} == {
            f"{pair}.{x}" for pair in (ids, labels) for x in ("bin", "idx")
        }
        assert dataset_facts(f"{tmp_path}/{name}")["vocab_size"] == VOCAB
    with PairWriter(tmp_path / "p", np.dtype(np.int32)) as writer:  # a text pair of this name has priority
        writer.add(np.arange(100), np.array([100], np.int32))
        writer.commit({})
    assert masked_pair.find_pairs(f"{tmp_path}/p") is None
    with pytest.raises(UserError, match="there is no"):
        build(tmp_path / "absent")


def test_data_of_the_published_tool(tmp_path):
    """No metas, and a third pair that is not read."""
    write(tmp_path / "p", 40)
    expected = [build(tmp_path / "p")["train"].sample(n)[1].tolist() for n in range(10)]
    for key in masked_pair.KEYS:
        pair_file(masked_pair.pair_prefix(tmp_path / "p", key), "meta").unlink()
    for suffix in ("bin", "idx"):
        source = pair_file(masked_pair.pair_prefix(tmp_path / "p", masked_pair.KEYS[0]), suffix).read_bytes()
        (tmp_path / f"p_packed_attention_mask_document.{suffix}").write_bytes(source)
    samples = build(tmp_path / "p", is_instruction_dataset=True)["train"]
    assert [samples.sample(n)[1].tolist() for n in range(10)] == expected


def test_two_pairs_that_do_not_belong_together(tmp_path):
    write(tmp_path / "a", 20, SEQ)
    write(tmp_path / "b", 20, SEQ, start=1)  # the same lengths, other ids
    ids, labels = (masked_pair.pair_prefix(tmp_path / "a", key) for key in masked_pair.KEYS)

    def swap(suffixes):
        for suffix in suffixes:
            pair_file(labels, suffix).write_bytes(
                pair_file(masked_pair.pair_prefix(tmp_path / "b", masked_pair.KEYS[1]), suffix).read_bytes()
            )

    swap(("bin", "idx", "meta"))
    with pytest.raises(UserError, match=r"are not of the same documents; was a run killed\?"):
        build(tmp_path / "a")
    for pair in (ids, labels):
        pair_file(pair, "meta").unlink()
    samples = build(tmp_path / "a")["train"]  # unnoticed until a document is read
    with pytest.raises(UserError, match=r"document \d+ has labels that are neither its tokens nor -100"):
        samples.sample(0)
    write(tmp_path / "b", 21, seed=1)
    swap(("bin", "idx"))
    with pytest.raises(UserError, match="are not of the same documents"):
        build(tmp_path / "a")
    pair_file(labels, "bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a pair, or a copy was cut off"):
        build(tmp_path / "a")
    pair_file(labels, "idx").unlink()
    with pytest.raises(UserError, match=r"there is no .*labels_document\.idx"):
        build(tmp_path / "a")


def test_a_run_killed_between_the_two_pairs_leaves_nothing_that_opens(tmp_path, monkeypatch):
    write(tmp_path / "p", 20)
    committed = []

    def commit(self, facts):
        if committed:
            raise KeyboardInterrupt
        committed.append(self.prefix)
        original(self, facts)

    original = PairWriter.commit
    monkeypatch.setattr(PairWriter, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", 20, start=5)
    monkeypatch.undo()
    assert committed[0].endswith("labels_document")
    with pytest.raises(UserError, match="are not of the same documents"):
        build(tmp_path / "p")
    assert not list(tmp_path.glob("*.tmp"))
    write(tmp_path / "p", 20, start=5)
    build(tmp_path / "p")


def test_both_metas_are_equal(tmp_path):
    write(tmp_path / "p", 20)
    metas = [
        json.loads(pair_file(masked_pair.pair_prefix(tmp_path / "p", key), "meta").read_text())
        for key in masked_pair.KEYS
    ]
    hashes = [{meta.pop(f"{file}_samples_sha256") for file in ("bin", "idx")} for meta in metas]
    assert metas[0] == metas[1]
    assert hashes[0] != hashes[1]
    assert re.fullmatch("[0-9a-f]{64}", metas[0]["digest"])
    before = metas[0]["digest"]
    write(tmp_path / "p", 20, start=1)
    assert (
        json.loads(
            pair_file(masked_pair.pair_prefix(tmp_path / "p", masked_pair.KEYS[0]), "meta").read_text()
        )["digest"]
        != before
    )


def test_masked_pair_returns_its_documents(tmp_path):
    documents = write(tmp_path / "p", 30)
    dataset = MaskedPair("p", *masked_pair.find_pairs(f"{tmp_path}/p"))
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in documents]
    for number, (ids, supervised) in enumerate(documents):
        document = dataset.document(number)
        assert (document.tokens.tolist(), document.loss_mask.tolist()) == (ids, supervised)
    assert isinstance(open_dataset(f"{tmp_path}/p", DataConfig(), VOCAB), MaskedPair)


MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=30)


@given(MASKS, st.integers(1, 12), st.integers(1, 40))
def test_supervised_counts_equal_a_loop(tmp_path_factory, masks, length, chunk):
    prefix = tmp_path_factory.mktemp("masks") / "p"
    lengths = np.array([len(mask) for mask in masks], np.int32)
    with MaskedPairWriter(prefix) as writer:
        writer.add(np.arange(lengths.sum()), lengths, np.concatenate(masks))
        writer.commit({})
    for key in masked_pair.KEYS:
        pair_file(masked_pair.pair_prefix(prefix, key), "meta").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_pair, "CHUNK", chunk)
        chosen = np.arange(len(masks))[::-2]
        supervision = MaskedPair(str(prefix), *masked_pair.find_pairs(str(prefix))).supervision(
            chosen, length
        )
    for index, number in enumerate(chosen):
        mask = masks[number]
        answers = "".join("x" if supervised else " " for supervised in mask)
        begins = [m.span() for m in re.finditer("x+", answers)]
        assert supervision.tokens[index] == sum(mask[1:length])
        assert supervision.lost_answers[index] == sum(begin >= length for begin, _ in begins)
        assert supervision.cut_answers[index] == sum(begin < length < end for begin, end in begins)


def test_labels_and_attention_masks_cannot_be_trained_on(tmp_path):
    write(tmp_path / "p", 20)
    for key, what in {"packed_labels": "labels", "packed_attention_mask": "attention masks"}.items():
        with pytest.raises(UserError, match=f"p_{key}_document: these are {what}; give {tmp_path}/p$"):
            build(f"{tmp_path}/p_{key}_document")


def test_a_masked_pair_has_one_writer_at_a_time(tmp_path):
    with (
        PairWriter(masked_pair.pair_prefix(tmp_path / "p", masked_pair.KEYS[1]), np.dtype(np.int32)),
        pytest.raises(UserError, match="another process is writing"),
    ):
        MaskedPairWriter(tmp_path / "p")
    assert not list(tmp_path.iterdir())
