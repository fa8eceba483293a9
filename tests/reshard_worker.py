"""One rank that reads a checkpoint of any number of processes, writes it again, and goes on from it.

    torchrun --standalone --nproc_per_node 3 tests/reshard_worker.py FOLDER FROM TO

Rank 0 leaves in FOLDER/TO.json the losses of the next step, and how many bytes of weights were whole at a time while
all of them were gathered once.
"""

import json
import sys
from pathlib import Path

from critic_worker import fresh_episodes, learn, make_pair
from distributed_worker import make_args, train

from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoint
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import all_gather, end, make_accelerator


def gathered_bytes(learner) -> list[int]:
    """Return the most bytes of weights that were whole at a time while they were gathered, and the largest layer's."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = list(learner.model.parameters())
    size = {id(p): p.ds_numel * p.element_size() for p in parameters}

    def alive():
        return sum(size[id(p)] for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)

    assert alive() == 0
    most = max(alive() for _ in learner.named_weights())
    assert alive() == 0
    return [most, max(sum(size[id(p)] for _, p in layer) for layer in learner.layers()), sum(size.values())]


def main(folder: Path, source: str, target: str) -> None:
    accelerator = make_accelerator(make_args(folder))
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 0  # else weights as small as these are never split
    learner, critic = make_pair(str(folder / "model"), folder, accelerator)
    checkpoint, told = whole_checkpoint(folder / source, accelerator)
    assert checkpoint.name == "step_000002" and "step_000003.damaged" in told[0], told
    state = load_checkpoint(checkpoint, learner, critic)
    tokenizer = load_model(str(folder / "model"), learner.args)[1]
    found = {"gathered": gathered_bytes(learner), "offload": zero.get("offload_optimizer", {}).get("device", "none")}
    if accelerator.is_main_process:
        (folder / target).mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    save_checkpoint(folder / target / "step_000002", learner, tokenizer, state, critic)
    found["device"] = str(learner.optimizer.fp32_partitioned_groups_flat[0].device)
    mine = fresh_episodes(range(10)[accelerator.process_index :: accelerator.num_processes])
    found["next"] = [s["loss"] for s in train(learner, mine, 1, first=2)] + learn(critic, mine, 1, first=2)
    found["same"] = all_gather(accelerator, found["next"])
    if accelerator.is_main_process:
        (folder / f"{target}.json").write_text(json.dumps(found))
    end(accelerator, [learner.engine, critic.engine])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
