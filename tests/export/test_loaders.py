"""What other programs get from an extracted folder: the masked model's outputs.

The programs are those of the model card. One process, elsewhere and without this package, runs
them all: of every tool, for every kind of folder.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from bge_pruning.export.extract import ExtractOptions
from bge_pruning.export.vocabulary_texts import VocabularyRequest
from bge_pruning.model_io.checkpoint import final_gates, load_trained_model
from bge_pruning.model_io.hub import no_loading_bars
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.model_io.run_metadata import RunMetadata
from bge_pruning.models.structural_pruning import AXES
from tests.common.trainings import extract_json as extract

NEWS = Path(__file__).parents[2] / "data" / "sentences"
TOOLS = ("sentence-transformers", "transformers", "FlagEmbedding", "MultiVectorEncoder")
PROGRAM = re.compile(r"^### ([^\n]+)\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)
OWN = ["A plane is taking off.", "An air plane is taking off."]
# Of which one is longer than the model allows: 78 tokens.
LONG = ["Structured pruning removes whole layers.", "A plane is taking off, yes; " * 30, "好，"]
# Their words are all of the tokens that are kept for them.
TEXTS = ["A plane is taking off.", "Yes.", "the heads of a model turn a text into a vector."]
# Each program is an item of the input; its outputs are an item of the result.
RUN = """\
import json, sys

def plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value

rows = []
for program in json.load(sys.stdin):
    names = {"__name__": "__main__"}
    exec(program, names)
    outputs = ("vectors", "similarities", "dense", "weights", "outputs")
    rows.append({name: plain(names[name]) for name in outputs if name in names})
rows.append(sorted({"bge_pruning", "composer"} & set(sys.modules)))
print("RESULT" + json.dumps(rows))
"""
M3_LANGUAGES = "ar de en fi fr hi ja ko ru sw th zh".split()
ONNX = {"onnx": True}
SQUARE = {"square_head": True}
PROJECTED = {"keep_dimension": True, "onnx": True}


@dataclass
class Case:
    """A run, the folder that it was extracted to, and texts."""

    run: Path
    folder: Path
    texts: list[str]
    info: dict[str, Any]

    def masked_outputs(self) -> list[dict[str, Any]]:
        """Of every text alone, by the masked, unpruned model: token ids and the three outputs."""
        model = load_trained_model(self.run / "latest-rank0.pt")
        masks, _ = final_gates(model)
        tokenizer = Tokenizer.from_str(model.metadata.tokenizer_files["tokenizer.json"].decode())
        tokenizer.enable_truncation(model.metadata.max_seq_length)
        found = []
        for text in self.texts:
            ids = torch.tensor([tokenizer.encode(text).ids])
            mask = torch.ones_like(ids)
            with torch.no_grad():
                outputs = model.heads.outputs(model.backbone(ids, mask, masks), mask)
            values = {key: value[0] for key, value in outputs.items()}
            if "projection" not in self.info:
                values["dense_vecs"] = values["dense_vecs"][self.info["kept"]["hidden"]]
            found.append({"ids": ids[0].tolist(), **values})
        return found

    def square(self) -> int | None:
        """Hidden size, if the multi-vector head was made as wide."""
        shape = self.info["shape"]
        return shape["hidden_size"] if shape["colbert_dim"] == shape["hidden_size"] else None

    def old_ids(self, weights: dict[str, float]) -> dict[int, float]:
        """Lexical weights by the token ids of the unpruned model."""
        path = self.folder / "vocab_map.json"
        old = json.loads(path.read_text())["old_ids"] if path.exists() else range(250_002)
        return {old[int(token)]: weight for token, weight in weights.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory, write_run, run_metadata, unigram_files) -> dict[str, Case]:
    """Extracted folders by name: poolings, heads, dimensions, tokens, and all at once."""
    root, found = tmp_path_factory.mktemp("loaders"), {}
    path = root / "texts.txt"
    path.write_text("\n".join(TEXTS * 2) + "\n", encoding="utf-8")
    mean = replace(run_metadata, pooling="mean")
    unigram, news = unigram_metadata(run_metadata, unigram_files)
    few = {"vocabulary": VocabularyRequest((str(path),))}
    for name, metadata, options, texts in (
        ("cls", run_metadata, ONNX, LONG),
        ("mean", mean, ONNX, LONG),
        ("square", run_metadata, SQUARE, LONG),
        ("projected", run_metadata, PROJECTED, LONG),
        ("everything", run_metadata, SQUARE | PROJECTED | few, TEXTS),
        ("unigram", unigram, {"vocabulary": VocabularyRequest(languages=("en", "de"))}, news),
        ("float16", run_metadata, {"dtype": torch.float16}, OWN),
        ("bfloat16", run_metadata, {"dtype": torch.bfloat16}, OWN),
    ):
        # A bias that lifts some token weights above 0, not all.
        bias = {"heads.sparse_linear.bias": torch.tensor([1.5 if name == "unigram" else 1.0])}
        run = write_run(root / f"{name}-run", metadata, bias)
        info = extract(run, root / name, options=ExtractOptions(**options))
        found[name] = Case(run, root / name, texts, info)
    return found


def unigram_metadata(metadata, files) -> tuple[Any, list[str]]:
    """Of a run with a Unigram tokenizer in XLM-R's layout, and sentences of two languages.

    ``<mask>`` has the last id.
    """
    sizes = {"vocab_size": 6001, "max_position_embeddings": 514, "colbert_dim": 16}
    gates = metadata.l0_module
    metadata = replace(
        metadata,
        shape={**metadata.shape, **sizes},
        hf_config={**metadata.hf_config, "vocab_size": 6001, "max_position_embeddings": 514},
        l0_module={**gates, "target": {**gates["target"], **sizes}},
        tokenizer_files=files,
        max_seq_length=512,
    )
    paths = [NEWS / f"newstest2019-{name}.txt.gz" for name in ("en", "de")]
    news = [gzip.decompress(path.read_bytes()).decode().splitlines()[:6] for path in paths]
    return metadata, news[0] + news[1]


@pytest.fixture(scope="module")
def loaded(cases, tmp_path_factory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return load_all(cases, tmp_path_factory.mktemp("elsewhere"))


def load_all(
    cases: dict[str, Case], elsewhere: Path
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What each tool gives for each folder: of the card's own texts, and of the case's.

    Of FlagEmbedding in half precision too, where the weights are.
    """
    programs = {}
    for name, case in cases.items():
        card = (case.folder / "README.md").read_text(encoding="utf-8")
        for tool, program in PROGRAM.findall(card):
            own = program.replace("THIS_FOLDER", str(case.folder))
            other = own.replace(f"texts = {json.dumps(OWN)}", f"texts = {case.texts!r}")
            if name.endswith("float16"):
                other = own.replace("use_fp16=False", "use_fp16=True")
            assert other != own or (name.endswith("float16") and tool != "FlagEmbedding")
            programs[tool, name] = [own, other]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([program for both in programs.values() for program in both]),
        cwd=elsewhere,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *rows, imported = json.loads(done.stdout.partition("RESULT")[2])
    assert imported == []
    return {key: rows[2 * n : 2 * n + 2] for n, key in enumerate(programs)}


EXACT = ("cls", "mean", "square", "projected", "everything", "unigram")


def assert_close(found: list, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def assert_vectors(found: list, expected: Tensor, square: int | None) -> None:
    """A head as wide as this hidden size turns multi-vectors: their products stay."""
    vectors = torch.tensor(found)
    assert vectors.shape[1] == (square or expected.shape[1])
    if square:
        vectors, expected = vectors @ vectors.T, expected @ expected.T
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_every_card_has_a_program_for_every_tool(cases, loaded):
    assert set(loaded) == {
        (tool, name)
        for name, case in cases.items()
        for tool in (*TOOLS, *(["ONNX Runtime"] if "onnx" in case.info else []))
    }
    lengths = [len(row["ids"]) for row in cases["cls"].masked_outputs()]
    assert lengths[1] == 78  # one text is long enough to be cut


@pytest.mark.parametrize("name", EXACT)
def test_every_tool_gets_the_masked_models_outputs(name, cases, loaded):
    assert_tools_agree(name, cases, loaded)


def assert_tools_agree(name: str, cases: dict[str, Case], loaded: dict) -> None:
    masked = cases[name].masked_outputs()
    expected = torch.stack([row["dense_vecs"] for row in masked])
    found = loaded["sentence-transformers", name][1]
    assert_close(found["vectors"], expected)
    assert_close(found["similarities"], expected @ expected.T)
    assert_close(loaded["transformers", name][1]["vectors"], expected)
    assert_close(loaded["FlagEmbedding", name][1]["dense"], expected)
    found = loaded["FlagEmbedding", name][1]
    for row, ours in enumerate(masked):
        lexical: dict[int, float] = {}
        for token, weight in zip(ours["ids"], ours["token_weights"].tolist(), strict=True):
            if token > 3 and weight > 0:  # the first four are special
                lexical[token] = max(weight, lexical.get(token, 0.0))
        assert cases[name].old_ids(found["weights"][row]) == pytest.approx(lexical, abs=1e-5)
        square = cases[name].square()
        for tool in ("FlagEmbedding", "MultiVectorEncoder"):
            vectors = loaded[tool, name][1]["vectors"][row]
            assert_vectors(vectors, ours["colbert_vecs"], square)
    assert any(found["weights"])


@pytest.mark.parametrize("name", ["cls", "mean", "projected", "everything"])
def test_onnx_runtime_gets_all_outputs(name, cases, loaded):
    found = loaded["ONNX Runtime", name][1]["outputs"]
    for row, ours in enumerate(cases[name].masked_outputs()):
        count = len(ours["ids"])
        assert_close(found["dense_vecs"][row], ours["dense_vecs"])
        words = torch.tensor(ours["ids"]) > 3  # the first four are special, and have none
        assert_close(found["token_weights"][row][:count], ours["token_weights"] * words)
        vectors = found["colbert_vecs"][row][: count - 1]
        assert_vectors(vectors, ours["colbert_vecs"], cases[name].square())


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_flag_embedding_loads_every_precision(name, cases, loaded):
    """With ``use_fp16`` and without, whatever the precision of encoder and heads on disk."""
    exact, half = (torch.tensor(row["dense"]) for row in loaded["FlagEmbedding", name])
    torch.testing.assert_close(exact, half, atol=1e-2, rtol=0)
    torch.testing.assert_close(exact, rounded_vectors(cases[name]), atol=1e-5, rtol=0)


def rounded_vectors(case: Case) -> Tensor:
    """Dense vectors in float32, from the files alone."""
    from transformers import AutoModel

    tokenizer = Tokenizer.from_file(str(case.folder / "tokenizer.json"))
    with no_loading_bars(), torch.no_grad():
        model = AutoModel.from_pretrained(case.folder, dtype=torch.float32).eval()
        ids = [torch.tensor([tokenizer.encode(text).ids]) for text in case.texts]
        hidden = torch.stack([model(row).last_hidden_state[0, 0] for row in ids])
    return normalize(hidden, dim=-1)


# M3-small, with XLM-R's own tokenizer


@pytest.fixture(scope="module")
def m3_cases(m3_small, tmp_path_factory, write_run) -> dict[str, Case]:
    """It without a part of every axis, by random gates: with both poolings, and with fewer tokens.

    Texts are news in twelve languages; of the trimmed one those that it keeps.
    """
    root, base = tmp_path_factory.mktemp("m3"), load_base_model(str(m3_small))
    smaller = {"hidden_size": 320, "num_attention_heads": 10, "num_hidden_layers": 7}
    target = asdict(replace(base.shape, **smaller, intermediate_size=1000))
    gates = {"axes": list(AXES), "target": target, "target_parameters": None, "seed": 3}
    gates |= {"start_sparsity": 0.0, "init_mean": 3.0, "init_std": 0.25}
    mean = RunMetadata(
        base_model=str(m3_small),
        shape=asdict(base.shape),
        hf_config=base.hf_config,
        pooling="mean",
        max_seq_length=base.max_seq_length,
        seed=3,
        l0_module=gates,
        source_pruning=None,
        versions={},
        tokenizer_files=base.tokenizer_files,
        prompts=base.prompts,
    )
    modules = {"backbone": base.backbone, "heads": base.heads}
    tensors = {
        f"{m}.{n}": v for m, module in modules.items() for n, v in module.state_dict().items()
    }
    news = [f"query: {read_news(name)[7]}" for name in M3_LANGUAGES]
    few = {"vocabulary": VocabularyRequest(languages=("de", "th"), size=32_000)}
    found = {}
    for name, metadata, options, texts in (
        ("m3-mean", mean, {}, [*news, LONG[1] * 20]),
        ("m3-cls", replace(mean, pooling="cls"), {}, news[:4]),
        ("m3-trimmed", mean, few, [read_news("de")[0], read_news("th")[0]]),
    ):
        run = write_run(root / f"{name}-run", metadata, tensors)
        info = extract(run, root / name, options=ExtractOptions(**options))
        found[name] = Case(run, root / name, texts, info)
    return found


def read_news(language: str) -> list[str]:
    path = NEWS / f"newstest2019-{language}.txt.gz"
    return gzip.decompress(path.read_bytes()).decode().splitlines()


@pytest.fixture(scope="module")
def m3_loaded(m3_cases, tmp_path_factory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return load_all(m3_cases, tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m3-mean", "m3-cls", "m3-trimmed"])
def test_every_tool_gets_the_outputs_of_masked_m3_small(name, m3_cases, m3_loaded):
    assert_tools_agree(name, m3_cases, m3_loaded)


@pytest.mark.slow
def test_rows_without_a_token_stay_until_the_vocabulary_is_trimmed(m3_cases, m3_small):
    """The word table of M3-small has 250,037 rows for 250,002 tokens."""
    rows = "embeddings.word_embeddings.weight"
    old = load_file(m3_small / "model.safetensors")[rows]
    for name in ("m3-mean", "m3-trimmed"):
        folder, info = m3_cases[name].folder, m3_cases[name].info
        table = load_file(folder / "model.safetensors")[rows]
        config = json.loads((folder / "config.json").read_text())
        tokens = len(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())
        count = 250_037 if name == "m3-mean" else tokens
        assert len(table) == config["vocab_size"] == info["shape"]["vocab_size"] == count
        assert tokens == 250_002 or (name == "m3-trimmed" and tokens < 32_000)
        path = folder / "vocab_map.json"
        ids = json.loads(path.read_text())["old_ids"] if path.exists() else range(count)
        assert torch.equal(table, old[list(ids)][:, info["kept"]["hidden"]])
        prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
        assert (prompts["query"], prompts["document"]) == ("query: ", "passage: ")
