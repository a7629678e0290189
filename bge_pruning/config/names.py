"""Names that a configuration shares with the layers above it: kinds, columns, modes, metrics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product

from bge_pruning.config.keys import ConfigError

# How the kept structures are chosen: by learned gates (l0), or by one of the baselines.
L0 = "l0"
METHODS = (L0, "layers", "magnitude", "activation", "reconstruction", "random")
PRUNABLE = ("head", "intermediate", "layer", "hidden")
SIZES = ("d_model", "n_heads", "n_layers", "intermediate_size", "vocab_size")
# What Hugging Face calls them; both may be written.
SIZE_ALIASES = dict(
    zip(("hidden_size", "num_attention_heads", "num_hidden_layers"), SIZES, strict=False)
)
TARGETS = ("target_model", "target_parameters", "target_density", "target_speedup")

# Kinds of data: a row is a pair with a score, one text, or a query with passages.
COLLECTIONS = ("beir", "mteb", "parallel")
WITH_PASSAGES = ("contrastive", *COLLECTIONS)
SOURCE_KINDS = ("sts", "sentences", *WITH_PASSAGES)
# What a path may begin with: the folder of data that are elsewhere on every machine.
DATA_VARIABLE = "BGE_PRUNING_DATA"
DATA_FOLDER = f"${{oc.env:{DATA_VARIABLE}}}"
# What the path of a Hugging Face dataset begins with.
HUB = "hf://"
# Stands for the name of a language in the path of parallel files.
LANGUAGE = "{language}"
# The lines of such files that models are compared on, see config/schema: the others may train.
HELD_OUT = "-400:"
# What a text may be to a model, and what those of a kind are.
ROLES = ("query", "passage", "text")
EVALUATED_KINDS = ("sts", *COLLECTIONS)
# Columns of a kind that may be renamed.
SOURCE_COLUMNS = {
    "sts": ("sentence1", "sentence2", "score"),
    "sentences": ("sentence1", "sentence2", "text", "sentence", "query", "pos", "neg", "title"),
    "contrastive": ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt"),
}

OUTPUTS = ("dense", "sparse", "colbert")
# The outputs whose scores each way of searching adds up.
MODES = {**{name: (name,) for name in OUTPUTS}, "dense+sparse": OUTPUTS[:2], "all": OUTPUTS}
PAIR_METRIC = "cosine_spearman"
RETRIEVAL_METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_100")


def data_path(path: str, where: str = "") -> str:
    """The path, with the folder that the environment names in place of :data:`DATA_FOLDER`.

    Raises:
        ValueError: If the environment names none; the message begins with ``where``.
    """
    folder = os.environ.get(DATA_VARIABLE, "")
    if DATA_FOLDER in path and not folder:
        raise ValueError(
            f"{where}'{path}' needs the environment variable {DATA_VARIABLE}, which is not set. To "
            f"fix, set it to the folder of the data: export {DATA_VARIABLE}=FOLDER."
        )
    return path.replace(DATA_FOLDER, folder)


def metric_key(task: str, mode: str, metric: str) -> str:
    """Name of a score in the logs, without ``eval/``; the usual mode is left out of it."""
    return f"{task}/{metric}" if mode == "dense" else f"{task}/{mode}_{metric}"


def list_metric_keys(
    pairs: Sequence[str], collections: Sequence[str], modes: Sequence[str]
) -> list[str]:
    """Names of all scores that sources of pairs and collections log, without ``eval/``."""
    keys = [f"{name}/{PAIR_METRIC}" for name in pairs]
    return keys + [metric_key(*parts) for parts in product(collections, modes, RETRIEVAL_METRICS)]


# Data sets on the hub that need a program of theirs to be read, which is no longer run, by the
# copies that need none.
SCRIPTED = {
    "Shitao/MLDR": "hf://sentence-transformers/mldr, e.g. subset: de-triplet",
    "miracl/miracl": "hf://sentence-transformers/miracl, e.g. subset: sw-triplet, or kind: mteb "
    "with path: MIRACLRetrievalHardNegatives",
    "miracl/miracl-corpus": "kind: mteb with path: MIRACLRetrievalHardNegatives, or for texts "
    "hf://wikimedia/wikipedia, e.g. subset: 20231101.sw",
    "unicamp-dl/mmarco": "the mMARCO files of Shitao/bge-m3-data, or the English "
    "hf://lightonai/ms-marco-en-bge",
}


def check_hub_data(name: str, where: str) -> None:
    """Refuse a data set that cannot be loaded, before anything is fetched.

    Raises:
        ConfigError: If it is one of :data:`SCRIPTED`; the message names what to use.
    """
    known = {scripted.lower(): copies for scripted, copies in SCRIPTED.items()}
    if copies := known.get(name.strip("/").lower()):
        raise ConfigError(
            f"{where}: this data set is read by a program in its repository, which is not run. To "
            f"fix, use a copy without one: {copies}."
        )
