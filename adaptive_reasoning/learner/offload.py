"""Offload: AdamW whose state and step live in CPU memory (`--offload_optimizer true`), for one GPU without DeepSpeed.

On the GPU stay the fp32 weights and their fp32 gradients; the two moments, 8 bytes a parameter, are on the CPU. A step
brings gradients and weights over, is AdamW's own step there, and takes the weights back: 12 bytes a parameter cross the
bus, about 21 GB a step for a model of 1.8 B parameters, once a rollout batch. In CPU memory: 16 bytes a parameter.

The numbers are those of `torch.optim.AdamW` (the same code runs them), and so is the state that a checkpoint holds: a
run can be continued with the option or without it.
"""

import torch


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW for parameters on any device; options and `state_dict` are those of `torch.optim.AdamW`.

    `param_groups` holds CPU copies of the parameters. They count only during a step, so a caller may write into the
    parameters themselves at any time.
    """

    def __init__(self, parameters, **options):
        self.parameters = list(parameters)
        super().__init__([torch.empty_like(p, device="cpu", requires_grad=True) for p in self.parameters], **options)

    def _pairs(self):
        copies = [p for group in self.param_groups for p in group["params"]]
        return zip(self.parameters, copies, strict=True)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the gradients of the parameters; one without a gradient does not move."""
        for parameter, copy in self._pairs():
            copy.copy_(parameter)
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        super().step()
        for parameter, copy in self._pairs():
            parameter.copy_(copy)
            copy.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none
        for parameter in self.parameters:
            parameter.grad = None
