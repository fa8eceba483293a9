"""LoRA: small matrices beside frozen weights are trained, W x + s B A x with s = alpha / rank (arXiv 2106.09685).

peft puts the adapters in and defines the folder they are saved as. Merging is done here, a decoder layer at a time,
because peft's would see the shards of ZeRO-3, and would want a second whole model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adaptive_reasoning.errors import UserError

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer
ALL = "all-linear"
BASE, ADAPTER = ".base_layer", ".lora_"  # in peft's names of parameters: the frozen layer, its A and B


def targets_of(args) -> list[str]:
    """Return the names of the linear layers that get an adapter; UserError where --lora_targets has another."""
    names = list(LINEAR) if args.lora_targets == ALL else [name.strip() for name in args.lora_targets.split(",")]
    if unknown := [name for name in names if name not in LINEAR]:
        raise UserError(
            f"--lora_targets {args.lora_targets}: '{unknown[0]}' gets no adapter. Known are {', '.join(LINEAR)}, and "
            f"{ALL} for all of these. Embeddings and head are trained without LoRA alone (--lora_rank 0)."
        )
    return names


def lora_config(args, **more):
    """Return peft's LoraConfig, None without LoRA; `more` are further fields of it.

    Raises:
        UserError: peft is not installed, or as `targets_of`.
    """
    if not args.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("--lora_rank needs the package peft: pip install 'adaptive-reasoning[peft]'.") from error
    return LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets_of(args), **more)


def add_adapters(model, args, heads: tuple[str, ...], zero3: bool):
    """Put adapters into a model and freeze all else; return the LoraConfig to save with them, None without LoRA.

    A is drawn from --seed and B is zero: the model starts as its base. With --dtype bf16 frozen matrices are held in
    bf16, which autocast would make of them in every forward pass: the numbers are those of fp32 weights. The embedding,
    the norms and, where it is the embedding, the head stay in fp32, as the hidden states do. ZeRO-3 holds all in bf16.

    Args:
        heads: modules that are trained whole beside the adapters: the critic's.
    """
    if (config := lora_config(args, base_model_name_or_path=model.name_or_path or None)) is None:
        return None
    from peft import inject_adapter_in_model

    torch.manual_seed(args.seed)
    inject_adapter_in_model(config, model)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    if args.dtype == "bf16" and not zero3:
        embedding = model.get_input_embeddings().weight
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight is not embedding:
                module.to(torch.bfloat16)
    config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    config.modules_to_save = list(heads) or None
    return config


def merged(layer: Iterable[tuple[str, torch.Tensor]], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) of a layer's parameters: W + scale B A, in fp32, for W and its adapter."""
    found = dict(layer)
    for name, tensor in found.items():
        if ADAPTER in name:
            continue
        module = name.removesuffix(f"{BASE}.weight")
        if module != name:
            A, B = (found[f"{module}.lora_{x}.default.weight"].float() for x in "AB")
            tensor = torch.addmm(tensor.float(), B, A, alpha=scale)
        yield name.replace(BASE, ""), tensor


def saved_name(name: str) -> str:
    """Return the name that a trained parameter has in peft's file."""
    return "base_model.model." + name.replace(".default.", ".")


@contextmanager
def base_alone(model):
    """For as long as it is open the model is its base, the adapters switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
