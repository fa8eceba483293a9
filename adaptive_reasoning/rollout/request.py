"""Request in, Completion out: the interface between an algorithm and the rollout loop."""

from dataclasses import dataclass, field

import torch

from adaptive_reasoning.errors import UserError


@dataclass(frozen=True)
class Forced:
    """Tokens that the behaviour policy is made to take, anywhere in a response.

    Args:
        tokens: (token id, probability q with which the behaviour policy was made to take it); they come back with
            log q. A forced token never ends a response.
        at: response position of the first one.
        after: instead of `at`: right behind the first sampled token among these ids, once. Where tokens with `at` come
            to stand there too, those stand.
        given: with `at`: only in a response that begins with these tokens.
        unless: with `at`: not if these tokens, one right behind the other, came before.
        room: with `given` or `unless`: most tokens behind them, where they are forced; 0: what max_new_tokens leaves.
        action: False for tokens that are nobody's choice, such as `</think>` when a budget of thinking runs out: their
            action mask is False and their log-prob 0.
    """

    tokens: tuple[tuple[int, float], ...]
    at: int = 0
    after: tuple[int, ...] | None = None
    given: tuple[int, ...] = ()
    unless: tuple[int, ...] = ()
    room: int = 0
    action: bool = True

    @property
    def places(self) -> range:
        """Response positions, where they are known beforehand."""
        return range(0) if self.after else range(self.at, self.at + len(self.tokens))

    @property
    def conditional(self) -> bool:
        return bool(self.given or self.unless)


@dataclass(frozen=True)
class Bias:
    """A number added to the logit of one token at one place, before temperature and cuts; log-probs are those with it.

    Args:
        opening: the last of these tokens is the one, where a response has begun with the others.
        amount: what is added.
    """

    opening: tuple[int, ...]
    amount: float


@dataclass(eq=False)
class Request:
    """One response to generate.

    Args:
        prompt_ids: the prompt; for a continued completion only the tokens that are new.
        max_new_tokens: most response tokens, forced ones and the stop token included.
        stop_ids: a row ends with the first sampled token among these; that token belongs to the response.
        seed: the random stream of this response; equal seeds and weights give equal tokens whatever else is running.
        forced: first tokens as (token id, q), and `Forced` ones anywhere.
        bias: on the token that says the mode, at evaluation.
        keep: keep the keys and values on the completion, so that a later request can continue it.
        continues: a kept completion this request goes on from.
        tag: anything of the caller's; comes back on the completion.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    forced: tuple["tuple[int, float] | Forced", ...] = ()
    bias: Bias | None = None
    keep: bool = False
    continues: "Completion | None" = None
    tag: object = None

    def forcing(self) -> list[Forced]:
        """Return all that is forced, without what would stand behind the end."""
        leading = tuple(pair for pair in self.forced if not isinstance(pair, Forced))
        everything = [*([Forced(leading)] if leading else []), *(f for f in self.forced if isinstance(f, Forced))]
        return [f for f in everything if f.after or f.at < self.max_new_tokens]

    def check(self, vocab: int) -> None:
        """Raise UserError for a request that could not be run."""
        forcing = self.forcing()
        pairs = [pair for f in forcing for pair in f.tokens]
        asked = [ids for f in forcing for ids in (f.after or (), f.given, f.unless)]
        asked += [self.bias.opening] if self.bias else []
        ids = [*self.prompt_ids, *(token for token, _ in pairs), *(token for part in asked for token in part)]
        if not self.prompt_ids:
            raise UserError("a request needs at least one prompt token.")
        if ids and not (0 <= min(ids) and max(ids) < vocab):
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(f"token id {wrong} does not exist: the model has {vocab} tokens.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: a response needs room for at least one token.")
        if any(not 0 < q <= 1 for _, q in pairs):
            raise UserError(f"forced tokens {pairs}: each needs a probability in (0, 1].")
        for f in forcing:
            placed = (
                f.at == 0 and not (f.conditional or f.room) if f.after else f.after is None and f.at >= len(f.given)
            )
            if not (f.tokens and placed and f.room >= 0 and (f.conditional or not f.room)):
                raise UserError(
                    f"{f}: needs one token or more, and either `at`, 0 or more and behind `given`, which may have "
                    "`given` and `unless`, and with them `room`, or `after`, with one id or more."
                )
        places = [place for f in forcing for place in f.places]
        if max(places, default=0) >= self.max_new_tokens:
            raise UserError(
                f"forced tokens at positions {min(places)} to {max(places)} do not fit into max_new_tokens "
                f"{self.max_new_tokens}."
            )
        if len(set(places)) < len(places):
            raise UserError(f"two forced tokens stand at the same position: {sorted(places)}.")
        if sum(bool(f.after) for f in forcing) > 1 or sum(f.conditional for f in forcing) > 1:
            raise UserError("a request can have one Forced with `after`, and one with `given` or `unless`.")
        if self.bias and not 0 < len(self.bias.opening) <= self.max_new_tokens:
            raise UserError(f"{self.bias}: needs one token or more, and no more than max_new_tokens.")
        if self.continues is not None and self.continues.cache is None:
            raise UserError("the completion to continue was not kept: set keep=True on its request.")


@dataclass(eq=False)
class Completion:
    """One finished response. T response tokens."""

    request: Request
    context_ids: list[int]  # everything before the response, earlier turns included
    response_ids: torch.Tensor  # [T] int64
    logprobs: torch.Tensor  # [T] fp32: log-prob under the distribution sampled from; log q where forced
    action_mask: torch.Tensor  # [T] bool: False for forced tokens that are nobody's choice
    forced: torch.Tensor  # [T] bool: tokens that were not sampled
    finish_reason: str  # "stop" or "length"
    cache: torch.Tensor | None = field(default=None, repr=False)  # [L, 2k, tokens - 1, D] where kept
