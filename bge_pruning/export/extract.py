"""From a run to a finished model folder: extraction, and all that can be asked for beside it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bge_pruning.datasets.sts_dataloader import read_sts
from bge_pruning.evaluation.evaluate import size_on_disk
from bge_pruning.export import vocabulary_texts
from bge_pruning.export.extraction import (
    Extraction,
    describe,
    keep_tokens,
    make_head_square,
    start_extraction,
    write_extraction,
)
from bge_pruning.export.folder_check import check_folder
from bge_pruning.export.keep_dimension import add_projection
from bge_pruning.export.model_card import render_model_card
from bge_pruning.export.onnx_export import export_onnx
from bge_pruning.export.onnx_quantize import Pairs, export_onnx_int8
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.export.validation import TOLERANCE, References, check_as_loaded, validate
from bge_pruning.model_io.checkpoint import find_checkpoint
from bge_pruning.model_io.model_folder import DTYPES
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.reports.report_tables import render_bytes
from bge_pruning.utils.files import atomic_folder, write_json
from bge_pruning.utils.guard import import_optional
from bge_pruning.utils.records import PruningRecord, Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractOptions:
    """What is asked for beside the cut.

    Attributes:
        dtype: Precision of the written weights, see :mod:`bge_pruning.model_io.model_folder`.
        square_head: Make the multi-vector head as wide as the hidden size, as FlagEmbedding (unless
            it is told) and vLLM expect it, see :mod:`bge_pruning.export.compact_head`.
        keep_dimension: Give dense vectors the dimensions of the unpruned model, see
            :mod:`bge_pruning.model_io.projection`.
        fit_texts: Files of texts to fit that map on; none to put zeros where a dimension is gone.
        int8_pairs: Scored pairs to measure its loss on.
        int8_any_loss: Write the int8 file whatever it loses.
    """

    dtype: torch.dtype = torch.float32
    square_head: bool = False
    keep_dimension: bool = False
    fit_texts: tuple[str, ...] = ()
    vocabulary: vocabulary_texts.VocabularyRequest | None = None
    onnx: bool = False
    onnx_int8: bool = False
    int8_pairs: Pairs | None = None
    int8_any_loss: bool = False


PLAIN = ExtractOptions()


def read_options(
    *,
    dtype: str = "fp32",
    colbert_dim: str = "keep",
    keep_dimension: bool = False,
    fit_texts: Sequence[str] = (),
    keep_vocabulary_from: Sequence[str] = (),
    languages: Sequence[str] = (),
    vocabulary_size: int | None = None,
    report_on: Sequence[str] = (),
    onnx: bool = False,
    onnx_int8: bool = False,
    int8_sts: str | None = None,
    int8_any_loss: bool = False,
) -> ExtractOptions:
    """The options by the names that they have on the command line and under ``export`` in a YAML.

    What can be seen to be wrong without the model is said now: before a training, if there is one.

    Raises:
        FileNotFoundError: If a file of texts is not there.
        ImportError: If ONNX is asked for and not installed.
        ValueError: If a language has no corpus, or a row of ``int8_sts`` is wrong.
    """
    vocabulary = pairs = None
    if keep_vocabulary_from or languages:
        vocabulary = vocabulary_texts.VocabularyRequest(
            tuple(keep_vocabulary_from), tuple(languages), vocabulary_size, tuple(report_on)
        )
        vocabulary_texts.find_corpora(vocabulary)
    if fit_texts:
        vocabulary_texts.find_corpora(vocabulary_texts.VocabularyRequest(tuple(fit_texts)))
    if int8_sts:
        found = read_sts(int8_sts)
        pairs = (found.sentences1, found.sentences2, found.scores)
    options = ExtractOptions(
        dtype=DTYPES[dtype],
        square_head=colbert_dim == "hidden",
        keep_dimension=keep_dimension,
        fit_texts=tuple(fit_texts),
        vocabulary=vocabulary,
        onnx=onnx,
        onnx_int8=onnx_int8,
        int8_pairs=pairs,
        int8_any_loss=int8_any_loss,
    )
    _check_libraries(options)
    return options


def extract(
    run_or_checkpoint: Path,
    output: Path,
    overwrite: bool = False,
    best: bool = False,
    options: ExtractOptions = PLAIN,
) -> PruningRecord:
    """Write the model of a run (its newest checkpoint) or of a checkpoint, and validate it.

    The output folder appears only when it is complete and valid. Returns its ``pruning.json``.

    Raises:
        FileExistsError: If the folder exists and may not be replaced.
        FileNotFoundError: If there is no checkpoint, or a file of texts is not there.
        ImportError: If ONNX is asked for and not installed.
        ValueError: If the checkpoint is damaged or of another project, or an option does not fit.
        ValidationError: If any output differs by more than ``TOLERANCE`` from the masked model, or
            is not finite when computed in ``options.dtype``.
        OnnxExportError: If the ONNX graph computes something else.
        Int8Error: If the int8 file computes too much else.
    """
    checkpoint = find_checkpoint(run_or_checkpoint, best)
    return write_model(lambda: start_extraction(checkpoint), output, overwrite, options)


def write_model(
    start: Callable[[], Extraction],
    output: Path,
    overwrite: bool = False,
    options: ExtractOptions = PLAIN,
) -> PruningRecord:
    """Write what an extraction makes of a model, and validate it.

    The extraction starts here, so that nobody else holds the model: it is let go of before
    validation loads the written one.
    """
    _check_libraries(options)
    with atomic_folder(output, MARKER, overwrite) as folder:
        info, references = _cut_and_write(start, folder, options)
        gc.collect()  # the model sits in reference cycles, and validation loads another
        log.info("comparing what was written with the masked model")
        agreement = validate(folder, references)
        info.largest_difference = agreement.float32
        if agreement.float64 is not None:
            info.largest_difference_float64 = agreement.float64
        info.tolerance = TOLERANCE
        check_folder(folder, EncoderShape(**info.shape.as_dict()))
        if info.precision is not None:
            dense = references.outputs["dense_vecs"]
            info.precision.as_loaded = check_as_loaded(folder, dense, options.dtype)
        _add_files(folder, info, options)
        write_json(info.as_dict(), folder / MARKER)
        (folder / "README.md").write_text(render_model_card(info), encoding="utf-8")
    size = render_bytes(size_on_disk(str(output)))
    log.info("wrote %s (%s): %s", output, size, describe(info))
    return info


def _check_libraries(options: ExtractOptions) -> None:
    """Now, not after the model is written."""
    for library in ("onnx", "onnxruntime") if options.onnx or options.onnx_int8 else ():
        import_optional(library, "onnx")


def _cut_and_write(
    start: Callable[[], Extraction], folder: Path, options: ExtractOptions
) -> tuple[PruningRecord, References]:
    """Record and references; the model is let go of."""
    extraction = start()
    if options.vocabulary is not None:
        base, whole = extraction.base, extraction.shape
        keep, corpora = vocabulary_texts.choose_for_texts(base, options.vocabulary)
        report = vocabulary_texts.build_report(whole, base.tokenizer_files, keep, corpora)
        extraction.info.vocabulary = Vocabulary(**report)
        keep_tokens(extraction, keep)
    if options.square_head:
        make_head_square(extraction)
    references = write_extraction(extraction, folder, options.dtype)
    return extraction.info, references


def _add_files(folder: Path, info: PruningRecord, options: ExtractOptions) -> None:
    if options.keep_dimension and (found := add_projection(folder, info, options.fit_texts)):
        info.projection = found
    if options.onnx or options.onnx_int8:
        log.info("exporting to ONNX")
        info.onnx = export_onnx(folder)
    if options.onnx_int8:
        log.info("quantising to int8")
        info.onnx_int8 = export_onnx_int8(
            folder, options.int8_pairs, any_loss=options.int8_any_loss
        )
