"""The README.md of an extracted model, and writing it again when more is known about the model."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bge_pruning.evaluation.index_compatibility import describe_compatibility
from bge_pruning.export.onnx_export import describe_comparison
from bge_pruning.export.onnx_quantize import describe_loss
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.hub import CARD, display_name, hub_name, hub_page
from bge_pruning.reports.markdown import escape, fence
from bge_pruning.reports.report_tables import (
    render_bytes,
    render_layers,
    render_main_scores,
    render_sizes,
    render_speed,
    share,
)
from bge_pruning.utils.files import write_text
from bge_pruning.utils.json_records import Count, Record, Text, read_record
from bge_pruning.utils.records import (
    METRIC_TITLES,
    BothParameters,
    EvaluationRecord,
    IndexRecord,
    PruningRecord,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Template

# Copies in the folder, which later cards are made from too; and what writes each of them.
EVALUATION = "evaluation.json"
INDEX = "index_compatibility.json"
WRITERS = {EVALUATION: "evaluate_model.py", INDEX: "check_index_compatibility.py"}
PARTS = ("encoder", "embeddings", "pooler", "heads")
TAGS = ["sentence-transformers", "feature-extraction", "xlm-roberta", "structured-pruning"]
# By the kind of a task: type and name, as sentence-transformers writes them.
TASKS = {
    "similarity": ("semantic-similarity", "Semantic Similarity"),
    "retrieval": ("information-retrieval", "Information Retrieval"),
}
R = TypeVar("R", bound=Record)


class _Evaluation(EvaluationRecord):
    """An evaluation that says which model it is about."""

    model: Text
    parameters: BothParameters | None


class _Settings(Record):
    """``sentence_bert_config.json``."""

    max_seq_length: Count | None = None


def write_model_card(
    folder: Path, evaluation: Path | None = None, index: Path | None = None
) -> Path:
    """Write ``README.md`` of an extracted folder from everything that is known about it.

    What ``scripts/evaluate_model.py`` and ``scripts/check_index_compatibility.py`` wrote about it
    is copied into the folder; what was copied there before is used again. Returns the path of
    ``README.md``.

    Raises:
        FileNotFoundError: If the folder holds no extracted model, or a file does not exist.
        ValueError: If a file is damaged, is something else, or is about another model. Nothing is
            written then.
    """
    from jinja2 import UndefinedError

    record = _read_pruning(folder)
    scores = _read(EVALUATION, _Evaluation, evaluation, folder)
    found = _read(INDEX, IndexRecord, index, folder)
    if scores and evaluation:  # the folder may have been moved since a copy was made
        _check_path(evaluation, scores.model, folder)
    if scores:
        _check_parameters(evaluation or folder / EVALUATION, scores, record)
    if found and index:
        _check_index(index, found, folder)
    try:
        card = render_model_card(record, scores, found)
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise ValueError(
            f"{folder}: the card cannot be made, something is missing in what is known about the "
            f"model ({error!r}). To fix, extract and evaluate it again with this version."
        ) from error
    for name, path in ((EVALUATION, evaluation), (INDEX, index)):
        if path is not None and path.resolve() != (folder / name).resolve():
            write_text(folder / name, path.read_text(encoding="utf-8"))
    write_text(folder / CARD, card)
    return folder / CARD


def _read_pruning(folder: Path) -> PruningRecord:
    if not (folder / MARKER).is_file():
        raise FileNotFoundError(
            f"{folder}: holds no {MARKER}, so it is not an extracted model and its {CARD} is kept. "
            f"To fix, give the folder that scripts/extract_pruned_model.py wrote."
        )
    record = read_record(folder / MARKER, PruningRecord, "extract the model again")
    # What sentence-transformers does; somebody may have changed it since the extraction.
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        settings = read_record(path, _Settings, "copy it again")
        record.max_seq_length = settings.max_seq_length or record.max_seq_length
    return record


def _read(name: str, kind: type[R], given: Path | None, folder: Path) -> R | None:
    """A file about the model: the one that was given, or the copy in the folder if there is one."""
    if given is None and not (folder / name).is_file():
        return None
    fix = f"give the JSON file that scripts/{WRITERS[name]} wrote"
    return read_record(given or folder / name, kind, fix)


def _check_path(path: Path, model: str, folder: Path) -> None:
    """Refuse a file about another folder that exists, or about a file in this one."""
    judged = Path(model)
    if judged.exists() and judged.resolve() != folder.resolve():
        raise ValueError(
            f"{path}: is about {judged}, not about {folder}. To fix, give a file that is about "
            f"{folder} itself."
        )


def _check_index(path: Path, index: IndexRecord, folder: Path) -> None:
    _check_path(path, index.new, folder)
    if index.old is not None and Path(index.old).resolve() == folder.resolve():
        raise ValueError(
            f"{path}: compares the model with itself, which says nothing about an index of the "
            f"original. To fix, give the original as OLD to scripts/{WRITERS[INDEX]}."
        )


def _check_parameters(path: Path, evaluation: EvaluationRecord, record: PruningRecord) -> None:
    judged = evaluation.parameters and evaluation.parameters.model
    wrong = []
    for part in PARTS:
        real = getattr(record.parameters.extracted, part)
        if part == "heads" and record.projection:  # evaluation counts the map with the heads
            real += record.projection.dimensions * record.shape.hidden_size
        found = getattr(judged, part) if judged else 0
        if found != real:
            wrong.append(f"{part} {found:,} (here {real:,})")
    if wrong:
        raise ValueError(
            f"{path}: is about a model with other parameters: {', '.join(wrong)}. To fix, evaluate "
            f"the model of this folder."
        )


def render_model_card(
    record: PruningRecord,
    evaluation: EvaluationRecord | None = None,
    index: IndexRecord | None = None,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads."""
    body = _template().render(
        record=record,
        index=index,
        layers="".join(render_layers(record.kept.layer, record.source_shape.num_hidden_layers)),
        scores=render_main_scores(evaluation) if evaluation else [],
        gains=render_sizes(evaluation) + render_speed(evaluation.speed) if evaluation else [],
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{_render_metadata(record, evaluation)}\n---\n\n{body}\n"


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        finalize=_known,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is Markdown; `escaped` is what escapes
    )
    environment.filters.update(
        code=lambda text, language: f"{fence(text, language)}\n",
        escaped=escape,
        flow=lambda text: f"{' '.join(text.split())}\n",
        fmt=format,
        in_bytes=render_bytes,
        known=_known,
        listed=_join,
        public=lambda path: Path(path).name if Path(path).is_absolute() else path,
    )
    functions = (
        describe_comparison,
        describe_loss,
        describe_compatibility,
        display_name,
        hub_name,
        share,
    )
    environment.globals.update({function.__name__: function for function in functions})
    return environment.get_template("model_card.md.jinja")


def _known(value: Any) -> Any:
    """Refuse to print what is not known."""
    if value is None:
        raise TypeError("a value is null")
    return value


def _join(words: list[str]) -> str:
    *first, last = filter(None, words)
    return f"{', '.join(first)} and {last}" if first else last


def _render_metadata(record: PruningRecord, evaluation: EvaluationRecord | None) -> str:
    """The YAML at the head of the card."""
    from huggingface_hub import ModelCardData

    origin, license_id = hub_name(record.source), record.source.license
    fields: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": TAGS,
        "license": license_id,
        "base_model": origin,
    }
    if license_id == "other" and origin:
        fields["license_link"] = hub_page(origin)
    if evaluation is not None and (results := _results(evaluation)):
        name = f"{display_name(record.source).rpartition('/')[2]}-pruned"
        fields.update(model_name=name, eval_results=results)
    return ModelCardData(**fields).to_yaml()


def _results(evaluation: EvaluationRecord) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=TASKS[entry.kind][0],
            task_name=TASKS[entry.kind][1],
            # Results of the same task and dataset are one entry of the hub.
            dataset_type=re.sub(r"[^\w.-]+", "-", entry.task),
            dataset_name=entry.task,
            metric_type=entry.metric,
            metric_name=f"{METRIC_TITLES[entry.metric]}, {entry.mode}",
            metric_value=round(entry.value, 4),
        )
        for entry in evaluation.main_scores()
    ]
