"""Request in, Completion out: the interface between an algorithm and the rollout loop."""

from dataclasses import dataclass, field

import torch

from adaptive_reasoning.core.errors import UserError


@dataclass(frozen=True)
class Closer:
    """Tokens to force when a budget runs out, e.g. `</think>` after so many tokens of thinking.

    At response position `at` the tokens `ids` are forced, unless the token `unless` came before; the row then goes on
    to its answer. These tokens are nobody's choice: their action mask is False and their log-prob 0.
    """

    ids: tuple[int, ...]
    at: int
    unless: int


@dataclass(eq=False)
class Request:
    """One response to generate.

    Args:
        prompt_ids: the prompt; for a continued completion only the tokens that are new.
        max_new_tokens: most response tokens, forced ones and the stop token included.
        stop_ids: a row ends with the first sampled token among these; that token belongs to the response.
        seed: the random stream of this response; equal seeds and weights give equal tokens whatever else is running.
        forced: first tokens as (token id, probability q with which the behaviour policy was made to take it); they are
            actions and come back with log q.
        allowed_first: if not empty, the first free token is drawn from these ids alone, renormalised.
        closer: what to force at a budget, or None.
        keep: keep the keys and values on the completion, so that a later request can continue it.
        continues: a kept completion this request goes on from.
        tag: anything of the caller's; comes back on the completion.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    forced: tuple[tuple[int, float], ...] = ()
    allowed_first: tuple[int, ...] = ()
    closer: Closer | None = None
    keep: bool = False
    continues: "Completion | None" = None
    tag: object = None

    def check(self, vocab: int) -> None:
        """Raise UserError for a request that could not be run."""
        ids = [*self.prompt_ids, *(t for t, _ in self.forced), *self.allowed_first]
        ids += self.closer.ids if self.closer else ()
        if not self.prompt_ids:
            raise UserError("a request needs at least one prompt token.")
        if ids and not (0 <= min(ids) and max(ids) < vocab):
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(f"token id {wrong} does not exist: the model has {vocab} tokens.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: a response needs room for at least one token.")
        if len(self.forced) > self.max_new_tokens:
            raise UserError(f"{len(self.forced)} forced tokens do not fit into max_new_tokens {self.max_new_tokens}.")
        if any(not 0 < q <= 1 for _, q in self.forced):
            raise UserError(f"forced tokens {self.forced}: each needs a probability in (0, 1].")
        if self.closer and self.closer.at + len(self.closer.ids) > self.max_new_tokens > self.closer.at:
            raise UserError(f"the closer at {self.closer.at} does not fit into max_new_tokens {self.max_new_tokens}.")
        if self.closer and not len(self.forced) <= self.closer.at:
            raise UserError(f"the closer at {self.closer.at} would overwrite forced tokens.")
        if self.continues is not None and self.continues.cache is None:
            raise UserError("the completion to continue was not kept: set keep=True on its request.")


@dataclass(eq=False)
class Completion:
    """One finished response. T response tokens."""

    request: Request
    context_ids: list[int]  # everything before the response, earlier turns included
    response_ids: torch.Tensor  # [T] int64
    logprobs: torch.Tensor  # [T] fp32: log-prob under the distribution sampled from; log q where forced
    action_mask: torch.Tensor  # [T] bool: False for the closer's tokens
    finish_reason: str  # "stop" or "length"
    cache: torch.Tensor | None = field(default=None, repr=False)  # [L, 2k, tokens - 1, D] where kept
