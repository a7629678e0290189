"""What was measured about an exported model, in words."""

from bge_pruning.export.export_text import describe_loss, render_compatibility

LOSS = {
    "texts": 8,
    "cosine": {"dense_vecs": {"mean": 0.99134, "min": 0.9524}},
    "spearman": None,
    "speed": {"throughput_texts_per_s": {"ratio": 2.054}, "latency_ms": {"ratio": 0.496}},
}


def test_loss_of_int8():
    text = (
        "cosine to float32 0.9913 (lowest 0.9524 of 8 texts), 2.05 times the texts per second, "
        "0.50 times the time of one text"
    )
    assert describe_loss(LOSS) == text
    spearman = {"int8": 0.81996, "float32": 0.8203, "change": -0.0003, "pairs": 4}
    loss = {**LOSS, "spearman": spearman}
    assert describe_loss(loss) == f"{text}, Spearman 0.8200 (float32 0.8203)"


def test_compatibility_with_an_index():
    result = {
        **{"passages": 3000, "queries": 1043, "top_k": 10, "agreement": 0.912, "chance": 0.003},
        **{"agreement_interval": [0.88, 0.94], "same_first": 0.95},
        "cosine": {"mean": 0.9876, "p5": 0.95},
    }
    first, second = render_compatibility(result).splitlines()
    assert first == (
        "Of the 10 best passages of a query the new model finds 91.2% (95 % interval 88.0% to "
        "94.0%; chance 0.3%) in the old model's index of 3,000 passages; the best one is the same "
        "for 95.0% of 1,043 queries."
    )
    assert second == (
        "Cosine of the two models' vectors of a query: 0.9876 on average, above 0.9500 for 95 %."
    )
