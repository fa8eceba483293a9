"""Package metadata. pip install -e ".[test]" -c constraints.txt

The folder kernels/ is installed as adaptive_reasoning.kernels, never as a top-level package "kernels": that name
belongs to a package of Hugging Face, and ours would overwrite it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read as text: importing the package would need torch, which is not there yet when pip asks for the version.
source = Path("adaptive_reasoning/__init__.py").read_text()
version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)

setup(
    name="adaptive-reasoning",
    version=version,
    description="Reference implementations of the algorithms that teach a language model when to think.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["adaptive_reasoning", "adaptive_reasoning.*"]),
        "adaptive_reasoning.kernels",
        *(f"adaptive_reasoning.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"adaptive_reasoning": "adaptive_reasoning", "adaptive_reasoning.kernels": "kernels"},
    package_data={"adaptive_reasoning": ["report/*.j2", "tasks/*.jinja", "tasks/*.json", "benchmark/published/*.yaml"]},
    install_requires=[
        "accelerate>=1.10,<2",
        # math-verify's LaTeX parser. Its own extra "antlr4_13_2" is not found by pip before 24, so it is named here.
        "antlr4-python3-runtime>=4.13.2,<4.14",
        "datasets>=4,<6",
        "docstring-parser>=0.17,<1",  # with which jsonargparse finds the help below a field
        "jinja2>=3.1,<4",
        "jsonargparse>=4.53,<5",
        "math-verify>=0.9,<0.10",
        "matplotlib>=3.9,<4",
        "numpy>=1.26,<3",
        "pebble>=5.2,<5.3",
        "pyyaml>=6,<7",
        "safetensors>=0.6,<1",
        "tokenizers>=0.22,<1",
        "torch>=2.11,<3",
        "tqdm>=4.66,<5",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "gpu": ["deepspeed>=0.18,<1", "flash-attn>=2.8,<3", "triton>=3.4,<4"],
        "gguf": ["gguf>=0.17,<1"],
        "gym": ["reasoning-gym==0.1.25"],  # questions by seed and their scores are what this version makes them
        "peft": ["peft>=0.18,<1"],
        "test": [
            "deepspeed>=0.18,<1",
            "hypothesis>=6,<7",
            "peft>=0.18,<1",
            "psutil>=6,<8",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.14,<1",
            "setuptools>=77",
            "tensorboard>=2.18,<3",
            "triton>=3.4,<4; sys_platform == 'linux'",  # its interpreter runs the kernels without a GPU
        ],
        "bench": ["liger-kernel>=0.6,<1", "trl>=1,<2"],
    },
)
