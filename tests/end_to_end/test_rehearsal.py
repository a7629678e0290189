"""BGE-M3's own configuration from end to end: its shape, its commands, a real tokenizer."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bge_pruning.evaluation.random_model import random_base_model
from bge_pruning.model_io.e5_file import read_e5_file, tokenizer_files
from bge_pruning.model_io.example_models import M3_SMALL, find_source
from bge_pruning.model_io.model_folder import write_model_folder
from bge_pruning.models.encoder_shape import EncoderShape

ROOT = Path(__file__).parents[2]
PATH = "data/sentences/newstest2019-[a-d]*.txt.gz"
NEWS = f"[{{name: news, kind: sentences, path: '{PATH}', lines: ':9'}}]"
SHORT = """precision=fp32 device=cpu max_duration=2ba recovery.max_duration=2ba eval_interval=2ba
    save_interval=2ba global_train_batch_size=2 eval_batch_size=2 baseline.calibration_texts=4
    recovery.teacher.refit_texts=8 model.max_length=16 progress_bar=false data.eval=[]""".split()


@pytest.mark.parametrize(
    "divisor",
    [
        pytest.param(8, id="an eighth", marks=pytest.mark.slow),
        # Of 568 million parameters: 7 minutes of two cores and 9 GB, 5 of them to order the gates.
        pytest.param(1, id="whole", marks=pytest.mark.slow),
    ],
)
def test_bge_m3_is_pruned_recovered_and_extracted(divisor, bge_m3_shape, tmp_path):
    """Two steps each, and every extraction checks masked == extracted before it is written.

    The weights are random, as wide as ``divisor`` says.
    """
    sizes = "hidden_size intermediate_size head_dim colbert_dim".split()
    shape = replace(bge_m3_shape, **{s: getattr(bge_m3_shape, s) // divisor for s in sizes})
    source, run, results = (tmp_path / name for name in ("bge-m3", "run", "results"))
    write_random_model(source, shape)
    narrow = {"d_model": 1024 // divisor, "intermediate_size": 4096 // divisor}
    target = {"d_model": 1024 // divisor, "intermediate_size": 2048 // divisor}
    options = [f"model.base_model={source}", f"run_folder={run}", f"results_folder={results}"]
    options += [f"model.{name}={value}" for name, value in narrow.items()]
    options += [f"model.l0_module.target_model.{name}={value}" for name, value in target.items()]
    options += [f"data.train={NEWS}", f"data.processed_folder={tmp_path / 'processed'}", *SHORT]
    train = ["train_pruning", "configs/bge_m3/target_50pct.yaml", *options]
    call(*train)
    call("extract_pruned_model", str(run), str(results / "pruned_model"))
    call(*train, "stage=recover")
    call("extract_pruned_model", f"{run}-recovery", str(results / "model"))
    for name in ("pruned_model", "model"):
        record = json.loads((results / name / "pruning.json").read_text(encoding="utf-8"))
        found = record.get("largest_difference_float64") or record["largest_difference"]
        assert found <= record["tolerance"]
        parts = record["parameters"]
        kept = parts["extracted"]["encoder"] / parts["source"]["encoder"]
        assert kept == pytest.approx(0.5, abs=0.002)
        assert record["shape"]["vocab_size"] == 250_002


def write_random_model(folder: Path, shape: EncoderShape) -> None:
    """A model of random weights with XLM-R's tokenizer."""
    folder.mkdir()
    base = random_base_model(shape, "random")
    files = tokenizer_files(read_e5_file(find_source(M3_SMALL)))
    parts = (base.backbone, base.heads, base.shape, base.hf_config)
    write_model_folder(folder, *parts, files, base.max_seq_length)


def call(script: str, *words: str) -> None:
    """A command in a process of its own, where the data are."""
    command = [sys.executable, f"scripts/{script}.py", *words]
    subprocess.run(command, check=True, cwd=ROOT)
