"""The three outputs and their scores equal what FlagEmbedding computes on the same states."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models import embedding_heads
from bge_pruning.models.embedding_heads import EmbeddingHeads, compute_colbert_scores
from bge_pruning.utils.model_analysis import measure_peak_bytes

H, C, V = 12, 7, 99
ALL_OUTPUTS = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
SENTENCES = [
    "the man plays the guitar and the dog runs",  # one word three times
    "zebra the man",  # <unk>
    "",  # nothing but <s> and </s>
    "naïve \N{CJK UNIFIED IDEOGRAPH-72AC} dog",
]


def build_heads(pooling: str = "cls", sparse: bool = True, colbert_dim: int = C) -> EmbeddingHeads:
    heads = EmbeddingHeads(H, pooling, sparse, colbert_dim).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads.eval()


@pytest.fixture(scope="module")
def hidden(batch) -> Tensor:
    size = (*batch["input_ids"].shape, H)
    return torch.randn(size, generator=torch.Generator().manual_seed(2)).double()


def flag_embedding_model(heads: EmbeddingHeads, hidden: Tensor) -> Any:
    """FlagEmbedding's model on top of an encoder that returns the given states."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import (
        EncoderOnlyEmbedderM3ModelForInference,
    )

    class Encoder(nn.Module):
        config = SimpleNamespace(vocab_size=V)

        def forward(self, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=hidden)

    parts = {"sparse_linear": heads.sparse_linear, "colbert_linear": heads.colbert_linear}
    ids = SimpleNamespace(cls_token_id=0, pad_token_id=1, eos_token_id=2, unk_token_id=3)
    return EncoderOnlyEmbedderM3ModelForInference(
        {"model": Encoder(), **parts},
        tokenizer=ids,
        sentence_pooling_method=heads.pooling,
        normalize_embeddings=True,
    ).eval()


@pytest.fixture(scope="module")
def m3(model_folder) -> Any:
    """What a user of FlagEmbedding loads from a model folder."""
    from FlagEmbedding import BGEM3FlagModel

    return BGEM3FlagModel(str(model_folder), use_fp16=False, devices="cpu")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_are_flag_embeddings(pooling, hidden, batch):
    heads = build_heads(pooling)
    with torch.no_grad():
        ours = heads.outputs(hidden, batch["attention_mask"])
        model = flag_embedding_model(heads, hidden)
        theirs = model(batch, **ALL_OUTPUTS, return_sparse_embedding=False)
    real = batch["attention_mask"].bool()
    assert list(ours) == ["dense_vecs", "token_weights", "colbert_vecs"]
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(ours["dense_vecs"], theirs["dense_vecs"], **close)
    torch.testing.assert_close(ours["colbert_vecs"], theirs["colbert_vecs"], **close)
    # FlagEmbedding drops padding later, by its token id.
    torch.testing.assert_close(
        ours["token_weights"][real], theirs["sparse_vecs"].squeeze(-1)[real], **close
    )
    assert not ours["token_weights"][~real].any()


def test_a_model_folders_outputs_are_flag_embeddings(m3, model_folder):
    theirs = m3.encode(SENTENCES, max_length=32, **ALL_OUTPUTS)
    base = load_base_model(str(model_folder))
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    encodings = tokenizer.encode_batch(SENTENCES)
    ids = torch.tensor([e.ids for e in encodings])
    mask = torch.tensor([e.attention_mask for e in encodings])
    with torch.no_grad():
        ours = base.heads.eval().outputs(base.backbone.eval()(ids, mask), mask)
    torch.testing.assert_close(
        ours["dense_vecs"], torch.tensor(theirs["dense_vecs"]), atol=1e-5, rtol=0
    )
    for row, vectors in enumerate(theirs["colbert_vecs"]):
        tokens = int(mask[row].sum()) - 1  # without CLS
        assert vectors.shape == (tokens, 32)
        mine = ours["colbert_vecs"][row]
        torch.testing.assert_close(mine[:tokens], torch.tensor(vectors), atol=1e-5, rtol=0)
        assert not mine[tokens:].any()
    encoder = TextEncoder(base)
    rows = encoder.encode(SENTENCES, ("token_weights",)).lexical_weights
    mine = [dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in rows]
    weights = [{int(t): float(w) for t, w in v.items()} for v in theirs["lexical_weights"]]
    assert mine == [pytest.approx(vector, abs=1e-5) for vector in weights]
    assert [len(vector) for vector in mine].count(0) == 1  # of the text that is empty


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_matter_and_a_text_of_padding_is_no_nan(pooling, hidden, batch):
    heads, mask = build_heads(pooling), batch["attention_mask"]
    noisy = torch.where(mask[..., None].bool(), hidden, 1e6)
    with torch.no_grad():
        clean, other = heads.outputs(hidden, mask), heads.outputs(noisy, mask)
        nothing = heads.outputs(hidden, torch.zeros_like(mask))
    for name, value in clean.items():
        torch.testing.assert_close(other[name], value, atol=1e-9, rtol=0)
        assert nothing[name].isfinite().all()
    assert not nothing["token_weights"].any() and not nothing["colbert_vecs"].any()


def random_vecs(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors, and a mask that leaves 1 to all tokens; garbage where masked."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, tokens, C, generator=generator).double()
    vectors = nn.functional.normalize(vectors, dim=-1)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return torch.where(mask[..., None].bool(), vectors, 50.0), mask


@pytest.mark.parametrize("seed", range(5))
def test_colbert_scores_are_flag_embeddings(seed, m3):
    query, query_mask = random_vecs(3, 4, seed)
    passage, passage_mask = random_vecs(5, 6, seed + 100)
    ours = compute_colbert_scores(query, query_mask, passage, passage_mask)
    theirs = [
        [
            float(m3.colbert_score(q[: m.sum()].numpy(), p[: n.sum()].numpy()))
            for p, n in zip(passage, passage_mask, strict=True)
        ]
        for q, m in zip(query, query_mask, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-12, rtol=0)


def test_colbert_score_of_opposites_is_negative():
    # Padding is a zero vector: were it a candidate, no score could be below 0.
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    passage = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    scores = compute_colbert_scores(query, torch.tensor([[1, 0]]), passage, torch.tensor([[1, 0]]))
    assert scores.tolist() == [[-1.0]]


def plain_colbert(query: Tensor, query_mask: Tensor, passage: Tensor, mask: Tensor) -> Tensor:
    """The formula in one piece, for autograd."""
    products = torch.einsum("qic,pjc->qpij", query, passage)
    best = products.masked_fill(~mask.bool()[None, :, None], -9.0).amax(-1)
    return (best * query_mask[:, None]).sum(-1) / query_mask.sum(-1)[:, None]


@pytest.mark.parametrize("products", [1, 24, 50, 130, 1 << 24])
def test_colbert_scores_in_blocks_have_the_gradient_of_the_whole(products, monkeypatch):
    """A token with a token, a query with 1 and 2 passages, several of both, all at once."""
    monkeypatch.setattr(embedding_heads, "BLOCK_PRODUCTS", products)
    (query, query_mask), (passage, mask) = random_vecs(3, 4, 1), random_vecs(5, 6, 2)
    # Tokens before texts in memory: the gradients must not be written into copies.
    query, passage = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, passage))
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for compute in (plain_colbert, compute_colbert_scores):
        leaves = [query.clone().requires_grad_(), passage.clone().requires_grad_()]
        scores = compute(leaves[0], query_mask, leaves[1], mask)
        found.append([scores, *torch.autograd.grad((scores * weights).sum(), leaves)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("queries", "passages", "tokens", "size"),
    [
        (8, 64, 64, 64),
        # BGE-M3: 32 queries with 8 passages each of 512 tokens; the passages of 8 GPUs, shorter.
        pytest.param(32, 256, 511, 1024, marks=pytest.mark.slow),
        pytest.param(32, 2048, 63, 1024, marks=pytest.mark.slow),
    ],
)
def test_memory_of_colbert_scores_is_that_of_the_vectors_and_of_a_block(
    queries, passages, tokens, size, monkeypatch
):
    products = min(embedding_heads.BLOCK_PRODUCTS, queries * 12 * passages * tokens // 8)
    monkeypatch.setattr(embedding_heads, "BLOCK_PRODUCTS", products)
    query = torch.randn(queries, 12, size, requires_grad=True)
    passage = torch.randn(passages, tokens, size, requires_grad=True)
    masks = torch.ones(queries, 12), torch.ones(passages, tokens)

    def step() -> None:
        compute_colbert_scores(query, masks[0], passage, masks[1]).square().sum().backward()

    gradients = query.nbytes + passage.nbytes
    small = 40 * queries * 12 * passages  # largest products and their places
    assert gradients < measure_peak_bytes(step) < gradients + 8 * products + small


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_colbert_scores_in_low_precision_are_finite(dtype):
    query, query_mask = random_vecs(2, 4, 1)
    passage, passage_mask = random_vecs(3, 5, 2)
    exact = compute_colbert_scores(query, query_mask, passage, passage_mask)
    scores = compute_colbert_scores(query.to(dtype), query_mask, passage.to(dtype), passage_mask)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_multi_vectors_are_unit_vectors_under_autocast(hidden, batch):
    heads, mask = build_heads().float(), batch["attention_mask"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vectors = heads.colbert_vecs(hidden.float(), mask)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), mask[:, 1:].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("colbert_dim", [0, C])
def test_pruned_heads_equal_heads_of_masked_states(sparse, colbert_dim, hidden, batch):
    keep = [0, 3, 4, 11]
    heads, mask = build_heads("cls", sparse, colbert_dim), batch["attention_mask"]
    masked = torch.zeros_like(hidden)
    masked[..., keep] = hidden[..., keep]
    cut = copy.deepcopy(heads)
    cut.prune(keep)
    with torch.no_grad():
        expected, small = heads.outputs(masked, mask), cut.outputs(hidden[..., keep], mask)
    expected["dense_vecs"] = expected["dense_vecs"][:, keep]
    names = {"dense_vecs", *["token_weights"] * sparse, *["colbert_vecs"] * bool(colbert_dim)}
    assert small.keys() == expected.keys() == names
    for name, value in expected.items():
        torch.testing.assert_close(small[name], value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["max", "CLS", ""])
def test_an_unknown_pooling_is_refused(pooling):
    message = (
        rf"^pooling '{pooling}' is not one of \('cls', 'mean'\)\. To fix, set model\.pooling\.$"
    )
    with pytest.raises(ValueError, match=message):
        EmbeddingHeads(H, pooling, sparse=True, colbert_dim=C)


@pytest.mark.parametrize(
    ("output", "name"), [("token_weights", "sparse"), ("colbert_vecs", "colbert")]
)
def test_an_output_without_its_head_is_refused(output, name, hidden, batch):
    heads = build_heads(sparse=False, colbert_dim=0)
    message = (
        rf"^the model has no {name} linear head\. To fix, use a base model with {name}_linear\.pt, "
        r"or set model\.init_missing_heads=true\.$"
    )
    with pytest.raises(ValueError, match=message):
        getattr(heads, output)(hidden, batch["attention_mask"])


def test_colbert_scores_are_those_of_flag_embeddings_training(hidden, batch):
    """Its training score has the same mean over query tokens; its passages are not masked."""
    heads, mask = build_heads(), batch["attention_mask"]
    whole = torch.ones_like(mask)
    with torch.no_grad():
        vectors, queries = heads.colbert_vecs(hidden, whole), heads.colbert_vecs(hidden, mask)
        model = flag_embedding_model(heads, hidden)
        theirs = model.compute_colbert_score(queries, vectors, q_mask=mask)
    ours = compute_colbert_scores(queries, mask[:, 1:], vectors, whole[:, 1:])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_gradients_reach_the_states_and_the_heads(hidden, batch):
    heads, states = build_heads(), hidden.clone().requires_grad_()
    outputs = heads.outputs(states, batch["attention_mask"])
    sum(value.square().sum() + value.sum() for value in outputs.values()).backward()
    for tensor in (states, *heads.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()
    padding = ~batch["attention_mask"].bool()
    assert not states.grad[padding].any()


def test_state_dict_has_bge_m3s_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in build_heads().state_dict().items()}
    assert shapes == {
        "sparse_linear.weight": (1, H),
        "sparse_linear.bias": (1,),
        "colbert_linear.weight": (C, H),
        "colbert_linear.bias": (C,),
    }
