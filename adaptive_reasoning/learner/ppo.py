"""PPO: generalised advantage estimation, normalised advantages, the clipped losses of policy and critic.

Plain PPO as in Open-Reasoner-Zero @ 3fdd9a0 on packed tokens; every loss is a mean over the action tokens of the whole
step over all processes. The dual clip is verl's. Values are those before each action, and nothing behind the end of a
sequence enters: verl's critic lets the value after EOS into the last delta, which cancels only for lambda = 1.
"""

import torch

from adaptive_reasoning.learner.packing import Counts, MicroBatch


def gae(rewards, values, last, gamma: float, lam: float, flow: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantages, returns) [B, T] of B sequences of actions, zeros behind the end of the shorter ones.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    return_t = A_t + V_t

    `last` [B, T] marks the last action of every stage: V and A of what follows count `flow` times there, 0 for the
    method, 1 to let rewards flow back to earlier stages.
    """
    pass_value = torch.full_like(values, gamma).masked_fill(last, flow)  # [B, T]
    pass_advantage = torch.full_like(values, gamma * lam).masked_fill(last, flow)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + pass_value[:, t] * next_value - values[:, t]
        next_advantage = delta + pass_advantage[:, t] * next_advantage
        next_value, advantages[:, t] = values[:, t], next_advantage
    return advantages, advantages + values


def normalise(values: torch.Tensor, total, unbiased: bool = False) -> torch.Tensor:
    """Return (A - mean) / standard deviation over the tokens of all processes, fp64.

    Args:
        values: [N] of this process.
        total: sums a list of numbers over all processes; every one of them must call this.
        unbiased: as verl whitens, (A - mean) / sqrt(unbiased variance + 1e-8). Else as ORZ does, with the population
            variance and a floor: (A - mean) / sqrt(max(variance, 1e-8)).
    """
    values = values.double()
    s, n = total([float(values.sum()), len(values)])
    centred = values - s / max(n, 1)
    (squares,) = total([float(centred.square().sum())])
    if unbiased:
        return centred * (squares / max(n - 1, 1) + 1e-8) ** -0.5
    return centred * max(squares / max(n, 1), 1e-8) ** -0.5


def policy_loss(logprobs, entropy, advantages, mb: MicroBatch, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the clipped loss, the mean over the tokens of the step, and of the metrics.

    Shapes: logprobs, entropy, advantages [N]; `counts` are those of the whole step over all processes.
    """
    log_ratio = logprobs - mb.old_logprobs
    ratio = log_ratio.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    token = torch.maximum(free, clipped)
    if args.dual_clip:
        token = torch.where(advantages < 0, torch.minimum(token, -advantages * args.dual_clip), token)
    value = token.sum() / counts.tokens
    stats = {"policy": value, "clip_fraction": (clipped > free).sum() / counts.tokens}
    stats |= {"approx_kl": -log_ratio.sum() / counts.tokens, "entropy": entropy.sum() / counts.tokens}
    return value, {f"loss/{key}": x.detach() for key, x in stats.items()}


def value_loss(values, old_values, returns, counts: Counts, args) -> tuple[torch.Tensor, dict]:
    """Return this micro-batch's share of the mean of 0.5 max((V - G)^2, (clip(V) - G)^2), and of the metrics."""
    free, worst = (values - returns).square(), (values - returns).square()
    if args.value_clip:
        near = old_values + (values - old_values).clamp(-args.value_clip, args.value_clip)
        worst = torch.maximum(free, (near - returns).square())
    value = 0.5 * worst.sum() / counts.tokens
    return value, {"loss/value": value.detach(), "loss/value_clip_fraction": (worst > free).sum() / counts.tokens}
