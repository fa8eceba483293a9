"""The rollout loop: requests in, completions with behaviour log-probs out."""

from adaptive_reasoning.rollout.decoder import Decoder
from adaptive_reasoning.rollout.engine import Engine
from adaptive_reasoning.rollout.request import Bias, Completion, Forced, Request
from adaptive_reasoning.rollout.sampler import Sampling, request_seed

__all__ = ["Bias", "Completion", "Decoder", "Engine", "Forced", "Request", "Sampling", "request_seed"]
