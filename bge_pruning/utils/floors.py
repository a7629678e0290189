"""Two floors that a pruned model must clear before its score means anything.

An untrained encoder, and a table of word vectors without any encoder, already reach a good part of
a trained model's similarity score. What pruning kept is therefore what is left *above* the larger
of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bge_pruning.models.quiet import no_loading_bars

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


def build_random_weights_model(
    model: str, *, device: str | None = None, seed: int = 0
) -> SentenceTransformer:
    """The model with its trained transformer replaced by an untrained one of the same shape.

    Config, tokenizer, pooling and normalisation stay; the weights are those ``transformers`` gives
    a new model.

    Args:
        model: Folder or hub name of a sentence-transformers model.
        device: Torch device; ``None`` lets sentence-transformers choose.
        seed: Seed of the weights. The caller's random state is left as it was.

    Returns:
        A new model in evaluation mode.

    Raises:
        ValueError: If the model has no transformer, so there is no shape to copy.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    with no_loading_bars():
        result = SentenceTransformer(model, device=device)
    trained = _transformer(result)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(trained)(trained.config)
    result[0].model = untrained.to(result.device)
    return result.eval()


def build_word_embedding_model(model: SentenceTransformer) -> SentenceTransformer:
    """A model without an encoder: the normalised mean of a text's word embeddings.

    Special tokens, positions, the embedding LayerNorm and every layer are ignored; long texts are
    cut where ``model`` cuts them.

    Args:
        model: The model whose tokenizer and word embeddings, shape ``(V, H)``, are taken (copied,
            not shared).

    Returns:
        A new model on the same device. A text without any known token gets the zero vector.

    Raises:
        ValueError: If the model has no transformer, so no word embeddings.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    rows = _transformer(model).get_input_embeddings().weight.detach().float().cpu().clone()
    # Zeros leave the direction of the mean alone, so special tokens (unk too) drop out.
    rows[[index for index in model.tokenizer.all_special_ids if index < len(rows)]] = 0
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    if model.max_seq_length is not None:
        tokenizer.enable_truncation(
            max(1, model.max_seq_length - tokenizer.num_special_tokens_to_add(False))
        )
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, rows), Normalize()], device=str(model.device)
    )


def _transformer(model: SentenceTransformer) -> PreTrainedModel:
    """The Hugging Face model inside."""
    if model.transformers_model is None:
        raise ValueError(
            f"{type(model[0]).__name__} is not a transformer, so it has no floors. To fix, give a "
            "model whose modules.json starts with a Transformer."
        )
    return model.transformers_model
