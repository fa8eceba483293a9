"""Sampling: one token a row, and its log-prob under the very distribution it was drawn from."""

from dataclasses import dataclass

import numpy as np
import torch

from adaptive_reasoning import kernels
from adaptive_reasoning.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature), cut to the top k, then to the nucleus top_p, renormalised.

    temperature 0 is greedy; its log-probs are those of the untempered softmax, because a point mass says nothing.
    top_k 0 and top_p 1 mean no cut. Train with no cut: the learner scores under the full vocabulary.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"{self}: needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0.")


def uniforms(seed: int, n: int) -> np.ndarray:
    """Return n numbers in [0, 1), fp32: the random stream of one request. Number i decides token i.

    Philox is counter-based: the stream is a function of the seed alone, so a sample depends neither on its batch mates
    nor on what ran before.
    """
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random(n, dtype=np.float32)


def request_seed(*parts: int) -> int:
    """Mix small integers (run seed, step, question, sample ...) into one 64-bit request seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def sample(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B] int64 and log-probs [B] fp32 of logits [B, V], as kernels/sample.py draws them."""
    return kernels.sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
