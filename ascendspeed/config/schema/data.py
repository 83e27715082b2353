"""Group `data` of a run: token data and samples."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Token data and its division into samples."""

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair, or weights and prefixes: 0.3 a 0.7 b. Instead of a prefix: a folder of
    InternEvo's .bin and .bin.meta files, or a Hugging Face data set (a folder of save_to_disk, parquet or
    jsonl files), tokenized during training."""
    mock_data: bool = False
    """Train on random token ids instead of --data-path, to measure speed and memory."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data, in the form of --data-path, all of which is then training data."""
    split: str = "949,50,1"
    """Shares of train, validation and test documents."""
    seq_length: int = 2048
    """Tokens per sample."""
    packing: Literal["first-fit", "none", "internevo-cut", "internevo-whole"] | None = None
    """Packing of documents with loss masks into samples: each into the first sample with enough space
    (first-fit), one per sample (none), or consecutively and cut at the end of a sample, with attention within
    documents (internevo-cut) or across them (internevo-whole). Default: first-fit; internevo-cut for
    InternEvo's data."""
    max_segment_length: int | None = None
    """InternEvo's packings: longest attention span in tokens (max_length_per_sample); None: --seq-length."""
    min_length: int = 0
    """InternEvo's data: skip documents with fewer tokens."""
    handler_name: str | None = None
    """Hugging Face data sets: handler that converts rows to documents, as in tools/preprocess_data.py; None:
    GeneralPretrainHandler."""
    json_keys: tuple[str, ...] = ("text",)
    """Hugging Face data sets: the column that GeneralPretrainHandler reads."""
    chat_template: str | None = None
    """Hugging Face data sets: name of the chat template; None: the template of the model or tokenizer. A
    checkpoint records the template of its training data, whatever their kind."""
    system: str | None = None
    """Hugging Face data sets: system message for conversations without one."""
    loss_on: Literal["all", "last"] | None = None
    """Hugging Face data sets: answers in the loss; None: all."""
    parse_special_tokens: bool = False
    """Hugging Face data sets: special tokens in the text become their ids, as in tools/preprocess_data.py."""
    strict: bool = False
    """Hugging Face data sets: stop at a row that gives no document."""
    reward_token_id: int | None = None
    """Stage rm: token that is put after every conversation, and at whose position the score is read (92527
    for InternLM2, as in its published reward models); None: the score is read at the last token."""
    is_instruction_dataset: bool = False
    """Assert that all data are instruction data, which are detected in any case."""
    data_cache_path: str | None = None
    """Folder for index caches; None: next to the data."""
    tokenizer_name_or_path: str | None = None
    """Directory with tokenizer.model or tokenizer.json."""
