"""Stands in for the programs that documented commands start: it checks their inputs, and leaves their outputs
as empty files. Runs as a script without site-packages, under the name of the program.

Errors are those that a reader would meet: a file that no command has made or fetched, an output that is
there already. Every start of a Python script is appended to $STANDIN_LOG as JSON.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Flags = dict[str, list[str]]

OUTPUT_FLAGS = ("output-dir", "output-file", "output-prefix", "output-model-dir", "to", "tgt", "save")
"""Older names of `--output`."""
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
STEP = "step_0000500"


def fail(message: str) -> None:
    sys.exit(f"stand-in of {Path(sys.argv[0]).name}: {message}")


def flags_of(words: Sequence[str]) -> Flags:
    """Flag -> its words; positional words are under "", and --output also under its older names."""
    flags: Flags = {"": []}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("_", "-")
            flags[name] = [value] if value else []
        else:
            flags[name].append(word)
    return {older: flags["output"] for older in OUTPUT_FLAGS if "output" in flags} | flags


def need(*paths: str) -> None:
    for path in paths:
        if not Path(path).exists():
            fail(f"{path} is missing: no command before has made or fetched it")


def need_files(flags: Flags, *names: str) -> None:
    for name in names:
        need(*flags.get(name, []))


def need_tokenizer(flags: Flags, name: str = "tokenizer-name-or-path") -> None:
    for folder in flags.get(name, []):
        if Path(folder).is_dir():
            need(f"{folder}/tokenizer.model")
        else:
            need(folder)


def need_data(words: Sequence[str]) -> None:
    for word in words:
        if word.replace(".", "").isdigit():
            continue  # a weight
        kinds = ("packed", "preference")
        names = (word, f"{word}.idx", *(f"{word}_{kind}_input_ids_document.idx" for kind in kinds))
        if not any(Path(name).exists() for name in names):
            fail(f"there is no data {word}")


def write(path: str | Path, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def write_model(folder: str, name: str) -> None:
    """A Hugging Face directory of the model `name`, with its real config.json."""
    configs = Path(os.environ["STANDIN_CONFIGS"])
    for file in (*TOKENIZER, "generation_config.json", "model.safetensors"):
        write(f"{folder}/{file}")
    if (configs / f"{name}.json").is_file():
        write(f"{folder}/config.json", (configs / f"{name}.json").read_text())


def write_new(source: str, target: str) -> None:
    """A converted folder, which must not exist, with the config.json of its source."""
    need(source)
    if Path(target).exists() and any(Path(target).iterdir()):
        fail(f"{target} exists and is not an empty directory")
    write(f"{target}/model.safetensors")
    for name in ("config.json", *TOKENIZER):
        if Path(source, name).is_file():
            write(f"{target}/{name}", Path(source, name).read_text())
    if Path(source, "latest").exists():  # an export of a checkpoint: the tokenizer is that of its run
        write(f"{target}/tokenizer.model")


def train(flags: Flags) -> None:
    need_data(flags["data-path"])
    need_data(flags.get("valid-data-path", []))
    need_tokenizer(flags)
    need_files(flags, "deepspeed-config", "lora-load", "lora-base")
    save = flags.get("save", [None])[0]
    if flags.get("load") != [save]:  # the folder of checkpoints may still be empty
        need_files(flags, "load")
    write(f"{flags.get('log-dir', ['logs'])[0]}/train.log", "device: none; 1 processes\n")
    if not save:
        return
    resumes = flags.get("load", [""])[0].rstrip("/").removeprefix("./") == save.removeprefix("./")
    if Path(save, "latest").exists() and not resumes and "auto-resume" not in flags:
        fail(f"--save {save} already holds checkpoints")
    write(f"{save}/latest", STEP)
    write(f"{save}/{STEP}/run.json", "{}")
    if "lora-rank" in flags:
        write(f"{save}/adapter/adapter_config.json", "{}")


def preprocess(flags: Flags) -> None:
    need_files(flags, "input")
    need_tokenizer(flags)
    handler = flags.get("handler-name", [""])[0]
    is_chat = "Style" in handler or "chat-template" in flags
    kind = "preference" if "Pairwise" in handler else "packed"
    keys = (f"{kind}_input_ids", f"{kind}_labels") if is_chat else flags.get("json-keys", ["text"])
    for key in keys:
        for ending in ("bin", "idx"):
            write(f"{flags['output-prefix'][0]}_{key}_document.{ending}")


def convert(source: str, target: str) -> Callable[[Flags], None]:
    def run(flags: Flags) -> None:
        need_files(flags, "config")
        need_tokenizer(flags, "tokenizer")
        write_new(flags[source][0], flags[target][0])

    return run


def need_processes(flags: Flags) -> None:
    """A launch of a model that answers has as many processes as its layout."""
    names = (("tp", "tensor-model-parallel-size"), ("pp", "pipeline-model-parallel-size"))
    sizes = [flags.get(short, flags.get(name, ["1"]))[0] for short, name in names]
    ranks = int(sizes[0]) * int(sizes[1])
    nproc = os.environ.get("NPROC")
    if nproc and int(nproc) != ranks and not os.environ.get("NNODES") and not os.environ.get("HOSTFILE"):
        fail(f"{nproc} processes were started, but TP {sizes[0]} x PP {sizes[1]} are {ranks}")


def answer(flags: Flags) -> None:
    need_files(flags, "load")
    if not flags.get("tokenizer-name-or-path"):
        need(
            *(f"{folder}/tokenizer.model" for folder in flags["load"] if Path(folder, "config.json").exists())
        )
    need_tokenizer(flags)
    need(*(file for file in flags.get("input-file", []) if file != "-"))
    for name in flags.get("output-file", []):
        if Path(name).exists():
            fail(f"--output-file {name} exists")
        write(name)


def evaluate(flags: Flags) -> None:
    folder = flags.get("output-dir", ["needle"])
    answer({name: words for name, words in flags.items() if name != "output-file"})
    need_files(flags, "task-data-path", "haystack")
    identity = json.dumps([flags["load"], flags.get("prompt-style"), flags.get("num-fewshot")])
    record = Path(folder[0], "questions.jsonl")
    if record.exists() and record.read_text() != identity:
        fail(f"{record} holds answers of another model or prompt style")
    write(record, identity)


def random_model(flags: Flags) -> None:
    need_tokenizer(flags, "tokenizer")
    target = flags["output-dir"][0]
    if Path(target).exists():
        fail(f"{target} exists")
    write_model(target, flags.get("model", ["internlm-tiny"])[0])


def make_quickstart_data(flags: Flags) -> None:
    folder = flags["output-dir"][0]
    for name in ("train.parquet", "heldout.parquet", "chat.jsonl", "tokenizer/tokenizer.model"):
        write(f"{folder}/{name}")


def read_logs(flags: Flags) -> None:
    need(*flags[""])
    need_files(flags, "ref2")


def export_lora(flags: Flags) -> None:
    need_files(flags, "from", "base")
    write(f"{flags['to'][0]}/adapter_config.json", "{}")


def merge_lora(flags: Flags) -> None:
    need_files(flags, "adapter")
    write_new(flags["base"][0], flags["save"][0])


RANK_FILES = convert("input-model-dir", "output-model-dir")
INTERNLM = convert("src", "tgt")
SCRIPTS: dict[str, Callable[[Flags], None]] = {
    "pretrain_intern.py": train,
    "tools/preprocess_data.py": preprocess,
    "tools/convert_internevo_data.py": lambda flags: need_files(flags, "input"),
    "tools/random_model.py": random_model,
    "tools/ckpt_convert/convert.py": convert("from", "to"),
    "tools/ckpt_convert/llama/convert_weights_from_huggingface.py": RANK_FILES,
    "tools/ckpt_convert/llama/convert_weights_to_huggingface.py": RANK_FILES,
    "tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py": RANK_FILES,
    "tools/transformers/convert2hf_internlm.py": INTERNLM,
    "tools/transformers/convert2hf_internlm2.py": INTERNLM,
    "tools/transformers/revert_internlm.py": INTERNLM,
    "tools/transformers/revert_internlm2.py": INTERNLM,
    "tools/lora/export_lora.py": export_lora,
    "tools/lora/merge_lora.py": merge_lora,
    "tools/compare_loss.py": read_logs,
    "tools/perf_table.py": read_logs,
    "tools/plan.py": lambda flags: None,  # reads nothing and writes nothing
    "tasks/inference/generate.py": answer,
    "tasks/inference/benchmark.py": answer,
    "tasks/inference/serve.py": answer,
    "tasks/evaluation/evaluation.py": evaluate,
    "tasks/evaluation/needle.py": evaluate,
    "examples/intern/make_quickstart_data.py": make_quickstart_data,
    "examples/intern/parity_origin.py": read_logs,
}


def python(words: Sequence[str]) -> None:
    if words[0] in ("-", "-c"):
        os.execv(os.environ["STANDIN_PYTHON"], [os.environ["STANDIN_PYTHON"], *words])
    if words[:2] == ["-m", "ascendspeed.cli.launch"]:
        if "--quiet" in words:
            need_processes(flags_of(words[2:]))
        words = [word for word in words[2:] if word != "--quiet"]
        need(*filter(None, [os.environ.get("HOSTFILE")]))
    script = os.path.normpath(words[1] if words[0] == "-m" else words[0])
    variables = {name: os.environ.get(name, "") for name in ("NPROC", "NNODES", "HOSTFILE")}
    flags = words[2:] if words[0] == "-m" else words[1:]
    with open(os.environ["STANDIN_LOG"], "a") as log:
        log.write(json.dumps([script, flags, variables]) + "\n")
    if script in SCRIPTS:
        SCRIPTS[script](flags_of(flags))
    elif not script.startswith("benchmarks"):
        fail(f"{script} is not known here: say in tests/helpers/standin.py what it reads and writes")


INTERN = {
    "train": "pretrain_intern.py",
    "data": "tools/preprocess_data.py",
    "convert": "tools/ckpt_convert/convert.py",
    "generate": "tasks/inference/generate.py",
    "chat": "tasks/inference/generate.py",
    "serve": "tasks/inference/serve.py",
    "eval": "tasks/evaluation/evaluation.py",
    "compare": "tools/compare_loss.py",
}
"""Subcommand -> the script with its flags."""


def intern(words: Sequence[str]) -> None:
    flags = list(words[1:])
    if "--nproc" in flags:
        i = flags.index("--nproc")
        os.environ["NPROC"] = flags[i + 1]
        del flags[i : i + 2]
    else:
        os.environ.setdefault("NPROC", "1")
    if words[0] in INTERN and not {"--help", "--dump-config"} & set(flags):
        if words[0] in ("generate", "chat", "serve", "eval"):
            need_processes(flags_of(flags))
        python([INTERN[words[0]], *(["--task", "chat"] if words[0] == "chat" else []), *flags])


def pip(words: Sequence[str]) -> None:
    need(*(word for word in words if word.endswith(".txt")))


def deepspeed(words: Sequence[str]) -> None:
    python([word for word in words if word != "--no_local_rank"])


def git(words: Sequence[str]) -> None:
    if words[0] != "clone":
        return
    source = words[1]
    folder = words[2] if len(words) > 2 else source.rpartition("/")[2]
    if Path(folder).exists():
        fail(f"clone: {folder} exists and is not empty")
    if "/datasets/" in source:
        write(f"{folder}/README.md")
    else:
        write_model(folder, source.rpartition("/")[2])


def wget(words: Sequence[str]) -> None:
    address = words[-1]
    folder = words[words.index("-P") + 1] if "-P" in words else "."
    name = address.rpartition("/")[2]
    if name == "config.json":
        write_model(f"{folder}/.all", address.split("/")[4])
        write(f"{folder}/{name}", Path(folder, ".all", name).read_text())
    else:
        write(f"{folder}/{name}")


def sbatch(words: Sequence[str]) -> None:
    need(*(word for word in words if word.endswith((".sh", ".sbatch"))))


if __name__ == "__main__":
    PROGRAMS = {
        "python": python,
        "deepspeed": deepspeed,
        "intern": intern,
        "pip": pip,
        "git": git,
        "wget": wget,
    }
    PROGRAMS["sbatch"] = sbatch
    PROGRAMS[Path(sys.argv[0]).name](sys.argv[1:])
