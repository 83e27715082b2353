"""Benchmarks as the Hugging Face hub has them, and a set of one subject."""

import pyarrow
import pyarrow.parquet

from ascendspeed.evaluation.loaders import CUSTOM_SUBJECTS
from helpers.evaluating import mmlu

ONE = "subject,category\nanatomy,STEM\n"


def small(folder, count=3):
    """One subject, declared as a set of one's own."""
    mmlu(folder, count, ["anatomy"])
    (folder / CUSTOM_SUBJECTS).write_text(ONE)
    return folder


def hub(folder, subject="anatomy", answers=(0, 3), shards=1, **more):
    """Writes files like cais/mmlu's on the hub."""
    for split in ("dev", "test"):
        tables = [
            {
                "question": f"Q{i} {split}",
                "subject": subject,
                "choices": ["0.50", "None", "NA", "x"],
                "answer": a,
                **more,
            }
            for i, a in enumerate(answers)
        ]
        (folder / subject).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(tables), folder / subject / f"{split}-00000-of-{shards:05}.parquet"
        )
    return folder


def put_parquet(path, tables):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tables), path)


def joint(folder, subjects, shards=1):
    """Writes files of all subjects together, like cais/mmlu's `all`; a subject's rows are not adjacent."""
    for split, count in (("dev", 5), ("test", 2)):
        tables = [
            {
                "question": f"Q{i} of {subject} {split}",
                "subject": subject,
                "choices": list("wxyz"),
                "answer": i % 4,
            }
            for i in range(count)
            for subject in subjects
        ]
        for shard in range(shards):
            put_parquet(folder / f"{split}-{shard:05}-of-{shards:05}.parquet", tables[shard::shards])
    return folder
