"""Small models and tokenizers that the tests share; nothing is downloaded."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; threads that wait for a core spin on it
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    # Kernels run in Triton's interpreter, where triton is installed. Transformers imports it, and then it is too late.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

ROOT = Path(__file__).parent.parent

BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**BASE),
    "qwen2-tied": lambda: Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=32),
    "llama": lambda: LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: LlamaConfig(**BASE, rope_parameters=dict(LLAMA3_ROPE)),
}


def make_model(name: str = "qwen2", seed: int = 0):
    """Return a random model whose distributions are far from uniform and whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.3) if parameter.dim() == 1 else parameter.normal_(0.0, 0.12)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def go(monkeypatch, capsys):
    """A function that runs a command in this process and returns (exit code, stderr)."""

    def go(module: str, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, options)])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        try:
            from adaptive_reasoning.errors import run_cli

            run_cli(importlib.import_module(f"adaptive_reasoning.{module}").main)
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, ""

    return go


@pytest.fixture(scope="session")
def guesser(tmp_path_factory):
    """Folder of a model that knows the format "think" and guesses at chains: some answers are right, of any length."""
    folder, argv = tmp_path_factory.mktemp("guesser"), sys.argv
    options = f"--config {ROOT}/experiments/cold_start_adaptthink.yaml --max_steps 80 --batch_size 16 --chain_mix 1"
    sys.argv = ["sft", *options.split(), "--nothinking_supervised", "1", "--output_dir", str(folder)]
    try:
        importlib.import_module("adaptive_reasoning.sft").main()
    finally:
        sys.argv = argv
    return folder / "model"


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its settings for the whole process; some tests use several."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {"tied", "untied", "qwen3", "llama"}: paths of random models."""
    from distributed_worker import write_model

    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": write_model(folder / "tied", tied=True),
        "untied": write_model(folder / "untied", tied=False),
        "qwen3": write_model(folder / "qwen3", tied=True, family="Qwen3"),
        "llama": write_model(folder / "llama", tied=False, family="Llama"),
    }
