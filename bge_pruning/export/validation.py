"""Prove that a written model folder computes what the masked model computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bge_pruning.model_io.hub import quick_loading
from bge_pruning.model_io.model_files import read_pooling
from bge_pruning.model_io.model_folder import dtype_name
from bge_pruning.model_io.pretrained import colbert_size, flat_heads, load_strict, read_heads
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.structural_pruning import PruningMasks

TOLERANCE = 1e-5
VALIDATION_SENTENCES = (
    "A plane is taking off.",
    "Yes.",
    "Structured pruning removes whole layers, attention heads and intermediate units.",
    "Die Bahn kommt heute wieder eine halbe Stunde zu spät.",
    "Где находится ближайшая библиотека?",
    "今天的天气很好，我们去公园散步吧。",
    '1,024 hidden dimensions; 16 heads (64 each) - and "quoted" text, too.',
    "Embedding models turn a text into a vector, so that texts of similar meaning lie close "
    "together; a search engine compares the vector of a question with those of all passages.",
)


class ValidationError(RuntimeError):
    """The written model does not compute what the masked model computes."""


@dataclass(frozen=True)
class References:
    """Outputs of the masked model on the validation sentences, cut to the kept dimensions.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask`` as the written folder's tokenizer gives them.
        hidden: Last hidden states, shape ``(B, T, H)``, ``H`` of the cut model.
        outputs: Outputs by name, see :meth:`EmbeddingHeads.outputs`.
        exact: The same computed in float64, of which nothing is asked but when float32 is not
            enough, see :func:`validate`.
    """

    inputs: dict[str, Tensor]
    hidden: Tensor
    outputs: dict[str, Tensor]
    exact: References | None = None


@dataclass(frozen=True)
class Agreement:
    """Largest difference between two models, in float32, and in float64 if that was needed."""

    float32: float
    float64: float | None = None


@contextmanager
def in_float64(backbone: XLMRobertaBackbone, heads: EmbeddingHeads) -> Iterator[None]:
    """Have a float32 model compute in float64, with no weight changed.

    A layer is widened only while it runs, and tables stay as they are: only what is looked up is
    widened. So next to no memory is needed. The model must not be compiled.
    """
    small, tables = (backbone.embeddings.LayerNorm, heads), backbone.embeddings.tables()
    handles = [table.register_forward_hook(lambda *given: given[-1].double()) for table in tables]
    for layer in backbone.encoder.layer:
        handles.append(layer.register_forward_pre_hook(lambda layer, _: _widen(layer)))
        handles.append(layer.register_forward_hook(lambda layer, *_: _narrow(layer)))
    for module in small:
        module.double()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in (*small, *backbone.encoder.layer):
            module.float()


def _widen(layer: nn.Module) -> None:
    layer.double()


def _narrow(layer: nn.Module) -> None:
    layer.float()


@torch.no_grad()
def compute_references(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    masks: PruningMasks,
    inputs: dict[str, Tensor],
    kept_hidden: list[int],
) -> References:
    """Outputs of the masked model on tokenised sentences ``(B, T)``."""
    mask = inputs["attention_mask"]
    hidden = backbone(inputs["input_ids"], mask, masks)
    outputs = heads.outputs(hidden, mask)
    outputs["dense_vecs"] = outputs["dense_vecs"][:, kept_hidden]
    return References(inputs, hidden[..., kept_hidden], outputs)


def tokenize_sentences(
    tokenizer_files: dict[str, bytes], pad_token_id: int, max_length: int
) -> dict[str, Tensor]:
    """The validation sentences as ids and mask, cut where sentence-transformers cuts them."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_files["tokenizer.json"].decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"tokenizer.json of the checkpoint is no tokenizer ({error}). To fix, use an earlier "
            f"checkpoint of the run."
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    rows = [torch.tensor(tokenizer.encode(s).ids) for s in VALIDATION_SENTENCES]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return {"input_ids": ids, "attention_mask": (ids != pad_token_id).long()}


def validate(folder: Path, references: References) -> Agreement:
    """Load the folder with sentence-transformers, and so with transformers; compare all outputs.

    Both compute in float32, whatever the precision of the weights. It is loaded once and runs once:
    what sentence-transformers pools are the last hidden states of transformers' ``AutoModel``.
    Differences are absolute; of an output with values above 1, relative to the largest of them.

    Some models magnify what float32 rounds (a width cut at once, say), and then two right
    computations differ by more than ``TOLERANCE``. So what fails is compared again with both models
    in float64, where rounding is 5e8 times smaller, and what is wrong differs as much as before.

    Raises:
        ValidationError: If an output differs by more than ``TOLERANCE`` in both.
    """
    found = _compare(folder, references, torch.float32)
    float32 = max(found.values())
    if not (wrong := _above_tolerance(found)):
        return Agreement(float32)
    if references.exact is not None and all(math.isfinite(d) for d in found.values()):
        found = _compare(folder, references.exact, torch.float64)
        if not (wrong := _above_tolerance(found)):
            return Agreement(float32, max(found.values()))
    listed = [f"{n} {'missing' if d == math.inf else f'{d:.2e}'}" for n, d in wrong.items()]
    raise ValidationError(
        f"the extracted model differs from the masked model by more than {TOLERANCE:.0e}: "
        + ", ".join(listed)
        + " (of values above 1 relative to the largest). To fix, look for NaN in the weights of "
        "the run; if there are none, report it with the checkpoint: it is a defect of extraction."
    )


def _above_tolerance(differences: dict[str, float]) -> dict[str, float]:
    # NaN is above it as well.
    return {name: d for name, d in differences.items() if not d <= TOLERANCE}


@torch.no_grad()
def _compare(folder: Path, references: References, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences by output, of the folder in a precision; ``inf`` for a missing one."""
    mask, expected = references.inputs["attention_mask"], references.outputs
    rows = _run_folder(folder, dtype)
    hidden = torch.zeros_like(references.hidden)
    for states, row in zip(hidden, rows, strict=True):
        # A folder that cuts or splits texts in another way gives other states.
        tokens = min(int(row["attention_mask"].sum()), len(states))
        states[:tokens] = row["token_embeddings"][:tokens]
    real = mask.bool()
    differences = {"last_hidden_state": _difference(hidden[real], references.hidden[real])}
    outputs = _load_heads(folder, hidden.shape[-1]).to(dtype).outputs(hidden, mask)
    missing = torch.tensor(math.inf)
    for name, reference in expected.items():
        known = name in outputs
        differences[name] = _difference(outputs[name], reference) if known else missing
    vectors = torch.stack([row["sentence_embedding"] for row in rows])
    differences["sentence-transformers"] = _difference(vectors, expected["dense_vecs"])
    return {name: float(d) for name, d in differences.items()}


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference, relative to the largest value where that is above 1."""
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)


def _load_heads(folder: Path, hidden_size: int) -> EmbeddingHeads:
    states = read_heads(folder)
    sparse, pooling = states["sparse_linear"] is not None, read_pooling(folder)
    heads = EmbeddingHeads(hidden_size, pooling, sparse, colbert_size(states))
    load_strict(heads, flat_heads(states), str(folder))
    return heads


def sentence_vectors(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors of the validation sentences by sentence-transformers, float32, on the CPU."""
    rows = _run_folder(folder, dtype)
    return torch.stack([row["sentence_embedding"] for row in rows]).float()


def _run_folder(folder: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Features of each validation sentence after the last module of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    try:
        with quick_loading():
            model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    except Exception as error:  # keys of config.json that only the loader knows
        raise ValueError(
            f"transformers does not load the extracted model "
            f"({str(error).strip().partition(chr(10))[0]}). To fix, correct the config.json of the "
            f"model that was trained, and train again."
        ) from error
    model.default_prompt_name = None  # the masked model got no prompt either
    return model.encode(list(VALIDATION_SENTENCES), output_value=None, show_progress_bar=False)


def check_as_loaded(folder: Path, expected: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of the ``(n, H)`` dense vectors in the folder's own precision."""
    found = sentence_vectors(folder, dtype)
    if not found.isfinite().all():
        raise ValidationError(
            f"run in {dtype_name(dtype)}, the extracted model gives vectors that are not finite: "
            f"its activations are beyond the range. To fix, write it in bf16 or fp32."
        )
    return float((found - expected).abs().max())
