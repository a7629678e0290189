"""Turn a BERT sentence encoder into an exactly equivalent XLM-RoBERTa folder in BGE-M3's layout.

Small BERT encoders are easy to obtain; BGE-M3 is XLM-RoBERTa. Both compute the same function of one
text once three differences are settled, so tests and examples get a small *trained* model of
BGE-M3's kind:

* XLM-RoBERTa numbers positions from ``pad_token_id + 1``, BERT from 0: the table moves down;
* XLM-RoBERTa has one token type: row 0, the only one that a single text uses, stays;
* XLM-RoBERTa finds padding by token id, BERT by the attention mask alone: a text that *spells* the
  padding token is outside the equality, every other text is inside it.

BGE-M3's two extra heads have no counterpart in BERT; ``stand_in_heads`` makes them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from bge_pruning.model_io.hub import no_loading_bars
from bge_pruning.model_io.minilm import RECORD_FILE, write_record
from bge_pruning.model_io.model_folder import write_sentence_transformers_files
from bge_pruning.model_io.stand_in_heads import compute_identity_head, fit_sparse_head
from bge_pruning.utils.files import atomic_folder

logger = logging.getLogger(__name__)
TOLERANCE = 1e-5
POSITION_TABLE = "embeddings.position_embeddings.weight"
TOKEN_TYPE_TABLE = "embeddings.token_type_embeddings.weight"
SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "hidden_dropout_prob attention_probs_dropout_prob initializer_range layer_norm_eps pad_token_id"
).split()
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# What transformers copies from tokenizer.json's truncation and padding into tokenizer_config.json.
STORED_LENGTHS = (
    "max_length stride truncation_strategy pad_to_multiple_of pad_token_type_id".split()
)
# The shortest text, a usual one, and one cut at the last row of the position table.
PROBES = (
    "No.",
    "Pruning removes whole layers, heads and units.",
    "every position has its own row " * 500,
)


def convert_config(bert: BertConfig) -> XLMRobertaConfig:
    """Map a BERT config to the XLM-RoBERTa config of the same architecture."""
    _check_convertible(bert)
    return XLMRobertaConfig(
        **{name: getattr(bert, name) for name in SHARED_FIELDS},
        max_position_embeddings=bert.max_position_embeddings + bert.pad_token_id + 1,
        type_vocab_size=1,
        position_embedding_type="absolute",  # older vLLM reads it without a default
        architectures=["XLMRobertaModel"],
    )


def _check_convertible(bert: PretrainedConfig) -> None:
    """Raise ValueError unless a config describes an encoder that XLM-RoBERTa can express."""
    wanted = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
    for name, expected in wanted.items():
        value = getattr(bert, name, expected)
        if value != expected:
            raise ValueError(
                f"config.json: {name} is {value!r}, expected {expected!r}: XLM-RoBERTa cannot "
                "express it. To fix, convert a BERT encoder with absolute position embeddings."
            )
    if bert.pad_token_id is None:
        raise ValueError(
            "config.json: pad_token_id is missing, expected an integer: it places the position "
            "table. To fix, set it to the id of the tokenizer's padding token (mostly 0)."
        )


def convert_state_dict(state: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Rename and reshape BERT weights for XLM-RoBERTa.

    The two architectures share all names, so only tables change: positions from ``(P, H)`` to
    ``(P + pad_token_id + 1, H)``, token types to ``(1, H)``. The new position rows belong to no
    token of a text and are zero. Buffers are left out.
    """
    converted = {name: value for name, value in state.items() if name not in BUFFERS}
    positions = state[POSITION_TABLE]
    unused = positions.new_zeros(pad_token_id + 1, positions.shape[1])
    converted[POSITION_TABLE] = torch.cat([unused, positions])
    converted[TOKEN_TYPE_TABLE] = state[TOKEN_TYPE_TABLE][:1].clone()
    return converted


def convert_model(bert: BertModel) -> XLMRobertaModel:
    """Build the XLM-RoBERTa model that computes what a BERT model computes, in evaluation mode."""
    config = convert_config(bert.config)
    model = XLMRobertaModel(config, add_pooling_layer=bert.pooler is not None).to(bert.dtype)
    model.load_state_dict(convert_state_dict(bert.state_dict(), config.pad_token_id), strict=True)
    return model.eval()


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> list[BatchEncoding]:
    """Batches of texts sorted by length, which leaves little padding, in a fixed order."""
    ordered = sorted(texts, key=lambda text: (len(text), text))
    starts = range(0, len(ordered), batch_size)
    options = {"padding": True, "truncation": True, "max_length": max_length}
    return [
        tokenizer(ordered[start : start + batch_size], **options, return_tensors="pt")
        for start in starts
    ]


@torch.no_grad()
def compute_largest_difference(
    first: PreTrainedModel, second: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> float:
    """Largest difference of the hidden states of real tokens, NaN if any of them is."""
    differences = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        delta = first(**inputs).last_hidden_state - second(**inputs).last_hidden_state
        differences.append(delta[real].abs().max())  # Tensor.max keeps NaN, Python's max may not
    return torch.stack(differences).max().item()


def verify_conversion(bert: BertModel, source: Path, folder: Path, texts: Sequence[str]) -> float:
    """Load a converted folder as a user would and compare it with its source.

    Returns the largest difference of the hidden states of real tokens, at most ``TOLERANCE``.
    """
    length = bert.config.max_position_embeddings
    batches = _tokenize(AutoTokenizer.from_pretrained(source), texts, length)
    again = _tokenize(AutoTokenizer.from_pretrained(folder), texts, length)
    same = all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True)
    )
    converted = XLMRobertaModel.from_pretrained(
        folder, dtype=bert.dtype, add_pooling_layer=bert.pooler is not None
    )
    difference = compute_largest_difference(bert, converted.eval(), again)
    if not same or not difference <= TOLERANCE:  # NaN must fail too
        raise RuntimeError(
            f"{source}: the converted model is not equivalent: token ids "
            f"{'agree' if same else 'differ'}, hidden states differ by {difference:.2e}, expected "
            f"at most {TOLERANCE:.0e}. To fix, check that the source is a plain BertModel with "
            "finite weights and its own tokenizer."
        )
    return difference


def load_bert(source: Path) -> BertModel:
    """Load a BERT encoder in float32, without pooler if its file has none."""
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{source / 'config.json'} not found, expected a BERT folder in Hugging Face layout. "
            "To fix, pass the folder that holds config.json and model.safetensors."
        )
    _check_convertible(AutoConfig.from_pretrained(source))
    bert, report = BertModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if any(not name.startswith("pooler.") for name in missing):
        raise ValueError(
            f"{source}: the weights lack {missing}, expected all of BertModel: they would be "
            "random. To fix, use the complete model file."
        )
    if missing:
        bert = BertModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False)
    return bert.eval()


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """Load BERT's tokenizer with the special tokens that code written for XLM-RoBERTa looks for.

    Truncation and padding stored with the tokenizer are cleared: servers that read
    ``tokenizer.json`` directly would otherwise cut every text there (all-MiniLM-L6-v2 stores 128).
    """
    tokenizer = AutoTokenizer.from_pretrained(
        source, model_input_names=["input_ids", "attention_mask"]
    )
    if tokenizer.cls_token is None or tokenizer.sep_token is None or not tokenizer.is_fast:
        raise ValueError(
            f"{source}: cls_token {tokenizer.cls_token!r}, sep_token {tokenizer.sep_token!r}, "
            f"fast {tokenizer.is_fast}; expected both tokens in a fast tokenizer. "
            "To fix, add tokenizer.json and name the tokens in tokenizer_config.json."
        )
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in STORED_LENGTHS:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def convert_bert_folder(
    source: Path,
    output: Path,
    sentences: Sequence[str],
    *,
    max_seq_length: int = 256,
    record: Mapping[str, object] | None = None,
    model_card: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the XLM-RoBERTa equivalent of a BERT sentence encoder in BGE-M3's layout.

    The written folder is loaded again and compared with the source before it takes its final name.

    Args:
        sentences: Texts to fit the sparse head on; some thousands.
        max_seq_length: Tokens that sentence-transformers keeps of a text, at most the positions
            that the source has.
        record: Further entries of ``conversion.json`` (checksums, origin).
        model_card: Text of ``README.md``; none is written if empty.

    Raises:
        FileExistsError: If ``output`` exists and may not be replaced.
        FileNotFoundError: If ``source`` holds no model.
        ValueError: If ``source`` is not a plain BERT encoder, or there are too few sentences.
        RuntimeError: If the result is not equivalent to the source.
    """
    with no_loading_bars(), atomic_folder(output, RECORD_FILE, overwrite) as folder:
        bert, tokenizer = load_bert(source), load_tokenizer(source)
        model = convert_model(bert)
        length = min(max_seq_length, bert.config.max_position_embeddings)
        texts = list(dict.fromkeys(sentences))
        logger.info("converting %s; its sparse head is fitted on %d texts", source, len(texts))
        _write_model(folder, model, tokenizer)
        sparse = fit_sparse_head(
            model, _tokenize(tokenizer, texts, length), tokenizer.all_special_ids
        )
        torch.save(compute_identity_head(model.config.hidden_size), folder / "colbert_linear.pt")
        torch.save(sparse, folder / "sparse_linear.pt")
        write_sentence_transformers_files(folder, "mean", model.config.hidden_size, length)
        if model_card:
            (folder / "README.md").write_text(model_card, encoding="utf-8")
        difference = verify_conversion(bert, source, folder, [*PROBES, *texts[:32]])
        measured = {"largest_difference": difference, "sentences": len(texts)}
        write_record(folder, {**(record or {}), **measured})
    logger.info("wrote %s (largest difference of hidden states: %.1e)", output, difference)
    return output


def _write_model(folder: Path, model: XLMRobertaModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write config, weights and tokenizer, the config with the tokenizer's special ids."""
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    # safetensors makes files that only their owner can read; a server may run as someone else.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
