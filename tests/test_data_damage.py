"""Damaged and lying data files: every reader accepts what is right and refuses the rest with one line."""

import copy
import functools
import io
import json
import random
import shutil
import struct
from functools import partial

import numpy as np
import pytest
from helpers.fuzz import Findings, dump, mutate_bytes, mutate_json
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.data.indexed.megatron_pair import (
    HEADER,
    SUPERVISED_FACT,
    PairWriter,
    check_pair,
    read_facts,
)
from ascendspeed.utils.errors import UserError

VOCAB, ROW, DOCUMENTS = 1024, 64, 40
SHORT, LONG = 60, pytest.param(3000, marks=pytest.mark.slow)
SUFFIXES = ("bin", "idx", "meta")


def documents(seed=0):
    """Token ids of a few documents."""
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 1000, generator.integers(5, 90)) for _ in range(DOCUMENTS)]


def write_pair(folder):
    """A pair `a` of plain text; returns its files by suffix."""
    tokens = documents()
    with PairWriter(folder / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.concatenate(tokens), np.array([len(ids) for ids in tokens], np.int32))
        writer.commit({"tokens": writer.tokens, "max_token": 999, "vocab_size": VOCAB})
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in SUFFIXES}


def write_masked_pair(folder):
    """A masked pair `chat`; returns its six files by name."""
    tokens = documents()
    with MaskedPairWriter(folder / "chat") as writer:
        ids = np.concatenate(tokens)
        writer.add(ids, np.array([len(ids) for ids in tokens], np.int32), np.arange(len(ids)) % 3 > 0)
        writer.commit({"tokens": writer.tokens, "max_token": 999})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_files(folder, files):
    """Replaces the content of a folder; None leaves a file out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


def use(path, **options):
    """Opens data as training does and reads samples of both splits."""
    data = DataConfig(data_path=(str(path),), split="90,10,0", seq_length=ROW, **options)
    for samples in build_splits(data, 1234, VOCAB, ["train", "valid"]).values():
        for number in [*range(min(12, len(samples))), len(samples) - 1, len(samples)]:
            samples.sample(number)


def pair(files):
    return {f"a.{suffix}": content for suffix, content in files.items()}


def tables(index):
    """Lengths, offsets and bounds of an index, as copies."""
    sequences, bounds = HEADER.unpack(index[: HEADER.size])[3:]
    lengths = np.frombuffer(index, "<i4", sequences, HEADER.size).copy()
    offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences).copy()
    return lengths, offsets, np.frombuffer(index, "<i8", bounds, HEADER.size + 12 * sequences).copy()


def set_entry(table, value):
    """A change of one entry of an index: table 0 lengths, 1 offsets, 2 bounds."""

    def change(index):
        changed = tables(index)
        changed[table][DOCUMENTS // 2] = value(changed[table][DOCUMENTS // 2])
        return index[: HEADER.size] + b"".join(part.tobytes() for part in changed)

    return change


LIES = {
    "one token less": (set_entry(0, lambda length: length - 1), "sequence 21 has .* the one before it ends"),
    "negative length": (set_entry(0, lambda length: -length), "sequence 20 has -"),
    "huge length": (set_entry(0, lambda length: 2**31 - 1), "sequence 21 has"),
    "offset elsewhere": (set_entry(1, lambda offset: offset + 20_000), "sequence 20 has"),
    "bounds descend": (set_entry(2, lambda bound: 0), "document bounds do not ascend"),
    "other bounds": (lambda index: index[:-8] + struct.pack("<q", 39), "document bounds do not ascend"),
    "bounds cut off": (
        lambda index: index[:26] + struct.pack("<Q", 0) + index[34 : -8 * (DOCUMENTS + 1)],
        "document bounds do not ascend",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, name):
    files = write_pair(tmp_path)
    change, message = LIES[name]
    use(tmp_path / "a")
    (tmp_path / "a.meta").unlink()  # as written by Megatron's own tool
    use(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(change(files["idx"]))
    with pytest.raises(UserError, match=message):
        use(tmp_path / "a")


def test_several_sequences_in_a_document_are_no_contradiction(tmp_path):
    """Megatron's own tool writes such files for text that it splits into sentences."""
    files = write_pair(tmp_path)
    lengths, offsets, _ = tables(files["idx"])
    bounds = np.array([0, 3, 3, DOCUMENTS], "<i8")
    head = HEADER.pack(*HEADER.unpack(files["idx"][: HEADER.size])[:3], DOCUMENTS, len(bounds))
    (tmp_path / "a.meta").unlink()
    (tmp_path / "a.idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())
    assert len(IndexedDataset(str(tmp_path / "a"))) == DOCUMENTS
    use(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_its_meta_does_not_describe_is_refused(tmp_path, suffix):
    """Two lengths that changed places, and other ids, leave the pair consistent."""
    write_pair(tmp_path)
    with PairWriter(tmp_path / "other", np.dtype(np.uint16)) as writer:
        tokens = documents()[::-1] if suffix == "idx" else [ids % 900 + 1 for ids in documents()]
        writer.add(np.concatenate(tokens), np.array([len(ids) for ids in tokens], np.int32))
        writer.commit({})
    (tmp_path / f"a.{suffix}").write_bytes((tmp_path / f"other.{suffix}").read_bytes())
    with pytest.raises(UserError, match=rf"a\.{suffix} is not the file that .*a\.meta describes"):
        use(tmp_path / "a")
    (tmp_path / "a.meta").unlink()
    use(tmp_path / "a")
    (tmp_path / "a.meta").write_bytes(dump({"tokens": 5}))  # of other data, or of an older version
    use(tmp_path / "a")


META = {
    "not JSON": (b"{", "is damaged: .*preprocess again, or remove it"),
    "not a table": (b"[1]", "is damaged: not a table"),
    "nested deeply": (b"[" * 200_000, "nested too deeply"),
    "not UTF-8": (b"\xff\xfe{}", "is damaged"),
    "a text for a count": (b'{"max_token": "9"}', "max_token is '9', not a count"),
    "null": (b'{"tokens": null}', "tokens is None, not a count"),
    "true": (b'{"vocab_size": true}', "vocab_size is True, not a count"),
    "negative": (dump({SUPERVISED_FACT: -1}), f"{SUPERVISED_FACT} is -1, not a count"),
    "a count for a text": (b'{"digest": 5}', "digest is 5, not a text"),
}


@pytest.mark.parametrize("name", META)
def test_damaged_facts_are_refused(tmp_path, name):
    write_pair(tmp_path)
    content, message = META[name]
    (tmp_path / "a.meta").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_facts(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        use(tmp_path / "a")


def test_facts_without_the_largest_id_are_accepted(tmp_path):
    write_pair(tmp_path)
    tokens = check_pair(tmp_path / "a")
    (tmp_path / "a.meta").write_bytes(dump({"tokens": tokens}))
    use(tmp_path / "a")
    (tmp_path / "a.meta").write_bytes(dump({"tokens": tokens, "max_token": VOCAB}))
    with pytest.raises(UserError, match=f"token id {VOCAB}"):
        use(tmp_path / "a")


@pytest.mark.parametrize("cases", [SHORT, LONG])
def test_pairs_with_damaged_bytes(tmp_path, cases):
    files = write_pair(tmp_path)
    generator, findings = random.Random(1), Findings()
    folder = tmp_path / "fuzz"
    for number in range(cases):
        changed = dict(files)
        suffix = generator.choice(["idx", "idx", "bin", "meta"])
        changed[suffix] = mutate_bytes(changed[suffix], generator)
        if suffix != "meta" and generator.random() < 0.5:
            changed["meta"] = None
        write_files(folder, pair(changed))
        is_same = changed["meta"] is None or changed == files

        def action(suffix=suffix, is_same=is_same):
            use(folder / "a")
            return None if is_same or suffix == "meta" else f"P.{suffix} differs from what P.meta describes"

        findings.case(f"{suffix} {number}", action)
    findings.check(refused=cases // 3)


@pytest.mark.parametrize("cases", [SHORT, LONG])
def test_indexes_of_valid_size_with_other_values(tmp_path, cases):
    files = write_pair(tmp_path)
    generator, findings = random.Random(2), Findings()
    folder = tmp_path / "fuzz"
    original = tables(files["idx"])
    for number in range(cases):
        changed = [table.copy() for table in original]
        for _ in range(generator.choice([1, 1, 2, 3])):
            table = generator.choice(changed)
            at = generator.randrange(len(table))
            edges = [0, -1, 1, 2, int(table[at]) + 1, int(table[at]) - 1, 2**31 - 1, -(2**31), 10**6]
            table[at] = generator.choice(edges + ([2**62, -(2**62)] if table.itemsize == 8 else []))
        index = files["idx"][: HEADER.size] + b"".join(table.tobytes() for table in changed)
        write_files(folder, pair({"bin": files["bin"], "idx": index}))
        # Bounds are not used; the other tables have one right value for these bytes.
        is_same = all((a == b).all() for a, b in zip(original[:2], changed[:2], strict=True))

        def action(is_same=is_same):
            use(folder / "a")
            return None if is_same else "an index that contradicts itself"

        findings.case(f"index {number}", action)
    findings.check(refused=cases // 2)


@pytest.mark.parametrize("cases", [SHORT, LONG])
def test_facts_with_other_values(tmp_path, cases):
    files = write_pair(tmp_path)
    generator, findings = random.Random(3), Findings()
    folder = tmp_path / "fuzz"
    facts = json.loads(files["meta"])
    for number in range(cases):
        meta = dump(mutate_json(facts, generator))
        write_files(folder, pair(files | {"meta": meta}))
        findings.case(f"meta {number}: {meta[:80]!r}", partial(use, folder / "a"))
    findings.check(refused=cases // 3)


@pytest.mark.parametrize("cases", [SHORT, LONG])
def test_masked_pairs_with_a_damaged_file(tmp_path, cases):
    files = write_masked_pair(tmp_path)
    generator, findings = random.Random(4), Findings()
    folder = tmp_path / "fuzz"
    for number in range(cases):
        name = generator.choice(sorted(files))
        content = files[name]
        if name.endswith("meta") and generator.random() < 0.7:
            content = dump(mutate_json(json.loads(content), generator))
        else:
            content = mutate_bytes(content, generator)
        changed = files | {name: content}
        if generator.random() < 0.1:
            changed[generator.choice(sorted(files))] = None
        write_files(folder, changed)
        packing = generator.choice([None, "none", "first-fit", "internevo-cut", "internevo-whole"])
        findings.case(f"{name} {number}", partial(use, folder / "chat", packing=packing))
    findings.check(refused=cases // 2)


@functools.cache
def internevo_lines():
    """Forty lines of InternEvo's data, and their offsets and lengths."""
    generator = random.Random(9)
    lines = []
    for _ in range(DOCUMENTS):
        tokens = [
            generator.choice([-1, 1]) * generator.randrange(1, 1000)
            for _ in range(generator.randrange(1, 120))
        ]
        lines.append(dump({"tokens": tokens}) + b"\n")
    return lines, table_of(lines)


def table_of(lines):
    """[documents, 2] int64 for lines that are InternEvo's."""
    offsets = np.cumsum([0, *map(len, lines)])[:-1]
    return np.stack([offsets, [len(json.loads(line)["tokens"]) for line in lines]], 1).astype(np.int64)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array):
    file = io.BytesIO()
    np.savez(file, a=array)
    return file.getvalue()


def with_header(header, content=b""):
    """A .npy file with this header."""
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + content


def header(shape, descr=b"'<i8'"):
    return b"{'descr':" + descr + b",'fortran_order':False,'shape':" + shape + b",}" + b" " * 10 + b"\n"


def not_arrays():
    """Name -> content of a .meta that is no array of offsets and lengths."""
    array = internevo_lines()[1]
    return {
        "npz": npz(array),
        "empty": b"",
        "zip": b"PK\x03\x04",
        "terabytes": with_header(header(b"(1000000000000,2)"), npy(array)[-100:]),
        "no content": with_header(header(b"(40,2)")),
        "fields": with_header(header(b"(40,)", b"[('a','<i8'),('b','<i8')]"), array.tobytes()),
        "code": with_header(b"__import__('os').system('false')\n"),
        "brackets": with_header(b"(" * 200 + b"\n"),
        "pickle": with_header(header(b"(40,2)", b"'|O'"), b"cos\nsystem\n(S'false'\ntR."),
        "length of the header": b"\x93NUMPY\x03\0" + (2**31).to_bytes(4, "little") + b"{}",
        "negative": with_header(header(b"(-1,2)"), array.tobytes()),
        "no rows": with_header(header(b"(0,2)")),
        "floats": npy(array.astype(float)),
        "transposed": npy(array.T),
        "one column": npy(array[:, :1]),
    }


@pytest.mark.parametrize("name", not_arrays())
def test_what_is_no_array_of_offsets_and_lengths(tmp_path, name):
    lines, _ = internevo_lines()
    write_files(tmp_path / "d", {"x.bin": b"".join(lines), "x.bin.meta": not_arrays()[name]})
    findings = Findings()
    findings.case(name, partial(use, tmp_path / "d"))
    findings.check(accepted=0)


@pytest.mark.parametrize("value", [2**62, -(2**62), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("column", [0, 1])
def test_numbers_near_the_limit_of_their_type(tmp_path, value, column):
    lines, array = copy.deepcopy(internevo_lines())
    array[DOCUMENTS // 2, column] = value
    write_files(tmp_path / "d", {"x.bin": b"".join(lines), "x.bin.meta": npy(array)})
    findings = Findings()
    findings.case(f"{value}", partial(use, tmp_path / "d"))
    findings.check(accepted=0)


def damaged_internevo(generator):
    """Returns (kind, X.bin, X.bin.meta) with damage of one kind."""
    lines, array = copy.deepcopy(internevo_lines())
    content, meta = b"".join(lines), npy(array)
    kind = generator.choice(["meta", "meta", "bin", "bin", "numbers", "line"])
    if kind == "meta":
        meta = mutate_bytes(meta, generator)
    elif kind == "bin":
        content = mutate_bytes(content, generator)
    elif kind == "numbers":
        at = generator.randrange(DOCUMENTS), generator.randrange(2)
        array[at] = generator.choice([0, -1, 1, 5, 10**6, 2**62, -(2**63)])
        kinds = [array, array.astype(np.int32), array.astype(np.uint64), array.astype(">i8")]
        meta = npy(generator.choice([*kinds, np.asfortranarray(array), array[:0]]))
    else:
        at = generator.randrange(DOCUMENTS)
        lines[at] = dump(mutate_json(json.loads(lines[at]), generator)) + b"\n"
        content = b"".join(lines)
        array[:, 0] = np.cumsum([0, *map(len, lines)])[:-1]
        meta = npy(array)
    return kind, content, meta


@pytest.mark.parametrize("cases", [SHORT, LONG])
def test_damaged_internevo_files(tmp_path, cases):
    generator, findings = random.Random(5), Findings()
    for number in range(cases):
        kind, content, meta = damaged_internevo(generator)
        write_files(tmp_path / "d", {"x.bin": content, "x.bin.meta": meta})
        packing = generator.choice([None, "first-fit", "none", "internevo-whole"])
        findings.case(f"{kind} {number}", partial(use, tmp_path / "d", packing=packing))
    findings.check(refused=cases // 2)


def test_the_judge_finds_what_it_must():
    """Control: a traceback, an empty message, memory, and an accepted lie are findings."""

    def fail(error):
        raise error

    findings = Findings()
    findings.case("traceback", lambda: fail(KeyError("x")))
    findings.case("no message", lambda: fail(UserError(" ")))
    findings.case("memory", lambda: np.ones(1 << 30) and None)
    findings.case("lie", lambda: "wrong")
    findings.case("good", lambda: None)
    findings.case("refused", lambda: fail(UserError("one line")))
    assert len(findings.found) == 4
    with pytest.raises(AssertionError):
        findings.check()
