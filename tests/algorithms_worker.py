"""Runs of several algorithms one after the other in the same process, or the same processes: one start for all of them.

    accelerate launch ... tests/algorithms_worker.py FOLDER NAME

Runs go to FOLDER/NAME/<algorithm>; models are FOLDER/model-<format>. The learning rate is low: the first updates of
Adam have the size of the rate whatever the gradient's, and at 1e-3 the rounding of a sum over processes once turned
into another token.
"""

import importlib
import sys
from pathlib import Path

from adaptive_reasoning.run import run

COMMON = (
    "--chain_questions 20 --chain_mix 1 --chain_eval_questions 8 --prompts_per_step 5 --num_generations 4 "
    "--rollout_rows 64 --max_steps 2 --eval_every 0 --save_every 1 --keep_checkpoints 1 --learning_rate 2e-4 "
    "--tokens_per_micro_batch 256 --minibatches_per_step 2"
)
RUNS = {  # algorithm: (format of its model, options)
    "grpo": ("arm", "--max_new_tokens 32 --kl_coef 0.01 --entropy_coef 0.01"),
    "ada_grpo": ("arm", "--max_new_tokens 32 --kl_coef 0.01 --entropy_coef 0.01"),
    "tlmre": ("arm", "--answer_format arm --max_new_tokens 32 --kl_coef 0.01 --alpha 0.4"),
    "degrpo": ("thinkless", "--max_new_tokens 24 --kl_coef 0.01 --entropy_coef 0.01"),
    "thinker": ("thinker", "--critic_minibatches 2 --max_new_tokens 64 --fast_budget 8 --verify_budget 12 "
                           "--slow_budget 12 --summary_budget 8"),
}  # fmt: skip


def all_on_the_first(expected: list[float], ranks: int) -> list[list[int]]:
    """Deal a step as unevenly as can be."""
    return [list(range(len(expected)))] + [[] for _ in range(ranks - 1)]


def main(folder: Path, name: str) -> None:
    end, deal = run.end, run.deal
    for algorithm, (form, options) in RUNS.items():
        # The process group is needed until the last run; one of them has processes without a single question.
        run.end = end if algorithm == list(RUNS)[-1] else lambda *_: None
        run.deal = all_on_the_first if algorithm == "grpo" else deal
        sys.argv = [algorithm, "--config", f"experiments/toy_{algorithm}.yaml", *COMMON.split(), *options.split()]
        sys.argv += ["--model", str(folder / f"model-{form}"), "--output_dir", str(folder / name / algorithm)]
        importlib.import_module(f"adaptive_reasoning.{algorithm}").main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
