"""Tasks that mteb knows by name: finding one, and loading a split of it."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bge_pruning.utils.run_log import log_hub

log = logging.getLogger(__name__)

# How many names a message lists.
SHOWN = 20


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random states afterwards: mteb seeds everything on import and for each task.

    The rest of a run would otherwise depend on whether the rows came from a cache.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that mteb sets
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def find_task(task_name: str, split: str, subset: str | None) -> tuple[Any, str]:
    """Find a task without loading its data; it is set to one split and subset, which is named."""
    task = _get_task(task_name, ("Retrieval", "Reranking"), eval_splits=[split])
    subsets = list(task.metadata.hf_subsets)
    if subset is None and len(subsets) == 1:
        subset = subsets[0]
    if subset not in subsets:
        given = "several subsets" if subset is None else f"no subset '{subset}'"
        raise ValueError(
            f"mteb task '{task_name}' has {given}: {_listed(subsets)}. To fix, set subset to one "
            f"of them."
        )
    return task.filter_languages(None, hf_subsets=[subset]), subset


def _get_task(task_name: str, types: Sequence[str], **options: Any) -> Any:
    """A task over text of one of these types."""
    import mteb
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS

    try:
        task = mteb.get_task(task_name, **options)
    except KeyError:
        raise ValueError(
            f"mteb {mteb.__version__} has no task '{task_name}'{_close_names(task_name, types)}. "
            f"To fix, correct the name."
        ) from None
    found = task.metadata
    base = AbsTaskSTS if "STS" in types else AbsTaskRetrieval
    if not isinstance(task, base) or list(found.modalities) != ["text"]:
        expected = (
            "pairs of sentences with scores" if "STS" in types else "queries with judged texts"
        )
        raise ValueError(
            f"mteb task '{task_name}' is of type {found.type} over {', '.join(found.modalities)}, "
            f"expected {expected}. To fix, choose one of type {' or '.join(types)} over text."
        )
    return task


def load_tasks(
    task_name: str, subset: str | None, types: Sequence[str]
) -> list[tuple[Any, str, str]]:
    """Load what mteb evaluates of a task; from its cache if it was loaded before.

    Each task returned is set to one split and one subset, which are named; without a ``subset`` all
    are loaded. The type of the task must be one of mteb's ``types``: ``STS``; or ``Retrieval``.

    Raises:
        FileNotFoundError: If mteb cannot load the data.
        ValueError: If there is no such task or subset, or the task is of another kind.
    """
    with random_state_kept():
        metadata = _get_task(task_name, types).metadata
        subsets = list(metadata.hf_subsets)
        if subset is not None and subset not in subsets:
            raise ValueError(
                f"mteb task '{task_name}' has no subset '{subset}', but {_listed(subsets)}. To "
                f"fix, choose one of them, or name the task alone for all of them."
            )
        return [
            (_load_task(task_name, types, split, part), split, part)
            for split in metadata.eval_splits
            for part in ([subset] if subset else subsets)
        ]


def _load_task(task_name: str, types: Sequence[str], split: str, subset: str) -> Any:
    task = _get_task(task_name, types, eval_splits=[split])
    task = task.filter_languages(None, hf_subsets=[subset])
    with _explain_failures(task, split, subset):
        task.load_data()
    return task


def _close_names(task_name: str, types: Sequence[str]) -> str:
    import mteb

    tasks = mteb.get_tasks(task_types=list(types), exclude_superseded=False)
    names = {task.metadata.name.casefold(): task.metadata.name for task in tasks}
    wanted = task_name.casefold()
    close = [key for key in names if wanted in key] or difflib.get_close_matches(wanted, names, 5)
    return f", but {_listed([names[key] for key in close])}" if close else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_split(
    task_name: str, split: str, subset: str | None, training: bool = True
) -> tuple[str, Any]:
    """Load a split of a task as mteb evaluates it; from its cache if it was loaded before.

    Args:
        training: Whether it is trained on: a split that mteb evaluates is then worth a warning.

    Returns:
        Its name for messages, and the task, for :func:`data_of`.

    Raises:
        FileNotFoundError: If mteb cannot load the data.
        ValueError: See :func:`find_task`; or if the task has no such split.
    """
    # One block: a task may draw from the random state that it set when it was made.
    with random_state_kept():
        task, subset = find_task(task_name, split, subset)
        with _explain_failures(task, split, subset):
            splits = _list_splits(task, subset)
        if split not in splits:
            raise ValueError(
                f"mteb task '{task_name}' has no split '{split}', but {_listed(splits)}. To fix, "
                f"set split to one of them; mteb evaluates {_listed(task.metadata.eval_splits)}."
            )
        with _explain_failures(task, split, subset):
            task.load_data()
            data_of(task, split)
    if training and split in task.metadata.eval_splits:
        log.warning("mteb evaluates %s on split '%s', which is trained on here", task_name, split)
    return " ".join(["mteb", task_name, *([subset] if subset != "default" else []), split]), task


def data_of(task: Any, split: str) -> Any:
    """Data of a task that is set to one subset.

    They are ``queries`` and ``corpus`` as data sets with the columns ``id``, ``text`` and perhaps
    ``title`` or ``instruction``, and ``relevant_docs``, the scores of passages by query, all by id;
    and ``top_ranked`` of a task that reranks.
    """
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    (subset,) = task.hf_subsets
    return task.dataset[subset][split]


def _list_splits(task: Any, subset: str) -> list[str]:
    """Splits that have judgements of their own.

    mteb serves the only split of a data set under whatever name it is asked for: without this check
    ``train`` would silently be the test queries.
    """
    import datasets
    from mteb.abstasks import AbsTaskRetrieval

    evaluated = list(task.metadata.eval_splits)
    if type(task).load_data is not AbsTaskRetrieval.load_data:
        return evaluated  # its own way to load data is written for these
    path, revision = (task.metadata.dataset[key] for key in ("path", "revision"))
    config = f"{subset}-qrels"
    if subset == "default":
        configs = datasets.get_dataset_config_names(path, revision=revision)
        config = "default" if "default" in configs else "qrels"
    splits = datasets.get_dataset_split_names(path, config, revision=revision)
    return splits if len(splits) > 1 else evaluated


@contextmanager
def _explain_failures(task: Any, split: str, subset: str) -> Iterator[None]:
    """Around mteb's loading of a task, which raises whatever hub, builders and tasks raise."""
    import datasets

    log_hub(f"mteb task {task.metadata.name}")
    failures = (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        yield
    except failures as error:
        name, path = task.metadata.name, task.metadata.dataset["path"]
        arguments = f"'{name}', eval_splits=['{split}'], hf_subsets=['{subset}']"
        raise FileNotFoundError(
            f"mteb task '{name}': cannot load split '{split}' of {path} "
            f"({type(error).__name__}: {str(error).strip()[:300]}). To fix, run once where the hub "
            f'can be reached: python -c "import mteb; mteb.get_task({arguments}).load_data()", and '
            f"bring its cache here ({datasets.config.HF_DATASETS_CACHE}); or get the collection in "
            f"BEIR layout and use kind beir."
        ) from None
