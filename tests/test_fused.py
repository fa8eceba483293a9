"""`--fused true` changes no number: every algorithm, every switch, plain torch against the kernels and their twins.

The plain formula of the algorithm file is the reference. Triton runs in its interpreter where there is no GPU.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from adaptive_reasoning.kernels import SWITCH
from test_end_to_end import run_module
from test_kernels import compiles_without_gpu

from adaptive_reasoning import ada_grpo, adaptthink, degrpo, grpo, kernels, thinker
from adaptive_reasoning.episode import Episode, by_group
from adaptive_reasoning.learner import fused
from adaptive_reasoning.learner.packing import Counts, pack
from adaptive_reasoning.learner.ppo import policy_loss
from adaptive_reasoning.options import RunArgs
from adaptive_reasoning.report.files import read_jsonl
from adaptive_reasoning.tasks.question import Question

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = {"grpo": list(grpo.TAGS), "ada_grpo": list(ada_grpo.TAGS), "degrpo": ["think", "short", "malformed"]}
COUNTS = Counts(tokens=90, sequences=11, groups=4)


@pytest.fixture(params=["torch", "triton"])
def implementation(request, monkeypatch):
    """Run the operations by the twin and by Triton."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if compiles_without_gpu():
            pytest.skip("there is no GPU and triton was imported without TRITON_INTERPRET=1")
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(SWITCH, request.param)
    return request.param


def micro_batch(name: str, lengths=(3, 1, 40, 7, 12)):
    """Return a real micro-batch whose old and reference log-probs, advantages and entropies are random; and a leaf."""
    g = torch.Generator().manual_seed(3)
    episodes = [
        Episode(
            Question(str(i), "", ""), i // 2, torch.tensor([1, 2]), torch.arange(T), torch.randn(T, generator=g) - 2,
            torch.ones(T, dtype=torch.bool), "stop", mode=MODES.get(name, ["thinking"])[i % len(MODES.get(name, "x"))],
            advantage=float(torch.randn((), generator=g)), ref_logprobs=torch.randn(T, generator=g) - 2,
        )
        for i, T in enumerate(lengths)
    ]  # fmt: skip
    mb = pack(episodes, DEVICE)
    logprobs = mb.old_logprobs + 0.4 * torch.randn(len(mb.targets), generator=g).to(DEVICE)
    return mb, logprobs, torch.rand(len(mb.targets), generator=g).to(DEVICE)


def outcome(call, logprobs, entropy):
    """Return value, gradients and statistics of a loss as one {name: tensor}."""
    leaves = [logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()]
    value, stats = call(*leaves)
    (2.5 * value).backward()
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in zip(("d", "H"), leaves)}
    assert not any(x.requires_grad for x in stats.values())
    return {"value": value.detach(), **grads, **stats}


def switches(name: str) -> list[dict]:
    """Return every combination of the options that a loss reads."""
    spread = [{}, {"kl_coef": 0.01, "entropy_coef": 0.02}, {"kl_coef": 0.0, "entropy_coef": 0.02}]
    if name == "adaptthink":
        averages = adaptthink.Args.CHOICES["token_average"]
        return [{"ratio": r} for r in ("sequence_mean", "sequence_product")] + [
            {"ratio": "token", "token_average": average} for average in averages
        ]
    if name == "thinker":
        return [{"dual_clip": 0.0}, {"dual_clip": 1.1}]
    choices = vars(MODULES[name])["Args"].CHOICES["aggregation"]
    return [{"aggregation": a, "kl_coef": 0.0, "entropy_coef": 0.0} | s for a, s in itertools.product(choices, spread)]


MODULES = {"adaptthink": adaptthink, "grpo": grpo, "ada_grpo": ada_grpo, "degrpo": degrpo, "thinker": thinker}


def loss_of(name: str, logprobs, entropy, mb, args):
    """Call the loss of an algorithm file, as its loop does."""
    if name == "adaptthink":
        return adaptthink.loss(logprobs, mb, COUNTS, args)
    if name == "thinker":
        return policy_loss(logprobs, entropy, mb.advantages, mb, COUNTS, args)
    return MODULES[name].loss(logprobs, entropy, mb, COUNTS, args)


CASES = [(name, options) for name in MODULES for options in switches(name)]


@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_loss_gradient_and_statistics_are_the_plain_ones(name, options, implementation):
    mb, logprobs, entropy = micro_batch(name)
    found = []
    for fused_ in (False, True):
        args = MODULES[name].Args(**options, clip_low=0.1, clip_high=0.28, fused=fused_)
        found.append(outcome(lambda x, H, args=args: loss_of(name, x, H, mb, args), logprobs, entropy))
    assert set(found[0]) == set(found[1])
    assert found[0]["loss/clip_fraction"] > 0 and found[0]["d"].abs().max() > 0
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=2e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MODULES)
def test_a_filler_has_no_loss(name, implementation):
    """A micro-batch without tokens, as a process gets that has run out of work: 0, with an empty gradient."""
    none = torch.zeros(0, device=DEVICE)
    leaf = none.clone().requires_grad_()
    value, stats = loss_of(name, leaf, none, pack([], DEVICE), MODULES[name].Args(fused=True))
    value.backward()
    assert value == 0 and leaf.grad.shape == (0,) and all(x == 0 for x in stats.values())


# ----------------------------------------------------------------------------------------------------------- advantages


def graded(name: str) -> list[Episode]:
    """Episodes of every kind of group, out of order: mixed, all right in one or several modes, all wrong, of one."""
    g = torch.Generator().manual_seed(5)
    rewards = {0: [1, 0, 0, 1, 0, 1, 1], 3: [1] * 5, 7: [1] * 6, 2: [0] * 4, 9: [1], 4: [0], 11: [1, 0]}
    episodes = []
    for group, values in rewards.items():
        for k, r in enumerate(values):
            modes = MODES[name]
            mode = modes[0] if group == 3 else modes[int(torch.randint(len(modes), (), generator=g)) if k else 0]
            value = {"grpo": r, "ada_grpo": r, "degrpo": [-1.0, 0.8][r]}[name]
            info = {"forced": 0, "correct": bool(r)}
            one = torch.zeros(1, dtype=torch.int64)
            episodes.append(
                Episode(Question(str(group), "", ""), group, one, one, one.float(), one.bool(), "stop", mode=mode,
                        reward=float(value), info=info)
            )  # fmt: skip
    order = torch.randperm(len(episodes), generator=g).tolist()
    return [episodes[i] for i in order]


def advantage_switches() -> list[tuple[str, dict]]:
    cases = [(name, {"std": std}) for name in ("grpo", "degrpo") for std in MODULES[name].Args.CHOICES["std"]]
    ada = ada_grpo.Args.CHOICES
    for std, decay, drop in itertools.product(ada["std"], ada["decay"], (False, True)):
        cases.append(("ada_grpo", {"std": std, "decay": decay, "drop_all_correct": drop}))
    return cases


@pytest.mark.parametrize("name, options", advantage_switches())
def test_advantages_are_the_plain_ones(name, options, implementation):
    episodes, step = graded(name), (40,) if name == "ada_grpo" else ()
    compute = MODULES[name].advantages
    want = {}
    for group in by_group(episodes):
        want |= dict(zip(map(id, group), compute(group, MODULES[name].Args(**options), *step)))
    got = compute(episodes, MODULES[name].Args(**options, fused=True), *step)
    assert len({round(a, 6) for a in got}) > 4
    for e, a in zip(episodes, got):
        assert math.isclose(a, want[id(e)], rel_tol=1e-7, abs_tol=1e-9), (e.group, e.mode, a, want[id(e)])


def test_no_episodes_have_no_advantages(implementation):
    """A process without questions."""
    assert grpo.advantages([], grpo.Args(fused=True)) == []
    assert ada_grpo.advantages([], ada_grpo.Args(fused=True, drop_all_correct=True), 1) == []


def test_the_branch_is_taken_and_is_one_call(monkeypatch):
    """Were `fused` not read, every comparison of this file would hold as well."""
    calls = []

    def counted(name):
        real = getattr(kernels, name)
        return lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs)

    for name in ("policy_loss", "group_advantage"):
        monkeypatch.setattr(fused.kernels, name, counted(name))
    for name in MODULES:
        mb, logprobs, entropy = micro_batch(name)
        for on in (False, True):
            before = len(calls)
            loss_of(name, logprobs, entropy, mb, MODULES[name].Args(fused=on))
            assert calls[before:] == ["policy_loss"] * on, name
    for name in ("grpo", "ada_grpo", "degrpo"):
        before = len(calls)
        MODULES[name].advantages(graded(name), MODULES[name].Args(fused=True), *((1,) if name == "ada_grpo" else ()))
        assert calls[before:] == ["group_advantage"]
    assert RunArgs().fused is False


SMALL = (
    "--task chain --prompts_per_step 2 --num_generations 4 --chain_questions 40 --chain_eval_questions 6 "
    "--max_new_tokens 24 --eval_every 0 --save_every 0 --rollout_rows 16 --max_steps 4"
)
OWN = {
    "adaptthink": "--ref_samples 1 --nothinking_max_new_tokens 8",
    "ada_grpo": "--minibatches_per_step 2",
    "degrpo": "--minibatches_per_step 1",
}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A model of a few steps in the format of each method: answers of some lengths, some of them right."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("cold"), made={})


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_run_gives_the_same_curve(name, cold, tmp_path):
    cold_start = {"adaptthink": "adaptthink", "ada_grpo": "arm", "degrpo": "thinkless"}[name]
    folder = cold.folder / cold_start
    done = run_module(
        "sft", "--config", f"experiments/cold_start_{cold_start}.yaml", "--max_steps", "4", "--batch_size", "16",
        "--output_dir", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    curves = []
    for on in ("false", "true"):
        more = ["--ref_cache", str(tmp_path / "ref")] if name == "adaptthink" else []
        done = run_module(
            name, "--config", f"experiments/toy_{name}.yaml", "--model", str(folder / "model"), *SMALL.split(),
            *OWN[name].split(), *more, "--fused", on, "--output_dir", str(tmp_path / on),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append([row for row in read_jsonl(tmp_path / on / "metrics.jsonl") if "loss/policy" in row])
    assert len(curves[0]) == len(curves[1]) == 4
    for a, b in zip(*curves):
        for key in [key for key in a if key.startswith("loss/")] + ["reward/mean"]:
            assert b.get(key) == pytest.approx(a.get(key), rel=1e-3, abs=1e-5), (key, a, b)
