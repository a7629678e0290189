"""Which of a model's prompts is written before a text."""

import pytest

from bge_pruning.model_io.model_files import find_prompt

E5 = {"query": "query: ", "passage": "passage: "}
TASKS = {"STS": "s: ", "Retrieval": "r: ", "Retrieval-query": "rq: ", "SciFact-document": "sd: "}
SCIFACT = ("SciFact", "Retrieval")


@pytest.mark.parametrize(
    ("prompts", "default", "role", "tasks", "found"),
    [
        ({}, None, "query", (), ""),
        (E5, None, "query", (), "query: "),
        (E5, None, "passage", (), "passage: "),
        (E5, None, "text", (), ""),
        (E5, "query", "text", (), "query: "),  # encode() of sentence-transformers
        (E5, "query", "passage", (), "passage: "),
        ({"query": "q: "}, "query", "passage", (), ""),  # encode_document() ignores the default
        ({"query": ""}, "x", "query", (), ""),  # said to be empty
        ({"x": "x: "}, "x", "passage", (), ""),
        # What sentence-transformers 5 or later saves of an E5 model.
        ({**E5, "document": ""}, None, "passage", (), "passage: "),
        ({"corpus": "c: "}, None, "passage", (), "c: "),
        ({**E5, **TASKS}, None, "text", ("STS12", "STS"), "s: "),
        ({**E5, **TASKS}, None, "query", SCIFACT, "rq: "),
        ({**E5, **TASKS}, None, "passage", SCIFACT, "sd: "),
        ({**E5, **TASKS}, None, "passage", ("NFCorpus", "Retrieval"), "r: "),
        ({**E5, **TASKS}, None, "passage", ("Quora", "Clustering"), "passage: "),
        # A local folder query/, and a local file passage.csv.
        (E5, None, "passage", ("query", "Retrieval"), "passage: "),
        (E5, None, "text", ("passage", "STS"), ""),
    ],
)
def test_a_prompt_is_found_by_task_role_or_default(prompts, default, role, tasks, found):
    config = {"prompts": prompts, "default_prompt_name": default}
    assert find_prompt(config, role, tasks) == found


@pytest.mark.parametrize("prompts", [{}, {**E5, **TASKS}])
def test_a_prompt_that_is_given_comes_first(prompts):
    config = {"prompts": prompts, "given": {"query": "find: ", "passage": ""}}
    assert find_prompt(config, "query", SCIFACT) == "find: "
    assert find_prompt(config, "passage", SCIFACT) == ""
    assert find_prompt(config, "text", ("STS",)) == prompts.get("STS", "")
