"""BGE-M3's outputs by their formulas, from the files of a folder alone."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bge_pruning.model_io.hub import no_loading_bars


def compute_outputs(folder: Path, pooling: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states and the outputs of the heads that there are; 0 at padding."""
    from transformers import AutoModel

    with no_loading_bars():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    mask = batch["attention_mask"][..., None].float()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mean = (hidden * mask).sum(1) / mask.sum(1)
    outputs = {
        "last_hidden_state": hidden * mask,
        "dense_vecs": normalize(hidden[:, 0] if pooling == "cls" else mean, dim=-1),
    }
    for name in ("sparse_linear", "colbert_linear"):
        if (folder / f"{name}.pt").exists():
            head = torch.load(folder / f"{name}.pt", weights_only=True)
            outputs[name] = hidden @ head["weight"].T + head["bias"]
    if "sparse_linear" in outputs:
        outputs["token_weights"] = (outputs.pop("sparse_linear").relu() * mask)[..., 0]
    if "colbert_linear" in outputs:
        vectors = normalize(outputs.pop("colbert_linear")[:, 1:], dim=-1)
        outputs["colbert_vecs"] = vectors * mask[:, 1:]
    return outputs
