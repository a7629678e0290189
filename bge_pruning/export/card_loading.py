"""How a model is loaded in each tool: programs for its card, which the tests run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.export.folder_check import loader_arguments
from bge_pruning.model_io.projection import FOLDER as DENSE
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.reports.markdown import fence

# What a reader puts the path of the folder for.
PLACE = "THIS_FOLDER"
TEXTS = 'texts = ["A plane is taking off.", "An air plane is taking off."]'
ONNX_OUTPUTS = {
    "dense_vecs": "a vector of each text",
    "token_weights": "a weight of each token",
    "colbert_vecs": "a vector of each token after the first",
}
# With it vLLM gives all outputs, the dense one by the first token.
VLLM_OVERRIDES = """--hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'"""


def longest_text(info: Mapping[str, Any]) -> int:
    """Tokens of a text at most, special tokens included.

    Args:
        info: Content of ``pruning.json``. Without ``max_seq_length`` there are only the positions
            to go by; those of XLM-R begin behind a padding token with id 1.
    """
    return info.get("max_seq_length") or info["shape"]["max_position_embeddings"] - 2


def has_all_heads(info: Mapping[str, Any]) -> bool:
    """Whether a model has the sparse and the multi-vector head: FlagEmbedding invents what lacks.

    Args:
        info: Content of ``pruning.json``.
    """
    return bool(info["shape"]["sparse_head"] and info["shape"]["colbert_dim"])


def render_loading(info: Mapping[str, Any]) -> list[str]:
    """A heading and a program for each tool.

    Args:
        info: Content of ``pruning.json``.
    """
    parts = [
        "## How to load",
        f"`{PLACE}` is the path of this folder; `hf download NAME --local-dir {PLACE}` brings it "
        f"from the hub.",
        "### sentence-transformers",
        _python(_sentence_transformers()),
        "### transformers",
        _python(_transformers(info)),
    ]
    if has_all_heads(info):
        parts += [
            "### FlagEmbedding",
            _python(_flag_embedding(info)),
        ]
    if "onnx" in info:
        parts += ["### ONNX Runtime", _python(_onnx_runtime(info)), *_about_onnx(info)]
    return [*parts, "### text-embeddings-inference and vLLM", *_servers(info)]


def _python(lines: Sequence[str]) -> str:
    return fence("\n".join(lines), "python")


def _sentence_transformers() -> list[str]:
    return [
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{PLACE}")',
        TEXTS,
        "vectors = model.encode(texts)  # of length 1",
        "similarities = model.similarity(vectors, vectors)",
    ]


def _transformers(info: Mapping[str, Any]) -> list[str]:
    project = _projection(info)
    pooling = {
        "cls": ["vectors = hidden[:, 0]  # the first token"],
        "mean": [
            'mask = batch["attention_mask"].unsqueeze(-1)',
            "vectors = (hidden * mask).sum(1) / mask.sum(1)  # the mean of the tokens",
        ],
    }
    return [
        "import torch",
        *(["from safetensors.torch import load_file"] if project else []),
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        f'model = AutoModel.from_pretrained("{PLACE}").eval()',
        TEXTS,
        "batch = tokenizer(",
        f"    texts, padding=True, truncation=True, max_length={longest_text(info)}, "
        'return_tensors="pt"',
        ")",
        "with torch.no_grad():",
        "    hidden = model(**batch).last_hidden_state",
        *pooling[info["pooling"]],
        *([*project, "vectors = vectors.float() @ projection.T"] if project else []),
        "vectors = torch.nn.functional.normalize(vectors, dim=-1)",
    ]


def _projection(info: Mapping[str, Any]) -> list[str]:
    if "projection" not in info:
        return []
    return [f'projection = load_file("{PLACE}/{DENSE}/model.safetensors")["linear.weight"]']


def _flag_embedding(info: Mapping[str, Any]) -> list[str]:
    project = _projection(info)
    arguments = {"use_fp16": "False", **_flag_arguments(info)}
    said = ", ".join(f"{name}={value}" for name, value in arguments.items())
    lines = [
        *(["import numpy as np"] if project else []),
        "from FlagEmbedding import BGEM3FlagModel",
        *(["from safetensors.numpy import load_file"] if project else []),
        "",
        f'model = BGEM3FlagModel("{PLACE}", {said})',
        TEXTS,
        "output = model.encode(",
        f"    texts, max_length={longest_text(info)},",
        "    return_dense=True, return_sparse=True, return_colbert_vecs=True,",
        ")",
        'dense = output["dense_vecs"]',
        'weights = output["lexical_weights"]  # of each text, by token id',
        'vectors = output["colbert_vecs"]',
    ]
    if project:
        # FlagEmbedding knows nothing of the module that sentence-transformers applies.
        lines += [
            *project,
            "dense = dense @ projection.T  # into the original's dimensions",
            "dense /= np.linalg.norm(dense, axis=1, keepdims=True)",
        ]
    return lines


def _flag_arguments(info: Mapping[str, Any]) -> dict[str, str]:
    """What FlagEmbedding would otherwise assume of BGE-M3."""
    arguments = {}
    if info["pooling"] != "cls":
        arguments["pooling_method"] = f'"{info["pooling"]}"'
    needed = loader_arguments(EncoderShape(**info["shape"]))
    if "colbert_dim" in needed:
        arguments["colbert_dim"] = str(needed["colbert_dim"])
    return arguments


def _onnx_runtime(info: Mapping[str, Any]) -> list[str]:
    outputs = [name for name in ONNX_OUTPUTS if name in info["onnx"]["outputs"]]
    return [
        "import json",
        "from pathlib import Path",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        f'folder = Path("{PLACE}")',
        'pad_id = json.loads((folder / "config.json").read_text())["pad_token_id"]',
        'tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))',
        f"tokenizer.enable_truncation({longest_text(info)})",
        "tokenizer.enable_padding(pad_id=pad_id)",
        TEXTS,
        "batch = tokenizer.encode_batch(texts)",
        f'session = onnxruntime.InferenceSession(folder / "{info["onnx"]["file"]}")',
        "inputs = {",
        '    "input_ids": np.array([text.ids for text in batch]),',
        '    "attention_mask": np.array([text.attention_mask for text in batch]),',
        "}",
        "names = [",
        *(f'    "{name}",  # {ONNX_OUTPUTS[name]}' for name in outputs),
        "]",
        "outputs = dict(zip(names, session.run(names, inputs)))",
    ]


def _about_onnx(info: Mapping[str, Any]) -> list[str]:
    sentences = []
    if "token_weights" in info["onnx"]["outputs"]:
        sentences.append(
            "The lexical weight of a token is the largest of its weights in the text; special "
            "tokens have none."
        )
    if "onnx_int8" in info:
        sentences.append(
            f"For a CPU, `{info['onnx_int8']['file']}` is the same graph with int8 weights."
        )
    return [" ".join(sentences)] if sentences else []


def _servers(info: Mapping[str, Any]) -> list[str]:
    shape = EncoderShape(**info["shape"])
    serve = f"vllm serve {PLACE} --runner pooling"
    lines = [f"text-embeddings-router --model-id {PLACE}", serve]
    if loader_arguments(shape)["vllm_multi_vector"] and info["pooling"] == "cls":
        lines[1] += "  # dense vectors"
        lines.append(f"{serve} {VLLM_OVERRIDES}  # all three outputs")
    said = "Not tested here; the folder has the files and keys that they read."
    if "projection" in info:
        said += (
            f" A version that does not apply `{DENSE}` gives vectors of {shape.hidden_size:,} "
            f"dimensions; they need the projection of the program for transformers."
        )
    return [fence("\n".join(lines), "bash"), said]
