"""Check field by field what servers demand of a model folder.

Some tools refuse a folder that lacks something; others load it silently and give wrong vectors.
Here the demands of transformers 5, sentence-transformers, FlagEmbedding, text-embeddings-inference
and vLLM are checked without loading any of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bge_pruning.model_io.model_files import SIZES as LARGEST
from bge_pruning.model_io.model_files import read_json
from bge_pruning.model_io.pretrained import read_heads
from bge_pruning.model_io.projection import FOLDER, NO_ACTIVATION, compute_modules, read_projection
from bge_pruning.models.encoder_shape import EncoderShape

SIZES = (*LARGEST, "type_vocab_size")
# text-embeddings-inference has no defaults for these.
CONFIG_KEYS = (
    "architectures model_type hidden_act hidden_dropout_prob initializer_range layer_norm_eps "
    "pad_token_id"
).split()


class FolderError(ValueError):
    """A model folder that some tool would refuse, or would load and compute something else."""


def check_folder(folder: Path, shape: EncoderShape) -> None:
    """Refuse a folder that a server could not load, or would silently load wrongly.

    Only the ``shape``, the sizes that the model really has, tells a wrong number of heads: every
    number that divides the hidden size loads, and computes something else.
    """
    problems = [problem for check in CHECKS for problem in check(folder, shape)]
    if problems:
        raise FolderError(
            f"{folder}: {'; '.join(problems)}. To fix, extract or export the model again."
        )


def _config(folder: Path, shape: EncoderShape) -> Iterator[str]:
    config = read_json(folder / "config.json", {})
    for key in (*CONFIG_KEYS, *SIZES):
        if key not in config:
            yield f"config.json lacks {key}, which text-embeddings-inference reads"
    if config.get("model_type") != "xlm-roberta":
        yield f"config.json: model_type is {config.get('model_type')!r}, expected 'xlm-roberta'"
    if config.get("architectures") != ["XLMRobertaModel"]:
        yield "config.json: architectures is not ['XLMRobertaModel'], by which vLLM chooses"
    if config.get("position_embedding_type") != "absolute":
        yield "config.json: position_embedding_type is not 'absolute', which older vLLM demands"
    for key in SIZES:
        found, real = config.get(key), getattr(shape, key)
        if found != real:
            yield f"config.json: {key} is {found}, but the model has {real}"
    if shape.hidden_size != shape.num_attention_heads * shape.head_dim:
        yield "hidden_size is not heads x head size, which every loader assumes"


def _weights(folder: Path, shape: EncoderShape) -> Iterator[str]:
    from safetensors import safe_open

    path = folder / "model.safetensors"
    if not path.is_file():
        yield "there is no model.safetensors"
        return
    with safe_open(path, "pt") as file:
        sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    layers = {key.split(".")[2] for key in sizes if key.startswith("encoder.layer.")}
    if layers != {str(index) for index in range(shape.num_hidden_layers)}:
        yield (
            f"model.safetensors holds {len(layers)} layers, expected {shape.num_hidden_layers}: "
            f"transformers would ignore or invent the others"
        )
    expected = {
        "embeddings.word_embeddings.weight": (shape.vocab_size, shape.hidden_size),
        "embeddings.position_embeddings.weight": (shape.max_position_embeddings, shape.hidden_size),
        "encoder.layer.0.intermediate.dense.weight": (shape.intermediate_size, shape.hidden_size),
    }
    for key, size in expected.items():
        if sizes.get(key) != size:
            yield f"model.safetensors: {key} is {sizes.get(key)}, expected {size}"


def _heads(folder: Path, shape: EncoderShape) -> Iterator[str]:
    heads = read_heads(folder)
    expected = {
        "sparse_linear": 1 if shape.sparse_head else None,
        "colbert_linear": shape.colbert_dim or None,
    }
    for name, outputs in expected.items():
        state = heads[name]
        found = None if state is None else tuple(state["weight"].shape)
        wanted = None if outputs is None else (outputs, shape.hidden_size)
        if found != wanted:
            yield (
                f"{name}.pt is {found}, expected {wanted}: FlagEmbedding would take random weights"
            )


def _tokenizer(folder: Path, shape: EncoderShape) -> Iterator[str]:
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        yield "there is no tokenizer.json: FlagEmbedding would read every word as unknown"
        return
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    largest = max(tokenizer.get_vocab().values())
    if largest >= shape.vocab_size:
        rows = shape.vocab_size
        yield f"tokenizer.json has id {largest}, beyond the {rows} rows of the embeddings"
    config = read_json(folder / "config.json", {})
    settings = read_json(folder / "tokenizer_config.json", {})
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is None or tokenizer.token_to_id(pad) != config.get("pad_token_id"):
        yield "the tokenizer's padding token has not the id that config.json names"
    if tokenizer.truncation or tokenizer.padding:
        yield "tokenizer.json stores truncation or padding, which readers in Rust follow"


def _modules(folder: Path, shape: EncoderShape) -> Iterator[str]:
    path = folder / "modules.json"
    if not path.is_file():
        yield "there is no modules.json: sentence-transformers would take the mean of the tokens"
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"modules.json is not JSON ({error})"
        return
    projected = (folder / FOLDER).is_dir() or found == compute_modules(projected=True)
    expected = compute_modules(projected)
    if found != expected:
        steps = ", ".join(module["type"] for module in expected)
        yield (
            f"modules.json does not list exactly {steps}, each in its folder: sentence-"
            f"transformers or text-embeddings-inference would give other vectors"
        )
    paths = (module["path"] for module in expected[1:])
    missing = [path for path in paths if not (folder / path / "config.json").is_file()]
    for path in missing:
        yield f"there is no {path}/config.json, of a module of sentence-transformers"
    if projected and found == expected and FOLDER not in missing:
        yield from _projection(folder, shape)


def _projection(folder: Path, shape: EncoderShape) -> Iterator[str]:
    try:
        projection = read_projection(folder)
    except (ValueError, FileNotFoundError) as error:
        yield str(error).partition(" To fix")[0].rstrip(".")
        return
    if projection.shape[1] != shape.hidden_size:
        size = projection.shape[1]
        yield f"{FOLDER} takes {size} dimensions, but the model has {shape.hidden_size}"
    activation = read_json(folder / FOLDER / "config.json")["activation_function"]
    if activation != NO_ACTIVATION:
        yield (
            f"{FOLDER}/config.json: activation_function is not '{NO_ACTIVATION}', the only name "
            f"for none that text-embeddings-inference knows"
        )


def _sentence_transformers(folder: Path, shape: EncoderShape) -> Iterator[str]:
    pooling = read_json(folder / "1_Pooling" / "config.json", {})
    for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        if key not in pooling:
            yield f"1_Pooling/config.json lacks {key}, which text-embeddings-inference reads"
    if pooling.get("word_embedding_dimension") != shape.hidden_size:
        yield f"1_Pooling/config.json: word_embedding_dimension is not {shape.hidden_size}"
    config = read_json(folder / "config.json", {})
    # Positions start behind the padding token's.
    room = shape.max_position_embeddings - config.get("pad_token_id", 0) - 1
    for name, key in (("sentence_bert", "max_seq_length"), ("tokenizer", "model_max_length")):
        longest = read_json(folder / f"{name}_config.json", {}).get(key)
        if not isinstance(longest, int) or not 0 < longest <= room:
            yield (
                f"{name}_config.json: {key} is {longest}, but there are positions for {room} "
                f"tokens: longer texts would fail"
            )


CHECKS: tuple[Callable[[Path, EncoderShape], Iterator[str]], ...] = (
    _config,
    _weights,
    _heads,
    _tokenizer,
    _modules,
    _sentence_transformers,
)
