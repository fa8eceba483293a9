"""Critic: the policy's backbone with a scalar head, its own optimiser, and the policy's runtime.

    critic = Critic(args, load_critic(args.model, args), accelerator)
    values = critic.values(episodes)                    # [T] of each episode, no gradient
    for minibatch in critic.minibatches(episodes, args.critic_minibatches, seed=step):
        for mb in minibatch:
            values, _ = critic.score(mb)                # [N]
            critic.backward(value_loss(values, ...))
        critic.step(args.critic_learning_rate)

The value of an action is read at the token before it: the state in which it was chosen, which is the very position that
predicts it (`MicroBatch.predict_index`). Under ZeRO-3 the critic is a second engine, made after the policy's.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.model import boundaries, load_model


def load_critic(name_or_path: str, args):
    """Return a critic with the backbone of a policy and a head of zeros: it starts by predicting 0 everywhere.

    Raises:
        UserError: as `load_model`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the missing head and the unused output embedding
    try:
        model, _ = load_model(name_or_path, args, AutoModelForSequenceClassification, num_labels=1)
    finally:
        logging.set_verbosity(verbosity)
    head = model.score.weight
    with torch.no_grad():
        if hasattr(head, "ds_id"):  # split over the processes by ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([head], modifier_rank=0):
                head.zero_()
        else:
            head.zero_()
    return model


class ValueHead(nn.Linear):
    """The scalar head, in fp32 whatever the backbone computes in: values differ by hundredths."""

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


class ValueModel(nn.Module):
    """A backbone and a scalar head whose forward pass returns values."""

    def __init__(self, model):
        super().__init__()
        assert type(model.score) in (nn.Linear, ValueHead) and model.score.bias is None
        model.score.__class__ = ValueHead  # same parameter, same name in checkpoints
        self.model = model

    def forward(self, input_ids, position_ids, predict_index):
        """Return values [N] fp32 at `predict_index`. Args: as in `packing.MicroBatch`."""
        hidden = self.model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **boundaries(position_ids)
        ).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predict_index)  # [N, H]
        return self.model.score(hidden)[:, 0]


class Critic(Learner):
    """A learner whose `score` returns values instead of log-probs.

    With LoRA it has adapters of its own, on a frozen backbone of its own, and its head is trained whole.
    """

    module = ValueModel
    heads = ("score",)

    def _zero3_engine(self, optimizer):
        import deepspeed

        # accelerate knows one engine; its configuration, complete since the policy was prepared, serves both.
        config = deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        return deepspeed.initialize(model=self.policy, optimizer=optimizer, config=config)[0]

    def _forward(self, module, mb, with_entropy: bool = False, temperature: float | None = None):
        return module(mb.input_ids, mb.position_ids, mb.predict_index), None

    def values(self, episodes: list[Episode]) -> list[torch.Tensor]:
        """Return the values [T] (fp32, CPU) of each episode, 0 where there is no action. Every rank must call this."""
        assert not any(e.forced.any() for e in episodes), "forced tokens would get their log-prob for a value"
        return [v.masked_fill(~e.action_mask, 0.0) for e, v in zip(episodes, self.logprobs(episodes))]
