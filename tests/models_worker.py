"""A rank of test_models.py: loads and refuses model folders, and merges an adapter; result in FOLDER/RANK.json.

torchrun --standalone --nproc_per_node 2 tests/models_worker.py FOLDER
"""

import json
import sys
from pathlib import Path

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.model import is_tied, load_model
from adaptive_reasoning.learner.runtime import make_accelerator
from adaptive_reasoning.rollout import Decoder
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.run.start import start_of


def main(folder: Path) -> None:
    args = RunArgs(dtype="fp32", output_dir=str(folder / "out"), model=str(folder / "adapter"), merge_adapter=True)
    accelerator, found = make_accelerator(args), {}
    for name in ("lacking", "infinite"):
        try:
            load_model(str(folder / name), args)
        except UserError as error:
            found[name] = str(error)
    model = load_model(start_of(args, accelerator), args)[0]
    found["split"] = all(hasattr(p, "ds_id") for p in model.parameters())
    found["tied"] = is_tied(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    learner = Learner(args, model, accelerator)
    replica = Decoder(model.config)
    replica.load(learner.named_weights())
    found["sum"] = float(replica.destinations[name].sum())
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
