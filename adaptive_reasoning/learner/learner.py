"""Learner: log-probs with gradient, whole-step losses, and the optimiser step, the same on every runtime.

    for minibatch in learner.minibatches(episodes, args.minibatches_per_step, seed=step):  # one optimiser step each
        for mb in minibatch:                                                               # one forward pass each
            logprobs, entropy = learner.score(mb)                                          # [N]
            learner.backward(loss(logprobs, mb, minibatch.counts, args))
        stats = learner.step(args.learning_rate)

A loss divides by `minibatch.counts`, the counts of the whole step over all ranks. The gradient is then the plain sum
over micro-batches and ranks, and no split, order or number of ranks changes it.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import Accelerator

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import write_json_atomic
from adaptive_reasoning.errors import UserError, say
from adaptive_reasoning.learner.lora import add_adapters, base_alone, merged, saved_name
from adaptive_reasoning.learner.model import Policy
from adaptive_reasoning.learner.packing import Counts, MicroBatch, Minibatch, fill, group_chunks, pack
from adaptive_reasoning.learner.runtime import all_gather, all_reduce, is_zero3, on_main

ADAM_EPS = 1e-8
SUSPECTS = 64  # samples of each process that are written down where any may be the cause


class NonFiniteError(UserError):
    """A loss or the gradient was not finite; no rank has updated its weights."""


def sample_of(e: Episode) -> dict:
    """Return what tells what was wrong with a sample: text and token ids, behaviour log-probs, reward, advantage."""
    return {
        "question": e.question.id,
        "group": e.group,
        "text": e.text,
        "prompt_ids": list(map(int, e.prompt_ids)),
        "response_ids": list(map(int, e.response_ids)),
        "behaviour_logprobs": [str(float(value)) for value in e.behaviour_logprobs],  # JSON has no nan
        "reward": str(e.reward),
        "advantage": str(e.advantage),
    }


def shadow(parameter) -> torch.Tensor:
    """Return a tensor without memory, with the type and the whole shape of a parameter that ZeRO-3 may have split."""
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")


class Learner:
    """A policy, its optimiser and the runtime they live on.

    Args:
        args: the learner options of `RunArgs`, `temperature` (of log-probs where no other is asked for), `output_dir`.
            With `lora_rank` adapters are trained, and the weights of the model stay as they are.
        model: from `load_model`; fp32 weights.
        accelerator: from `make_accelerator`.
        trainable: False for a frozen reference policy, which only scores and has no optimiser.
        decay_vectors: whether weight decay falls on norms and biases too.
    """

    module = Policy  # what is made of the model: its forward pass is what `score` returns
    heads = ()  # modules that are trained whole with LoRA too

    def __init__(self, args, model, accelerator: Accelerator, trainable: bool = True, decay_vectors: bool = True):
        if not args.temperature > 0:
            raise UserError(f"--temperature {args.temperature}: training needs a temperature greater than 0.")
        self.args = args
        self.accelerator = accelerator
        self.zero3 = is_zero3(accelerator)
        self.model, self.decay_vectors = model, decay_vectors
        self.steps = 0  # optimiser steps taken
        self.skipped = 0  # updates that were not finite since the last step
        self.optimizer = None
        self._scored = None  # (micro-batch, its log-probs, entropy or None) between score and backward
        self._losses = []  # (loss, episodes) of the micro-batches of the step so far
        self._complete = False  # whether the last micro-batch of the step has been through backward
        self.one_row = model.config._attn_implementation == "flash_attention_2"
        if args.gradient_checkpointing and trainable:
            # transformers has renamed the method on its way from 5.17 to 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train(trainable).requires_grad_(trainable)
        self.lora = add_adapters(model, args, self.heads, self.zero3) if trainable else None  # peft's LoraConfig
        self.policy = self.module(model)  # the module itself
        self.engine = self._distribute(trainable)  # what it is called through
        self.no_sync = None if self.zero3 else getattr(self.engine, "no_sync", None)  # data parallelism only

    def _distribute(self, train: bool):
        """Return the policy wrapped for the runtime; creates the optimiser."""
        args, accelerator = self.args, self.accelerator
        if self.zero3:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            # One micro-batch is one forward pass of any size, and the accumulation boundary is set by hand, so
            # DeepSpeed must neither divide by accumulation steps nor check a batch size.
            config.update(
                train_batch_size=accelerator.num_processes,
                train_micro_batch_size_per_gpu=1,
                gradient_accumulation_steps=1,
                gradient_clipping=args.max_grad_norm,
            )
            if accelerator.mixed_precision == "bf16":
                # Many small gradients added up in bf16 would lose most of the later ones.
                config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        if not train:
            if self.zero3:
                import deepspeed

                config = deepcopy(config)
                config["zero_optimization"].pop("offload_optimizer", None)
                return deepspeed.initialize(model=self.policy, config=config)[0]
            return accelerator.prepare_model(self.policy, evaluation_mode=True)
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": ADAM_EPS,
        }
        groups = ([], [])
        for p in self.policy.parameters():
            if p.requires_grad:
                groups[self.undecayed(p)].append(p)
        parameters = [{"params": g, "weight_decay": d} for g, d in zip(groups, (args.weight_decay, 0.0)) if g]
        if self.zero3:
            offload = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
            if offload not in ("none", "cpu"):
                raise UserError(f"offload_optimizer_device {offload}: checkpoints know none and cpu. Take one of them.")
            # On the CPU torch's fused AdamW does what DeepSpeed's own does, without a compiler on every machine.
            config["zero_force_ds_cpu_optimizer"] = False
            optimizer = torch.optim.AdamW(parameters, fused=offload == "cpu", **options)
            engine = self._zero3_engine(optimizer)
            self.optimizer = engine.optimizer
            return engine
        engine = accelerator.prepare_model(self.policy)
        self.optimizer = torch.optim.AdamW(parameters, fused=accelerator.device.type == "cuda", **options)
        return engine

    def undecayed(self, parameter) -> bool:
        """Return whether weight decay leaves a weight alone; such ones are the optimiser's last."""
        return not self.decay_vectors and len(getattr(parameter, "ds_shape", parameter.shape)) < 2

    def _zero3_engine(self, optimizer):
        return self.accelerator.prepare(self.policy, optimizer)[0]

    # --- data

    def minibatches(
        self, episodes: list[Episode], number: int, seed: int, skip_zero_advantage: bool = False
    ) -> list[Minibatch]:
        """Return `number` minibatches, one optimiser step each, with equally many micro-batches on every rank.

        Groups stay whole and are dealt to minibatches by `seed` in the same way on all ranks. Every rank must call
        this, also one without episodes.

        Args:
            episodes: this rank's episodes, with advantages.
            number: minibatches; at most the number of groups.
            seed: of the order of groups; has no effect with one minibatch.
            skip_zero_advantage: leave out episodes with advantage 0. Right only if the loss is proportional to the
                advantage (no KL, no entropy bonus). They still count in the denominators.

        Raises:
            UserError: more minibatches than groups.
        """
        reduce = self._reduce
        groups = 1 + int(reduce([max((e.group for e in episodes), default=-1)], "max"))
        present = torch.zeros(groups)
        present[[e.group for e in episodes]] = 1
        present = reduce(present, "max").bool()
        found = int(present.sum())
        if found == 0:
            raise UserError("there are no episodes to learn from on any process.")
        if number > found:
            raise UserError(
                f"{number} minibatches per step need at least as many questions per step, but there are {found}."
            )
        chunk_of_group = torch.full((groups,), -1)
        chunk_of_group[present] = torch.from_numpy(group_chunks(found, number, seed))

        chunks = [[] for _ in range(number)]
        for episode, chunk in zip(episodes, chunk_of_group[[e.group for e in episodes]].tolist()):
            chunks[chunk].append(episode)
        sums, splits = [], []
        for chunk in chunks:
            actions = torch.cat([e.action_mask for e in chunk]).sum() if chunk else 0
            teaching = [e for e in chunk if e.teaches]
            sums.append([int(actions), len(chunk), len(chunk) - len(teaching)])
            splits.append(self._fill(teaching if skip_zero_advantage else chunk))
        sums = reduce(sums, "sum").long().tolist()
        # At least one micro-batch, so that a step without any gradient is still a step on every runtime.
        most = reduce([max(1, len(split)) for split in splits], "max").long().tolist()
        batches = []
        for i in range(number):
            tokens, sequences, zero = sums[i]
            padded = splits[i] + [[] for _ in range(most[i] - len(splits[i]))]
            counts, device = Counts(tokens, sequences), self.accelerator.device
            batches.append(Minibatch(counts, padded, zero / sequences, device, self.one_row))
        return batches

    def _fill(self, episodes: list[Episode]) -> list[list[Episode]]:
        """Return the episodes that have an action token, in micro-batches under the token budget."""
        acting = [e for e in episodes if e.action_mask.any()]
        return fill(acting, self.args.tokens_per_micro_batch, self.one_row)

    def _reduce(self, values, op: str) -> torch.Tensor:
        return all_reduce(self.accelerator, values, op)

    # --- log-probs

    def score(
        self, mb: MicroBatch, with_entropy: bool | str = False, temperature: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (logprobs [N], entropy [N] or None) of the action tokens, fp32, with gradient.

        Args:
            with_entropy: compute the entropy (nats, at the temperature): True with gradient, "detached" without.
            temperature: of the distribution; None: args.temperature, the sampler's. Offline methods score at 1.0.
        """
        # Gradients of data parallelism are exchanged once a step: in the backward pass of the last micro-batch.
        with self.no_sync() if self.no_sync and not mb.last else nullcontext():
            logprobs, entropy = self._forward(self.engine, mb, bool(with_entropy), temperature)
        entropy = entropy.detach() if with_entropy == "detached" else entropy
        self._scored = (mb, logprobs, entropy)
        return logprobs, entropy

    def _forward(self, module, mb: MicroBatch, with_entropy: bool = False, temperature: float | None = None):
        temperature = self.args.temperature if temperature is None else temperature
        return module(mb.input_ids, mb.position_ids, mb.predict_index, mb.targets, temperature, with_entropy)

    @torch.no_grad()
    def logprobs(
        self, episodes: list[Episode], temperature: float | None = None, base: bool = False
    ) -> list[torch.Tensor]:
        """Return the log-probs [T] (fp32, CPU) of each episode under the current weights, without gradient.

        Tokens that are no actions, and forced ones, keep the behaviour's value, because that is log q. Every rank must
        call this, also one without episodes. `temperature` as in `score`; `base`: with LoRA, of the model without its
        adapters.
        """
        split = self._fill(episodes)
        split += [[] for _ in range(int(self._reduce([len(split)], "max")) - len(split))]
        result = {}
        for part in split:
            mb = pack(part, self.accelerator.device, self.one_row)
            # Under ZeRO-3 only the engine prepares the gathering of weights; elsewhere the bare module is enough.
            with base_alone(self.model) if base else nullcontext():
                scored, _ = self._forward(self.engine if self.zero3 else self.policy, mb, temperature=temperature)
            if not part:
                continue
            values = torch.cat([e.behaviour_logprobs for e in part]).clone()
            free = ~mb.forced.cpu()
            values[mb.response_index.cpu()[free]] = scored.float().cpu()[free]
            for episode, value in zip(part, values.split([e.num_tokens for e in part])):
                result[id(episode)] = value
        return [result.get(id(e), e.behaviour_logprobs) for e in episodes]

    def recompute_logprobs(self, episodes: list[Episode]) -> None:
        """Fill `old_logprobs` of each episode with `logprobs` of the current weights. Every rank must call this."""
        for episode, values in zip(episodes, self.logprobs(episodes)):
            episode.old_logprobs = values

    # --- the update

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's loss: a scalar, its share of the whole step over all ranks."""
        assert self._scored is not None, "backward needs the log-probs of score, and only once"
        mb, logprobs, entropy = self._scored
        self._scored = None
        if mb.weight == 0.0:
            value = logprobs.sum() * 0.0  # whatever the loss made of no tokens, a mean for example, is not a number
            if entropy is not None and entropy.requires_grad:
                # ZeRO-3 compares the modules that ranks pass backwards: the bonus has to be there on this one too.
                value = value + entropy.sum() * 0.0
        self._losses.append((value.detach(), mb.episodes))
        self._complete = mb.last
        # Both data parallelism and DeepSpeed average over ranks: multiplying by their number leaves the sum.
        value = value * self.accelerator.num_processes
        if self.zero3:
            # Not accelerator.backward: that would step before anybody has looked at the gradient.
            self.engine.set_gradient_accumulation_boundary(mb.last)
            self.engine.backward(value)
        else:
            value.backward()

    def step(self, rate: float) -> dict[str, float]:
        """Check, clip and apply the gradient. Returns {"grad_norm" (before clipping), "learning_rate"}.

        With args.on_nonfinite "skip" also "skipped_updates", 1 where a loss of any rank or the gradient was not finite:
        weights, optimiser and number of steps then stay as they were.

        Args:
            rate: AdamW's learning rate; over the first args.warmup_steps steps it rises to this from zero.

        Raises:
            NonFiniteError: with "stop", on all ranks, before any weight changes, if a loss of any rank or the gradient
                is not finite. Either way the questions concerned are in <output_dir>/nonfinite_step_<number>.json.
        """
        assert self._scored is None and self._complete, "step comes after backward of the last micro-batch"
        losses, self._losses, self._complete = self._losses, [], False
        values = torch.stack([value.float() for value, _ in losses])
        bad = (~values.isfinite()).any()
        grad_norm = self._clip_gradient()
        # One exchange tells all ranks the same: a non-finite number anywhere leaves a non-finite sum everywhere.
        flags = self._reduce(torch.stack([bad.double(), grad_norm.double()]), "sum")
        rate *= min(1.0, (self.steps + 1) / max(1, self.args.warmup_steps))
        stats = {"grad_norm": float(grad_norm), "learning_rate": rate}
        if self.args.on_nonfinite == "skip":
            stats["skipped_updates"] = 0
        if flags[0] > 0 or not flags[1].isfinite():
            told = self._write_nonfinite(values, losses, float(grad_norm))
            if self.args.on_nonfinite == "stop":
                raise NonFiniteError(f"{told} The same command continues from the newest checkpoint.")
            on_main(self.accelerator, lambda: say(f"skipped: {told}"))
            if self.zero3:
                self.optimizer._overflow_clean_up(None)  # what DeepSpeed does with an overflow in fp16
            else:
                self.optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
            return stats | {"skipped_updates": 1}
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.zero3:
            self.engine.step()  # clips by the norm of its configuration
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.skipped = 0
        return stats

    def _clip_gradient(self) -> torch.Tensor:
        """Return the norm of the whole gradient, the same on all ranks; clips it, except under ZeRO-3."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if not self.zero3:
            return torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        from deepspeed.utils import safe_get_local_grad

        shards = [safe_get_local_grad(p).float() for p in parameters]  # each rank holds a part of each gradient
        square = torch.stack(torch._foreach_norm(shards)).double().square().sum()
        return self._reduce(square, "sum").sqrt().to(square.device)

    def _write_nonfinite(self, values: torch.Tensor, losses: list, grad_norm: float) -> str:
        """Write down the samples concerned, and return what to tell; every rank must call this."""
        bad = [(str(float(v)), episodes, episodes) for v, (_, episodes) in zip(values, losses) if not v.isfinite()]
        what = "loss" if any(all_gather(self.accelerator, bool(bad))) else "gradient"
        if what == "gradient":  # any micro-batch may be the cause
            episodes = [e for _, episodes in losses for e in episodes]
            bad = [("finite", episodes, sorted(episodes, key=lambda e: -abs(e.advantage))[:SUSPECTS])]
        mine = [
            {
                "process": self.accelerator.process_index,
                "loss": value,  # a text: JSON has no nan
                "questions": sorted({e.question.id for e in episodes}),
                "samples": [sample_of(e) for e in samples],
            }
            for value, episodes, samples in bad
        ]
        bad = [entry for entries in all_gather(self.accelerator, mine) for entry in entries]
        again = f"_{self.skipped + 1}" if self.skipped else ""  # a skipped update is no step: the number stays
        path = Path(self.args.output_dir) / f"nonfinite_step_{self.steps + 1:04d}{again}.json"

        def write():
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {"optimiser_step": self.steps + 1, "grad_norm": str(grad_norm), "micro_batches": bad}
            write_json_atomic(path, report)

        on_main(self.accelerator, write)
        return (
            f"the {what} of optimiser step {self.steps + 1} is not finite; nothing was updated on any process. The "
            f"samples concerned, with their token ids, are in {path}: look for the one that is unlike the others. "
            f"Lower --learning_rate or --max_grad_norm if the steps before it were growing."
        )

    # --- weights

    def named_weights(self, adapter: bool = False, meta: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, whole tensor) of all weights, one decoder layer gathered at a time.

        A tied output embedding is not repeated. A tensor is valid until the next one is asked for. Under ZeRO-3 every
        rank must run through all of them. With LoRA they are merged, what has an adapter in fp32.

        Args:
            adapter: with LoRA, yield what is trained instead, by its names in peft's file.
            meta: yield tensors without memory, which have type and shape; nothing is gathered.
        """
        for named in self.layers():
            if adapter:
                named = [(saved_name(name), p) for name, p in named if p.requires_grad]
            with nullcontext() if meta else self._gathered([p for _, p in named]):
                whole = [(name, shadow(p) if meta else p.detach()) for name, p in named]
                yield from merged(whole, self.lora.lora_alpha / self.lora.r) if self.lora and not adapter else whole

    def layers(self) -> list[list[tuple]]:
        """Return (name, parameter) of all weights by decoder layer; what is in none, an embedding, stands alone."""
        layers: dict[str, list] = {}
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            layer = ".".join(parts[:3]) if "layers" in parts else name  # model.layers.7
            layers.setdefault(layer, []).append((name, parameter))
        return list(layers.values())

    def _gathered(self, parameters: list):
        if not self.zero3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)
