import fcntl
import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from ascendspeed.data.indexed.megatron_pair import PairWriter, check_pair, dtype_for, pair_file, read_facts
from ascendspeed.utils.errors import UserError

RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 60000, n) for n in (1, 5, 1000, 3, 70)]


def write(prefix, documents, dtype=np.int32, commit=True, facts=None):
    with PairWriter(prefix, np.dtype(dtype)) as writer:
        for part in (documents[:2], [], documents[2:]):
            tokens = np.concatenate(part) if part else np.zeros(0, np.int64)
            writer.add(tokens.astype(dtype), np.array([len(d) for d in part], np.int32))
        if commit:
            writer.commit(facts or {"tokens": writer.tokens})


def samples_of(prefix):
    """Hashes of a small pair as P.meta records them, by their definition: size and content."""
    hashes = {}
    for suffix in ("bin", "idx"):
        content = pair_file(prefix, suffix).read_bytes()
        hashes[f"{suffix}_samples_sha256"] = hashlib.sha256(b"%d\n" % len(content) + content).hexdigest()
    return hashes


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_equal_megatrons_byte_for_byte(tmp_path, dtype):
    write(tmp_path / "v1.5", DOCUMENTS, dtype)  # a dot in the prefix is no suffix
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    for suffix in ("bin", "idx"):
        assert (
            pair_file(tmp_path / "v1.5", suffix).read_bytes()
            == (tmp_path / f"megatron.{suffix}").read_bytes()
        )
    read = IndexedDataset(str(tmp_path / "v1.5"))
    assert [d.tolist() for d in read[0 : len(read)]] == [d.tolist() for d in DOCUMENTS]
    assert check_pair(tmp_path / "v1.5") == sum(map(len, DOCUMENTS))
    assert read_facts(tmp_path / "v1.5") == {"tokens": 1079} | samples_of(tmp_path / "v1.5")
    assert sorted(p.name for p in tmp_path.glob("v1.5*")) == ["v1.5.bin", "v1.5.idx", "v1.5.meta"]


@pytest.mark.parametrize("size", [2048, 65499, 65500, 65536, 103168])
def test_the_type_of_ids_is_megatrons(size):
    assert dtype_for(size) == DType.optimal_dtype(size)


def test_without_a_commit_nothing_changes(tmp_path):
    write(tmp_path / "p", DOCUMENTS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write(tmp_path / "p", DOCUMENTS[:3], commit=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_one_writer_at_a_time(tmp_path):
    with (
        PairWriter(tmp_path / "p", np.dtype(np.int32)),
        pytest.raises(UserError, match="another process is writing"),
    ):
        PairWriter(tmp_path / "p", np.dtype(np.int32))
    write(tmp_path / "p", DOCUMENTS)


def test_a_file_that_is_put_in_place_while_it_is_claimed_stays_whole(tmp_path, monkeypatch):
    """The other writer commits between our opening of its temporary file and our lock on it."""
    other = PairWriter(tmp_path / "p", np.dtype(np.int32))
    lock, done = fcntl.flock, []

    def flock(*args):
        if not done:
            done.append(1)
            other.add(np.arange(9), np.array([9], np.int32))
            other.commit({})
            other._bin.close()
        return lock(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with PairWriter(tmp_path / "p", np.dtype(np.int32)) as late:
        other.__exit__(None, None, None)  # must not delete files of the late writer
        assert check_pair(tmp_path / "p") == 9
        late.add(np.arange(5), np.array([5], np.int32))
        late.commit({})
    assert check_pair(tmp_path / "p") == 5


def test_errors_list_prefixes(tmp_path):
    for name in (
        *(f"p_packed_{key}_document" for key in ("input_ids", "labels", "attention_mask")),
        "text_document",
    ):
        (tmp_path / f"{name}.idx").touch()
    with pytest.raises(UserError, match=rf"prefixes here: {tmp_path}/p, {tmp_path}/text_document$"):
        check_pair(tmp_path / "gone")
    for number in range(30):
        (tmp_path / f"q{number:02}.idx").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/q08 and 22 more$"):
        check_pair(tmp_path / "gone")


def killed_at(step, prefix):
    """Commits a new pair in another process that dies before its system call number `step`; False if it got
    to the end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    for name in ("fsync", "unlink", "replace", "rename", "open"):
        setattr(os, name, counted(getattr(os, name)))
    write(prefix, DOCUMENTS[:3])
    os._exit(0)


def pair_bytes(prefix):
    return [pair_file(prefix, suffix).read_bytes() for suffix in ("bin", "idx", "meta")]


def test_killed_between_any_two_steps_there_is_the_old_pair_or_none_or_the_new_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write(old / "p", DOCUMENTS)
    write(new / "p", DOCUMENTS[:3])
    states, step = [], 0
    while True:
        at = tmp_path / f"step{step}"
        shutil.copytree(old, at)
        died = killed_at(step, at / "p")
        if not pair_file(at / "p", "idx").exists():
            states.append("none")
            with pytest.raises(UserError, match="there is no"):
                check_pair(at / "p")
        else:
            files = pair_bytes(at / "p")
            assert files in (pair_bytes(old / "p"), pair_bytes(new / "p"))
            states.append("old" if files == pair_bytes(old / "p") else "new")
        write(at / "p", DOCUMENTS[:3])  # leftovers do not prevent a new run
        assert pair_file(at / "p", "bin").read_bytes() == pair_file(new / "p", "bin").read_bytes()
        if not died:
            break
        step += 1
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert set(states) == {"old", "none", "new"}
    assert step > 8


def test_what_is_not_a_pair_is_an_error(tmp_path):
    write(tmp_path / "good", DOCUMENTS)
    write(tmp_path / "other", DOCUMENTS[:4])

    def broken(name, suffix, change):
        for x in ("bin", "idx"):
            shutil.copy(pair_file(tmp_path / "good", x), pair_file(tmp_path / name, x))
        path = pair_file(tmp_path / name, suffix)
        path.write_bytes(change(path.read_bytes()))
        return tmp_path / name

    cases = {
        "cut": (broken("cut", "bin", lambda raw: raw[:-4]), "4312 bytes and .* describes 4316"),
        "short": (broken("short", "idx", lambda raw: raw[:-1]), "has 141 bytes and should have 142"),
        "tiny": (broken("tiny", "idx", lambda raw: raw[:7]), "not an index"),
        "magic": (broken("magic", "idx", lambda raw: b"X" + raw[1:]), "not an index"),
        "mixed": (
            broken("mixed", "bin", lambda raw: pair_file(tmp_path / "other", "bin").read_bytes()),
            "not a pair",
        ),
        "gone": (tmp_path / "gone", r"there is no .*gone\.idx; prefixes here: .*good, "),
    }
    for prefix, message in cases.values():
        with pytest.raises(UserError, match=message):
            check_pair(prefix)
    pair_file(tmp_path / "good", "meta").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_facts(tmp_path / "good")
