"""Licence and citations of a pruned model: those of the model that it was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.model_io.hub import hub_name, hub_page
from bge_pruning.reports.markdown import escape, fence

BGE_M3 = """\
@misc{bge-m3,
  title = {BGE M3-Embedding: Multi-Lingual, Multi-Functionality, Multi-Granularity Text Embeddings
           Through Self-Knowledge Distillation},
  author = {Jianlv Chen and Shitao Xiao and Peitian Zhang and Kun Luo and Defu Lian and Zheng Liu},
  year = {2024},
  eprint = {2402.03216},
  archivePrefix = {arXiv},
  primaryClass = {cs.CL}
}"""
SENTENCE_BERT = """\
@inproceedings{reimers-2019-sentence-bert,
  title = {Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks},
  author = {Reimers, Nils and Gurevych, Iryna},
  booktitle = {Proceedings of the 2019 Conference on Empirical Methods in Natural Language
               Processing},
  year = {2019},
  publisher = {Association for Computational Linguistics},
  url = {https://arxiv.org/abs/1908.10084}
}"""
# By hub name; what ends with a slash stands for all models of an owner.
CITATIONS = {"BAAI/bge-m3": BGE_M3, "sentence-transformers/": SENTENCE_BERT}
# By how it was chosen what stays; what is not here has no paper of its own.
METHODS = {
    "l0": "Pruned with learned gates: [hard concrete gates](https://arxiv.org/abs/1712.01312) "
    "(Louizos et al., 2018), [CoFi](https://arxiv.org/abs/2204.00408) (Xia et al., 2022), "
    "[LLM-Shearing](https://arxiv.org/abs/2310.06694) (Xia et al., 2023).",
    "activation": "Pruned by the size of activations as "
    "[Minitron](https://arxiv.org/abs/2407.14679) (Muralidharan et al., 2024) does it.",
    "reconstruction": "Pruned by an optimal brain surgeon over groups, as "
    "[ZipLM](https://arxiv.org/abs/2302.04089) (Kurtic et al., 2023).",
}


def render_rights(source: Mapping[str, Any], method: str = "l0") -> list[str]:
    """Whose licence applies, and whom to cite.

    Args:
        source: ``source`` of ``pruning.json``.
        method: ``method`` of the same.
    """
    origin = hub_name(source)
    papers = [METHODS[method]] if method in METHODS else []
    licence = _licence(source.get("license"), origin)
    return ["## Licence and citation", licence, *_citation(origin), *papers]


def _licence(license_id: str | None, origin: str | None) -> str:
    page = f" ({_link(origin)})" if origin else ""
    if license_id is None:
        return (
            f"The licence of the original{page} applies; its identifier was not known when "
            f"this card was written."
        )
    if license_id == "other":
        return f"The licence of the original{page} applies; it is one of its own."
    return f"The licence of the original{page} applies: `{license_id}`."


def _citation(origin: str | None) -> list[str]:
    if origin is None:
        return []
    found = next((CITATIONS[key] for key in (origin, _owner(origin)) if key in CITATIONS), None)
    if found is None:
        return [f"Cite the original as {_link(origin)} asks."]
    return [fence(found, "bibtex")]


def _owner(name: str) -> str:
    return name.partition("/")[0] + "/"


def _link(name: str) -> str:
    return f"[{escape(name)}]({hub_page(name)})"
