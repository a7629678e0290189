"""Scores on tasks: mteb's own, in every mode, of one model."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import mteb
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.floors import WordEmbeddings
from bge_pruning.evaluation.scoring import RETRIEVAL_METRICS, metric_names, score_tasks
from bge_pruning.evaluation.search import MODES
from bge_pruning.evaluation.tasks import beir_task, sts_task
from bge_pruning.evaluation.text_encoder import Encoded
from bge_pruning.model_io.model_folder import write_sentence_transformers_files

# What mteb calls of itself and of sentence-transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fill_missing parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension`:FutureWarning"),
]


@pytest.fixture(scope="module")
def retrieval(collection):
    return beir_task(collection)


@pytest.fixture(scope="module")
def similarity(sts_csv):
    return sts_task(sts_csv)


@pytest.fixture(scope="module")
def scores(encoder, retrieval, similarity):
    return score_tasks(encoder, [similarity, retrieval], list(MODES))


def mtebs(folder, task) -> dict[str, float]:
    """Scores of mteb's own evaluation of a sentence-transformers model."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    options = {"cache": None, "show_progress_bar": False, "co2_tracker": False}
    result = mteb.evaluate(model, [task.mteb_task], **options)
    return result.task_results[0].scores["test"][0]


def test_dense_scores_are_mtebs_of_the_same_model(
    scores, encoder, retrieval, similarity, model_folder
):
    ours = scores["tiny", "dense"]
    pairs = score_tasks(encoder, [similarity], ["dense"])["tiny", "dense"]
    for task, score in ((retrieval, ours), (similarity, pairs)):
        theirs = mtebs(model_folder, task)
        for metric in metric_names(task.kind, "dense"):
            assert score.values[metric] == pytest.approx(theirs[metric], abs=1e-4)
    assert ours.samples.mean() == pytest.approx(ours.values["ndcg_at_10"], abs=1e-4)
    assert len(ours.samples) == 15


E5 = {"query": "how does it help: ", "passage": "a long text: "}
BY_TASK = {"STS": "the same: ", "Retrieval-query": "find out: ", "Retrieval": "some text: "}


@pytest.fixture
def prompted(model_folder, tmp_path):
    """A function that gives the model prompts: a folder of it."""

    def make(name: str, prompts: dict, default: str | None) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / name)
        settings = {"prompts": prompts, "default_prompt_name": default}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.mark.filterwarnings("ignore:SentenceTransformers that use prompts:UserWarning")
@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "how does it help: ", "document": "a long text: "}, None),
        ({"query": "how does it help: "}, "query"),  # of pairs too, and not of passages
        ({"query": "", "document": "", "x": "in short: "}, "x"),
        (BY_TASK, None),
        ({**BY_TASK, "Retrieval-document": "", "query": "a plane: "}, "STS"),
        ({"tiny": "of this task: ", "tiny-query": "find out: ", **BY_TASK}, None),
    ],
)
def test_prompts_are_mtebs(prompts, default, prompted, retrieval, similarity, monkeypatch):
    """The texts that are embedded are the same, and so are the scores."""
    from mteb.models.abs_encoder import AbsEncoder
    from sentence_transformers import SentenceTransformer

    encode, texts = SentenceTransformer.encode, set()

    def record(self, inputs, prompt_name=None, prompt=None, **options):
        before = self._resolve_prompt(prompt, prompt_name) or ""
        texts.update(before + text for text in inputs)
        return encode(self, inputs, prompt_name=prompt_name, prompt=prompt, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", record)
    # It knows no task called tiny.
    known = staticmethod(lambda prompts, **_: (prompts, ()))
    monkeypatch.setattr(AbsEncoder, "validate_task_to_prompt_name", known)
    folder = prompted("model", prompts, default)
    encoder = load_encoder(str(folder))
    spy = Mock(wraps=encoder, prompts=encoder.prompts)
    for task in (retrieval, similarity):
        theirs = mtebs(folder, task)
        ours = score_tasks(spy, [task], ["dense"])["tiny", "dense"]
        assert {text for call in spy.encode.call_args_list for text in call.args[0]} == texts
        for metric in metric_names(task.kind, "dense"):
            assert ours.values[metric] == pytest.approx(theirs[metric], abs=1e-4)
        spy.encode.reset_mock()
        texts.clear()


@pytest.mark.filterwarnings("ignore:(Task name passage|Some prompts):UserWarning")
def test_a_prompt_of_passages_by_another_name_is_written_as_mteb_knows_it(prompted, retrieval):
    """mteb does not look for it; the folder that is written has mteb's name."""
    folder, written = (prompted(name, E5, None) for name in ("source", "written"))
    base = load_encoder(str(folder)).base
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(written / name)
    write_sentence_transformers_files(written, "cls", 32, 512, base.prompts)
    both = [score_tasks(load_encoder(str(f)), [retrieval], ["dense"]) for f in (folder, written)]
    np.testing.assert_array_equal(*(found["tiny", "dense"].samples for found in both))
    theirs = mtebs(written, retrieval)["ndcg_at_10"]
    assert both[0]["tiny", "dense"].values["ndcg_at_10"] == pytest.approx(theirs, abs=1e-4)


def test_every_task_and_mode_has_its_metrics(scores, encoder, similarity, retrieval):
    both = score_tasks(encoder, [similarity], list(MODES)) | scores
    assert list(scores) == [("tiny", mode) for mode in MODES]  # the two tasks have one name here
    for (_, mode), score in both.items():
        assert tuple(score.values) in (RETRIEVAL_METRICS, metric_names("similarity", mode))
        assert score.seconds > 0
    assert metric_names("similarity", "dense") == ("cosine_spearman", "cosine_pearson")
    assert metric_names("similarity", "all") == ("spearman", "pearson")


@pytest.fixture(scope="module")
def flagembeddings(similarity, model_folder) -> dict[str, np.ndarray]:
    """FlagEmbedding's similarity of each pair, by output."""
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(str(model_folder), use_fp16=False, devices="cpu")
    names = ("return_dense", "return_sparse", "return_colbert_vecs")
    a, b = (model.encode(part, **dict.fromkeys(names, True)) for part in similarity.pairs()[:2])
    sparse = zip(a["lexical_weights"], b["lexical_weights"], strict=True)
    colbert = zip(a["colbert_vecs"], b["colbert_vecs"], strict=True)
    return {
        "dense": (a["dense_vecs"] * b["dense_vecs"]).sum(1),
        "sparse": np.array([model.compute_lexical_matching_score(x, y) for x, y in sparse]),
        "colbert": np.array([float(model.colbert_score(x, y)) for x, y in colbert]),
    }


@pytest.mark.parametrize("mode", MODES)
def test_similarity_of_pairs_is_flagembeddings(mode, encoder, similarity, flagembeddings):
    weights = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}
    expected = sum(weights[name] * flagembeddings[name] for name in MODES[mode])
    score = score_tasks(encoder, [similarity], [mode])["tiny", mode]
    np.testing.assert_allclose(score.samples, expected, atol=1e-5)
    metrics, gold = metric_names("similarity", mode), similarity.pairs()[2]
    assert score.values[metrics[0]] == pytest.approx(spearmanr(expected, gold)[0], abs=1e-6)
    assert score.values[metrics[1]] == pytest.approx(pearsonr(expected, gold)[0], abs=1e-6)


def test_sentences_are_embedded_once_for_all_modes(encoder, similarity):
    spy = Mock(wraps=encoder, prompts={})
    score_tasks(spy, [similarity], ["dense", "sparse", "dense+sparse"])
    spy.encode.assert_called_once()
    (texts, *_) = spy.encode.call_args.args
    assert len(texts) == len(set(texts)) > 40


def test_modes_without_a_head_are_left_out(electra_folder, retrieval):
    encoder = load_encoder(str(electra_folder))
    found = score_tasks(encoder, [retrieval], ["sparse", "dense", "all"])
    assert list(found) == [("tiny", "dense")]
    assert score_tasks(encoder, [retrieval], ["sparse"]) == {}


def test_a_dead_head_finds_nothing(encoder, retrieval):
    """Passages that share nothing with a query came in their order: recall of 0.12."""
    dead = Mock(wraps=encoder, prompts={}, ranks=encoder.ranks)

    def without_weights(*given) -> Encoded:
        found = encoder.encode(*given)
        return replace(found, lexical_weights=0.0 * found.lexical_weights)

    dead.encode = without_weights
    found = score_tasks(dead, [retrieval], ["sparse"])["tiny", "sparse"]
    assert set(found.values.values()) == {0.0}
    assert found.samples.tolist() == [0.0] * 15


PAIRS = [("red dog", "red cat", 1), ("red dog", "red dog", 2), ("dog", "cat dog red", 1)]


def test_floors_of_words(encoder, tmp_path):
    """Tokens in common, and MaxSim of word embeddings; together as the model's own outputs."""
    lines = [f"{a},{b},{score}" for score, (a, b, _) in enumerate(PAIRS)]
    (tmp_path / "x.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]))
    task, table = sts_task(tmp_path / "x.csv"), encoder.word_table()
    scores = score_tasks(WordEmbeddings(encoder), [task], list(MODES))
    samples = {mode: scores["x", mode].samples for mode in MODES}
    assert samples["sparse"] == pytest.approx([0.3 * common for _, _, common in PAIRS])

    def words(text: str) -> np.ndarray:
        ids = [i for i in encoder.tokenize([text])[0] if i not in encoder.special_ids]
        return table[ids] / np.linalg.norm(table[ids], axis=1, keepdims=True)

    late = [(words(a) @ words(b).T).max(1).mean() for a, b, _ in PAIRS]
    np.testing.assert_allclose(samples["colbert"], late, atol=1e-6)
    whole = sum(samples[name] for name in ("dense", "sparse", "colbert"))
    np.testing.assert_allclose(samples["all"], whole, atol=1e-6)


def test_two_models_in_folders_of_one_name(model_folder, small_folder, tmp_path, retrieval):
    values = []
    for number, folder in enumerate((model_folder, small_folder)):
        same = shutil.copytree(folder, tmp_path / str(number) / "model")
        found = score_tasks(load_encoder(str(same)), [retrieval], ["dense"])
        values.append(found["tiny", "dense"].samples)
    assert not np.array_equal(*values)


def test_texts_that_are_cut_are_counted(model_folder, collection, sts_csv):
    encoder, limited = (load_encoder(str(model_folder), max_length=n) for n in (None, 6))
    for task in (beir_task(collection), sts_task(sts_csv)):
        long = score_tasks(encoder, [task], ["dense"])["tiny", "dense"]
        found = score_tasks(limited, [task], ["all"])["tiny", "all"]
        assert long.truncated == 0
        if task.kind == "similarity":
            texts = set(task.pairs()[0]) | set(task.pairs()[1])
        else:
            data = task.mteb_task.dataset["default"]["test"]
            texts = [f"{r['title']} {r['text']}".strip() for r in data["corpus"]]
            texts += task.queries()
        lengths = encoder.tokenize(list(texts)).lengths
        assert found.truncated == int((lengths > 6).sum()) > 0
        assert found.texts == long.texts == len(texts)


def test_similarities_that_are_all_the_same_count_as_0(encoder, similarity, caplog, monkeypatch):
    class Dead(WordEmbeddings):
        def encode(self, *given):
            found = super().encode(*given)
            found.dense_vecs[:] = 1.0
            return found

    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    found = score_tasks(Dead(encoder), [similarity], ["dense"])["tiny", "dense"]
    assert found.values == {"cosine_spearman": 0.0, "cosine_pearson": 0.0}
    assert "tiny: every dense similarity is 32: it counts as 0" in caplog.text
