"""Every command line with an example of its input, damaged by a seed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random

import fuzz_mutations as fuzz  # loaded by the test
import torch

from bge_pruning.config import schema
from bge_pruning.model_io.checkpoint import PLAIN_TYPES

# Copies inputs of these names into the folder of an example.
Make = Callable[..., Path]
# Arguments of the command, and what was damaged.
Example = tuple[list[str], str]


def config_names() -> dict:
    config = schema.Config()
    config.model.l0_module = schema.L0ModuleConfig(target_model=schema.TargetModelConfig())
    config.data.train = [schema.SourceConfig()]
    tree = asdict(config)
    tree["loggers"]["wandb"] = asdict(schema.WandbConfig())
    tree["data"]["train"] = []
    return tree


NAMES = config_names()
TRAIN = ("tiny.yaml", "base", "pairs.csv")


def changed_config(make: Make, random: Random, *names: str) -> None:
    """Copies of what a training reads, with a damaged configuration."""
    make(*TRAIN, *names)
    path = Path("tiny.yaml")
    path.write_bytes(fuzz.change_yaml(path.read_bytes(), random, NAMES))


SHORT = ["max_duration=1ba", "loggers.wandb=null", "data.num_workers=0"]


def planned(make: Make, random: Random) -> Example:
    changed_config(make, random)
    return ["tiny.yaml", "dry_run=true"], "config"


def started(make: Make, random: Random) -> Example:
    changed_config(make, random)
    return ["tiny.yaml", *SHORT], "config"


def overrides(make: Make, random: Random) -> Example:
    make(*TRAIN)
    paths = list(fuzz.places(NAMES))
    words = []
    for _ in range(random.choice((1, 1, 2))):
        key = ".".join(map(str, random.choice(paths)))
        values = [str(v)[:5000] for v in fuzz.ODD]
        value = random.choice([*values, "[", "{", "{a: b", "[1,", "'", "!!x y", "&a"])
        odd = [key, f"={value}", f"{key}[0]={value}", f"{key}..x={value}", f"{key}s={value}"]
        words.append(random.choice([f"{key}={value}"] * 8 + odd))
    return ["tiny.yaml", *words, "dry_run=true"], " ".join(words)[:300]


SOURCES = {
    "pairs.csv": "{name: s, kind: sts, path: pairs.csv}",
    "queries.jsonl": "{name: s, kind: contrastive, path: queries.jsonl, negatives: 1}",
    "beir": "{name: s, kind: beir, path: beir, split: test}",
    "texts.txt": "{name: s, kind: sentences, path: texts.txt}",
}


def train_data(make: Make, random: Random) -> Example:
    name = random.choice(sorted(SOURCES))
    make(*TRAIN, name)
    source, path = SOURCES[name], Path(name)
    words = [f"data.train=[{source}]", "data.eval=[]", "max_duration=1ba"]
    if name in ("queries.jsonl", "beir"):
        words += ["loss.sts_regression=0", "loss.contrastive=1"]
    elif name == "texts.txt":
        words.append("loss.sts_regression=0")
    if name == "beir":
        done = fuzz.change_folder(path, random)
        if random.random() < 0.3:
            words[1] = "data.eval=[{name: e, kind: beir, path: beir, split: test}]"
    elif random.random() < 0.15:
        Path(f"{name}.gz").write_bytes(fuzz.change_gzip(path.read_bytes(), random))
        words[0] = words[0].replace(name, f"{name}.gz")
        done = "gz"
    else:
        done = fuzz.change_file(path, random)
    if random.random() < 0.3:
        words.append("data.on_bad_row=skip")
    return ["tiny.yaml", *words], done


def train_model(make: Make, random: Random) -> Example:
    make(*TRAIN)
    done = fuzz.change_folder(Path("base"), random)
    last = ["dry_run=true"] if random.random() < 0.5 else ["max_duration=1ba"]
    return ["tiny.yaml", *last], done


def train_cache(make: Make, random: Random) -> Example:
    make(*TRAIN, "processed")
    done = fuzz.change_folder(Path("processed"), random)
    return ["tiny.yaml", "max_duration=1ba"], done


def extract(make: Make, random: Random) -> Example:
    make("run/latest-rank0.pt")
    path = Path("run/latest-rank0.pt")
    if random.random() < 0.5:
        path.write_bytes(fuzz.change_bytes(path.read_bytes(), random))
        return ["run", "out"], "bytes"
    with torch.serialization.safe_globals(PLAIN_TYPES):
        state = torch.load(path, weights_only=True)
    for name, value in dict(state["state"]["callbacks"]).items():
        if name == "RunMetadataCallback":
            tree = json.loads(value["json"])
            value["json"] = json.dumps(fuzz.change_tree(tree, random))
            if random.random() < 0.2:
                value["tokenizer_files"] = {}
    torch.save(state, path)
    return ["run", "out"], "metadata"


def evaluate(make: Make, random: Random) -> Example:
    make("half/model", "base", "pairs.csv", "beir")
    which = random.choice(["half/model", "base", "pairs.csv", "beir"])
    path = Path(which)
    done = fuzz.change_folder(path, random) if path.is_dir() else fuzz.change_file(path, random)
    words = ["half/model", "--baseline", "base", "--output", "out.json", "--no-speed"]
    pairs = which == "pairs.csv" or random.random() < 0.5
    words += ["--sts", "pairs.csv"] if pairs else ["--retrieval", "beir"]
    return words, done


def efficiency(make: Make, random: Random) -> Example:
    make("half/model", "tiny.yaml", "base", "pairs.csv")
    words = ["--seconds", "0.01", "--batch-sizes", "1", "--lengths", "8", "--output", "out.json"]
    if random.random() < 0.3:
        path = Path("tiny.yaml")
        path.write_bytes(fuzz.change_yaml(path.read_bytes(), random, NAMES))
        return ["tiny.yaml", *words], "config"
    return ["half/model", *words], fuzz.change_folder(Path("half/model"), random)


RECORDS = "evaluation.json pruning.json".split()
REST = "metrics.jsonl gates.npz config.yaml commands.txt metrics-recovery.jsonl".split()


def report(make: Make, random: Random) -> Example:
    make(*(f"half/{name}" for name in RECORDS + REST))
    path = Path("half") / random.choice([*RECORDS, *RECORDS, *REST])
    return ["half"], fuzz.change_file(path, random)


def compare(make: Make, random: Random) -> Example:
    make("half/evaluation.json")
    shutil.copytree("half", "other")
    done = fuzz.change_file(Path("half/evaluation.json"), random)
    return ["half", "other", "--output", "out"], done


def card(make: Make, random: Random) -> Example:
    make("half/model", "half/evaluation.json", "index.json")
    names = ["half/model/pruning.json"] * 2 + ["half/evaluation.json", "index.json"]
    path = Path(random.choice(names))
    if random.random() < 0.2:
        done = fuzz.change_folder(Path("half/model"), random)
    else:
        done = fuzz.change_file(path, random)
    files = ["--evaluation", "half/evaluation.json", "--index", "index.json"]
    return ["half/model", "--card", *files], done


def index(make: Make, random: Random) -> Example:
    make("half/model", "base", "texts.txt")
    path = random.choice([Path("half/model"), Path("base"), Path("texts.txt")])
    done = fuzz.change_folder(path, random) if path.is_dir() else fuzz.change_file(path, random)
    words = "base half/model --texts texts.txt --queries texts.txt --output out.json"
    return words.split(), done


def pipeline(make: Make, random: Random) -> Example:
    changed_config(make, random)
    return ["tiny.yaml", "--sts", "pairs.csv", *SHORT], "config"


def family(make: Make, random: Random) -> Example:
    if random.random() < 0.5:
        changed_config(make, random, "run/latest-rank0.pt")
        done = "config"
    else:
        make(*TRAIN, "run/latest-rank0.pt")
        done = fuzz.change_file(Path("run/latest-rank0.pt"), random)
    words = ["--run", "run", "--densities", "0.5", "--sts", "pairs.csv"]
    return ["tiny.yaml", *words, *SHORT], done


# By name: script (none: the training), what prepares an example, and how many.
TARGETS = {
    "train config": ("train", planned, 900),
    "train override": ("train", overrides, 600),
    "train started": ("train", started, 30),
    "train data": ("train", train_data, 60),
    "train model": ("train", train_model, 60),
    "train cache": ("train", train_cache, 30),
    "extract": ("extract_pruned_model", extract, 150),
    "evaluate": ("evaluate_model", evaluate, 24),
    "efficiency": ("benchmark_efficiency", efficiency, 60),
    "report": ("write_report", report, 12),
    "compare": ("compare_runs", compare, 150),
    "card": ("evaluate_model", card, 300),
    "index": ("check_index_compatibility", index, 80),
    "pipeline": ("run_pipeline", pipeline, 16),
    "family": ("export_family", family, 16),
}
