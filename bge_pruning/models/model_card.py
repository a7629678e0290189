"""The README.md of an extracted model."""

from __future__ import annotations

from typing import Any

from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.precision import describe_precision

_TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, xlm-roberta, structured-pruning]
---

# Pruned from {base_model}

An ordinary XLM-RoBERTa encoder, cut from `{base_model}` by structured pruning.

| | source | this model |
| --- | ---: | ---: |
{sizes}

`pruning.json` lists the kept layers, heads, units and dimensions, and how near the learned gates
were to this shape. The written model gave the same outputs as the masked model it was cut from
(largest difference {difference:.1e}, float32).{precision}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS_FOLDER")
vectors = model.encode(["A plane is taking off.", "An air plane is taking off."])
```

It also loads with `transformers.AutoModel` ({pooling} pooling, then L2 normalisation){heads}. The
licence of the source model applies.
"""


def render_model_card(info: dict[str, Any]) -> str:
    """Markdown from the content of ``pruning.json``."""
    source, shape = info["source_shape"], info["shape"]
    sizes = {
        "layers": "num_hidden_layers",
        "hidden size": "hidden_size",
        "attention heads": "num_attention_heads",
        "intermediate size": "intermediate_size",
        "vocabulary": "vocab_size",
    }
    rows = [f"| {label} | {source[key]:,} | {shape[key]:,} |" for label, key in sizes.items()]
    before, after = info["parameters"]["source"], info["parameters"]["extracted"]
    rows += [f"| {part} parameters | {before[part]:,} | {after[part]:,} |" for part in before]
    return _TEMPLATE.format(
        base_model=info["source"]["base_model"],
        sizes="\n".join(rows),
        difference=info["largest_difference"],
        precision=describe_precision(info),
        pooling=info["pooling"],
        heads=_describe_heads(EncoderShape(**shape)),
    )


def _describe_heads(shape: EncoderShape) -> str:
    if not (shape.sparse_head and shape.colbert_dim):
        return ""
    text = ", and with FlagEmbedding's `BGEM3FlagModel` for sparse and multi-vector outputs"
    if shape.colbert_dim != shape.hidden_size:
        text += f" (pass `colbert_dim={shape.colbert_dim}`)"
    return text
