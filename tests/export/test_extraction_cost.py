"""What an extraction costs, measured in a process of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bge_pruning.export.extraction_cost import ExtractionCost, measure_extraction
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.utils import random_run
from bge_pruning.utils.random_run import write_random_run

MIB = 2**20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """Of a run with 256 MiB of weights, nearly all in the word table, and of a tiny one."""
    place = tmp_path_factory.mktemp("runs")
    tiny = EncoderShape(16, 2, 2, 32, 300, head_dim=8, max_position_embeddings=300, colbert_dim=16)
    large = replace(tiny, vocab_size=2**22)
    found, make = [], random_run.make_tokenizer_files
    for name, shape in (("large", large), ("tiny", tiny)):
        gates = {
            "axes": ["layer"],
            "target": asdict(replace(shape, num_hidden_layers=1)),
            "target_parameters": None,
            "seed": 3,
        }
        # A tokenizer of as many tokens would take longer than all the rest.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random_run, "make_tokenizer_files", lambda _, *rest: make(300, *rest))
            found.append(write_random_run(place / name, shape, gates))
    return found[0], found[1]


@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1.3), ("bf16", 1.7)])
def test_time_and_memory_are_those_of_the_extraction(dtype, share, checkpoints, tmp_path):
    """Memory stays below a share of the checkpoint, so nothing holds the word table twice.

    Half precision is validated in float32: the file and its float32 copy are there together.
    """
    cost = measure_extraction(*checkpoints, tmp_path / "small", dtype)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert 0 < cost.seconds < 60
    # Python, torch and transformers.
    assert 200 * MIB < cost.before < 4000 * MIB
    assert 250 * MIB < cost.peak < share * checkpoints[0].stat().st_size
    assert cost.peak_anonymous <= cost.peak + MIB
    assert (cost.peak_anonymous < 100 * MIB) == (dtype == "fp32")


def test_a_failed_extraction_says_why(checkpoints, tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"half")
    message = r"(?s)^the extraction failed: .*damaged\.pt: damaged, not complete"
    with pytest.raises(RuntimeError, match=message):
        measure_extraction(damaged, checkpoints[1], tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_cost_goes_through_json():
    cost = ExtractionCost(1.5, 2, 3, 4)
    assert ExtractionCost(**json.loads(json.dumps(asdict(cost)))) == cost
