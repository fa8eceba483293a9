"""The learner in one process: log-probs, independence of the split, the finite check, checkpoints, loading."""

import json
import resource
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from distributed_worker import (
    accumulate,
    gradients,
    make_args,
    make_episodes,
    make_learner,
    toy_loss,
    train,
    weights,
)
from transformers import AttentionInterface, AutoModelForCausalLM

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import load_checkpoint, newest_checkpoint, prune, save_checkpoint
from adaptive_reasoning.learner.learner import NonFiniteError
from adaptive_reasoning.learner.model import boundaries, load_model
from adaptive_reasoning.learner.packing import pack
from adaptive_reasoning.learner.runtime import make_accelerator

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("name", ["tied", "untied", "qwen3", "llama"])
def test_logprobs_are_those_of_the_model_alone(models, tmp_path, name):
    """Packed, padded and chunked, against one plain forward pass of each episode at the sampling temperature (P3)."""
    learner = make_learner(models[name], make_args(tmp_path))
    episodes = make_episodes()
    mb = pack(episodes)
    logprobs, entropy = learner.score(mb, with_entropy=True)
    for i, e in enumerate(episodes):
        ids = torch.cat([e.prompt_ids, e.response_ids])[None]
        logits = learner.model(ids).logits[0, len(e.prompt_ids) - 1 : -1] / 0.7
        logp = logits.log_softmax(-1)
        expected = logp.gather(1, e.response_ids[:, None])[:, 0][e.action_mask]
        torch.testing.assert_close(logprobs[mb.sequence == i], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            entropy[mb.sequence == i], -(logp.exp() * logp).sum(-1)[e.action_mask], atol=1e-5, rtol=0
        )


def test_sequences_in_one_row_do_not_see_each_other(models, tmp_path):
    """The layout for flash attention, here through the block-diagonal mask of SDPA."""
    learner = make_learner(models["tied"], make_args(tmp_path))
    padded, _ = learner.score(pack(make_episodes()))
    one_row, _ = learner.score(pack(make_episodes(), one_row=True))
    torch.testing.assert_close(padded, one_row, atol=1e-5, rtol=0)


def loss_and_gradient(path, folder, episodes, **changes):
    learner = make_learner(path, make_args(folder, **changes))
    (minibatch,) = learner.minibatches(episodes, 1, seed=0)
    return accumulate(learner, minibatch), gradients(learner), len(minibatch)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_split_order_and_checkpointing_change_nothing(models, tmp_path, name):
    """P4: any token budget, any order of the episodes, with or without recomputed activations."""
    loss, expected, number = loss_and_gradient(models[name], tmp_path, make_episodes(), tokens_per_micro_batch=10**6)
    assert number == 1
    for episodes, changes in (
        (make_episodes(), {"tokens_per_micro_batch": 60}),
        (make_episodes(), {"tokens_per_micro_batch": 1}),
        (make_episodes()[::-1], {"tokens_per_micro_batch": 45}),
        (make_episodes(), {"tokens_per_micro_batch": 60, "gradient_checkpointing": True}),
    ):
        other, found, number = loss_and_gradient(models[name], tmp_path, episodes, **changes)
        assert number > 1 and other == pytest.approx(loss, abs=1e-6)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=0)


def test_minibatches_count_everything_once(models, tmp_path):
    """Groups stay whole, zero advantages and tokens that are no actions are counted as promised."""
    learner = make_learner(models["tied"], make_args(tmp_path))
    episodes = make_episodes()
    episodes[0].action_mask[:] = False  # nothing to learn from, but still one of the sequences
    batches = learner.minibatches(episodes, 2, seed=4, skip_zero_advantage=True)
    assert sum(b.counts.tokens for b in batches) == sum(int(e.action_mask.sum()) for e in episodes)
    assert sum(b.counts.sequences for b in batches) == 10
    seen = [{e.group for mb in b for e in mb.episodes} for b in batches]
    assert not seen[0] & seen[1]
    kept = [e for b in batches for mb in b for e in mb.episodes]
    wanted = [e for e in episodes[1:] if e.advantage != 0]
    assert sorted(map(id, kept)) == sorted(map(id, wanted))
    share = sum(b.zero_advantage * b.counts.sequences for b in batches)
    assert share == pytest.approx(sum(e.advantage == 0 for e in episodes)) and share > 0
    again = learner.minibatches(episodes, 2, seed=4, skip_zero_advantage=True)
    assert [[id(e) for mb in b for e in mb.episodes] for b in again] == [
        [id(e) for mb in b for e in mb.episodes] for b in batches
    ]


def test_skipping_zero_advantages_changes_no_gradient(models, tmp_path):
    learner = make_learner(models["tied"], make_args(tmp_path))
    found = []
    for skip in (False, True):
        (minibatch,) = learner.minibatches(make_episodes(), 1, seed=0, skip_zero_advantage=skip)
        loss = accumulate(learner, minibatch)
        found.append((loss, gradients(learner)))
        learner.policy.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=0)


def test_step_without_any_advantage_still_is_a_step(models, tmp_path):
    """All rewards equal: a filler keeps the runtime going, a loss with a mean over no tokens does no harm."""
    learner = make_learner(models["tied"], make_args(tmp_path))
    episodes = make_episodes()
    for e in episodes:
        e.advantage = 0.0
    (minibatch,) = learner.minibatches(episodes, 1, seed=0, skip_zero_advantage=True)
    assert minibatch.zero_advantage == 1.0 and len(minibatch) == 1
    for mb in minibatch:
        logprobs, _ = learner.score(mb)
        learner.backward(logprobs.mean())  # nan
    assert learner.step(learner.args.learning_rate)["grad_norm"] == 0.0 and learner.steps == 1


def test_more_minibatches_than_questions_is_an_error(models, tmp_path):
    learner = make_learner(models["tied"], make_args(tmp_path))
    with pytest.raises(UserError, match="6 minibatches per step need .* there are 5"):
        learner.minibatches(make_episodes(), 6, seed=0)
    with pytest.raises(UserError, match="no episodes"):
        learner.minibatches([], 1, seed=0)


def test_first_update_has_ratio_one_except_for_forced_tokens(models, tmp_path):
    """P5, and recomputing keeps log q of forced tokens and the behaviour's value of tokens that are no actions."""
    learner = make_learner(models["tied"], make_args(tmp_path))
    episodes = make_episodes()
    learner.recompute_logprobs(episodes)
    for mb in learner.minibatches(episodes, 1, seed=0)[0]:
        logprobs, _ = learner.score(mb)
        ratio = (logprobs - mb.old_logprobs).exp()
        torch.testing.assert_close(ratio[~mb.forced], torch.ones_like(ratio[~mb.forced]), atol=1e-5, rtol=0)
        torch.testing.assert_close(mb.old_logprobs[mb.forced], mb.behaviour_logprobs[mb.forced], atol=0, rtol=0)
        learner.backward(toy_loss(logprobs, mb, learner.minibatches(episodes, 1, seed=0)[0].counts))
    for e in episodes:
        kept = ~e.action_mask
        assert torch.equal(e.old_logprobs[kept], e.behaviour_logprobs[kept])
        assert not torch.equal(e.old_logprobs[e.action_mask][1:], e.behaviour_logprobs[e.action_mask][1:])
    assert any(e.forced.any() for e in episodes)


def test_warm_up_clipping_and_adam_are_the_textbook_ones(models, tmp_path):
    args = make_args(tmp_path, warmup_steps=4, adam_beta2=0.95)
    learner = make_learner(models["untied"], args)
    stats = train(learner, make_episodes(), 5)
    assert [s["learning_rate"] for s in stats] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    other = make_learner(models["untied"], args)
    (minibatch,) = other.minibatches(make_episodes(), 1, seed=0)
    accumulate(other, minibatch)
    parameter = dict(other.model.named_parameters())["lm_head.weight"]
    norm = torch.cat([p.grad.flatten() for p in other.model.parameters()]).norm()
    gradient, before = parameter.grad * (0.05 / norm), parameter.detach().clone()
    assert other.step(other.args.learning_rate)["grad_norm"] == pytest.approx(float(norm), rel=1e-5) and norm > 0.05
    expected = before * (1 - 2.5e-4 * 0.01) - 2.5e-4 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(parameter.detach(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_layers_with_an_adapter_move(models, tmp_path, checkpointing):
    """The embeddings, the head included, are frozen and cost no gradient, with gradient checkpointing too."""
    args = make_args(tmp_path, gradient_checkpointing=checkpointing, lora_rank=2, lora_targets="o_proj")
    learner = make_learner(models["untied"], args)
    before = weights(learner)
    train(learner, make_episodes(), 1)
    moved = {name for name, weight in weights(learner).items() if not torch.equal(weight, before[name])}
    assert moved == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_stops_before_the_update(models, tmp_path, where):
    """P8: nothing moves, and the file names the questions of the micro-batch (or of all, if only the gradient is)."""
    learner = make_learner(models["tied"], make_args(tmp_path / "run", tokens_per_micro_batch=45))
    before = weights(learner)
    (minibatch,) = learner.minibatches(make_episodes(), 1, seed=0)
    for i, mb in enumerate(minibatch):
        value = toy_loss(learner.score(mb)[0], mb, minibatch.counts)
        if i == 1:
            names = sorted({e.question.id for e in mb.episodes})
            if where == "loss":
                value = value * float("nan")
            else:
                value.register_hook(lambda g: g * float("inf"))
        learner.backward(value)
    with pytest.raises(NonFiniteError, match=f"the {where} of optimiser step 1 is not finite"):
        learner.step(learner.args.learning_rate)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(learner).values()))
    (entry,) = json.loads((tmp_path / "run" / "nonfinite_step_0001.json").read_text())["micro_batches"]
    assert entry["questions"] == (names if where == "loss" else ["q0", "q1", "q2", "q3", "q4"])
    saved = {(s["question"], tuple(s["prompt_ids"]), tuple(s["response_ids"])) for s in entry["samples"]}
    asked = {(e.question.id, tuple(e.prompt_ids.tolist()), tuple(e.response_ids.tolist())) for e in make_episodes()}
    assert saved <= asked and {question for question, _, _ in saved} == set(entry["questions"])
    assert set(entry["samples"][0]) >= {"text", "behaviour_logprobs", "reward", "advantage", "group"}


def test_nonfinite_update_is_skipped_where_asked(models, tmp_path, capsys):
    """As verl does: the two steps around them are those of a run without them, bit for bit; each is said and kept."""
    stats, moved = {}, {}
    for name in ("whole", "skips"):
        learner = make_learner(models["tied"], make_args(tmp_path / name, on_nonfinite="skip", warmup_steps=3))
        stats[name] = train(learner, make_episodes(), 1)
        if name == "skips":
            for _ in range(2):
                (minibatch,) = learner.minibatches(make_episodes(), 1, seed=0)
                for mb in minibatch:
                    learner.backward(toy_loss(learner.score(mb)[0], mb, minibatch.counts) * float("nan"))
                assert learner.step(1e-3)["skipped_updates"] == 1 and learner.steps == 1
        stats[name] += train(learner, make_episodes(), 1, first=1)
        moved[name] = weights(learner)
    assert stats["whole"] == stats["skips"] and [s["skipped_updates"] for s in stats["skips"]] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(moved["whole"].values(), moved["skips"].values()))
    for name in ("nonfinite_step_0002.json", "nonfinite_step_0002_2.json"):
        assert (tmp_path / "skips" / name).is_file()
    said = capsys.readouterr().out
    assert said.count("skipped: the loss of optimiser step 2 is not finite") == 2 and "_2.json" in said


def test_resume_is_bit_exact(models, tmp_path):
    """P6: 2 steps, save, load into another learner, 2 steps: the weights of 4 steps, bit for bit."""
    args = make_args(tmp_path, warmup_steps=3)
    learner = make_learner(models["tied"], args)
    train(learner, make_episodes(), 4, minibatches=2)
    expected = weights(learner)

    learner = make_learner(models["tied"], args)
    train(learner, make_episodes(), 2, minibatches=2)
    tokenizer = load_model(models["tied"], args)[1]
    save_checkpoint(tmp_path / "checkpoints" / "step_000002", learner, tokenizer, {"step": 2, "seen": [1, 2]})
    saved = weights(learner)

    newest = newest_checkpoint(tmp_path / "checkpoints")
    learner = make_learner(models["tied"], args)
    assert load_checkpoint(newest, learner) == {"step": 2, "seen": [1, 2]}
    train(learner, make_episodes(), 2, minibatches=2, first=2)
    for name, weight in weights(learner).items():
        assert torch.equal(weight, expected[name]), name

    opened = AutoModelForCausalLM.from_pretrained(newest / "model", dtype="auto")
    assert all(torch.equal(p, saved[n]) for n, p in opened.named_parameters())
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert type(opened.lm_head) is torch.nn.Linear


def test_full_disk_leaves_no_checkpoint_behind(models, tmp_path):
    """A real failure to write: the process may not write files beyond 100 kB, the model is larger."""
    args = make_args(tmp_path)
    learner = make_learner(models["tied"], args)
    tokenizer = load_model(models["tied"], args)[1]
    root = tmp_path / "checkpoints"
    save_checkpoint(root / "step_000001", learner, tokenizer, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write the checkpoint .*step_000002"):
            save_checkpoint(root / "step_000002", learner, tokenizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in root.iterdir()] == ["step_000001"]
    assert load_checkpoint(newest_checkpoint(root), learner) == {}


def test_unfinished_checkpoints_do_not_count_and_pruning_keeps_the_newest(models, tmp_path):
    """A writer killed at any moment leaves a folder of another name; saving a step twice replaces it."""
    args = make_args(tmp_path)
    learner = make_learner(models["tied"], args)
    tokenizer = load_model(models["tied"], args)[1]
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (8, 9, 10, 10):
        save_checkpoint(tmp_path / f"step_{step:06d}", learner, tokenizer, {"step": step})
    shutil.copytree(tmp_path / "step_000010", tmp_path / "step_000011.partial")
    assert newest_checkpoint(tmp_path).name == "step_000010"
    prune(tmp_path, keep=0)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000008", "step_000009", "step_000010"]
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000009", "step_000010"]


def test_loading_what_is_no_checkpoint_or_of_another_model_is_an_error(models, tmp_path):
    args = make_args(tmp_path)
    learner = make_learner(models["tied"], args)
    with pytest.raises(UserError, match="is not a checkpoint: looked for .*state.json"):
        load_checkpoint(tmp_path, learner)
    save_checkpoint(tmp_path / "step_000001", learner, load_model(models["tied"], args)[1], {})
    with pytest.raises(UserError, match="has 0 numbers for lm_head.weight, the model 6208: it is of another model"):
        load_checkpoint(tmp_path / "step_000001", make_learner(models["untied"], args))


def test_model_that_cannot_be_used_is_an_error(models, tmp_path, monkeypatch):
    args = make_args(tmp_path)
    with pytest.raises(UserError, match="no such folder .looked for .*missing"):
        load_model(str(tmp_path / "missing"), args)
    with pytest.raises(UserError, match="the folder has no config.json"):
        load_model(str(tmp_path), args)
    for key, value, message in (
        ("model_type", "gpt2", "models of type gpt2 are not supported. Use Qwen2"),
        ("use_sliding_window", True, "sliding-window attention is not supported"),
    ):
        folder = tmp_path / key
        shutil.copytree(models["tied"], folder)
        config = json.loads((folder / "config.json").read_text())
        config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            load_model(str(folder), args)
    with pytest.raises(UserError, match="temperature greater than 0"):
        make_learner(models["tied"], make_args(tmp_path, temperature=0.0))


def test_code_that_a_model_brings_along_is_not_run(models, tmp_path):
    """Without an answer transformers asks at the terminal, and a run on a cluster has nobody to ask."""
    folder = tmp_path / "foreign"
    shutil.copytree(models["tied"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config:\n    pass\n")
    with pytest.raises(UserError, match="it brings code of its own, which is never run. Use Qwen2"):
        load_model(str(folder), make_args(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_deepspeed_switched_off_by_the_cpu_switch_is_an_error(monkeypatch, tmp_path):
    """accelerate 1.15 would run plain data parallelism without a word."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU switches DeepSpeed off"):
        make_accelerator(make_args(tmp_path))


def test_bf16_keeps_master_weights_and_log_probs_in_fp32(models, tmp_path):
    learner = make_learner(models["tied"], make_args(tmp_path, dtype="bf16"))
    mb = pack(make_episodes())
    logprobs, _ = learner.score(mb)
    assert logprobs.dtype == torch.float32
    AcceleratorState._reset_state(reset_partial_state=True)
    exact, _ = make_learner(models["tied"], make_args(tmp_path)).score(mb)
    assert 0 < float((logprobs - exact).detach().abs().max()) < 0.05
    train(learner, make_episodes(), 1)
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


def test_named_weights_are_the_hugging_face_names(models, tmp_path):
    for name in ("tied", "untied"):
        learner = make_learner(models[name], make_args(tmp_path))
        opened = AutoModelForCausalLM.from_pretrained(models[name], dtype="auto")
        found = weights(learner)
        assert list(found) == [n for n, _ in opened.named_parameters()]
        assert all(torch.equal(found[n], p) for n, p in opened.named_parameters())
        assert ("lm_head.weight" in found) == (name == "untied")


def varlen_sdpa(
    module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **_
):  # fmt: skip
    """Attend within [boundary, next boundary) alone, as flash attention does: by what the call says, not by a mask."""
    assert attention_mask is None and query.shape[0] == 1
    assert cu_seq_lens_q.dtype == torch.int32 and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    lengths = cu_seq_lens_q.diff()
    assert max_length_q == max_length_k == int(lengths.max()) and isinstance(max_length_q, int)
    assert int(lengths.sum()) == query.shape[2]
    parts = zip(*(x.split(lengths.tolist(), dim=2) for x in (query, key, value)))
    out = [torch.nn.functional.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("name", ["untied", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_tell_flash_attention_where_sequences_end(models, tmp_path, name, checkpointing):
    """By the names that transformers hands on to its kernels, in every family, through gradient checkpointing too."""
    AttentionInterface.register("varlen_sdpa", varlen_sdpa)
    found = []
    for one_row in (False, True):
        learner = make_learner(models[name], make_args(tmp_path, gradient_checkpointing=checkpointing))
        if one_row:
            learner.model.config._attn_implementation = "varlen_sdpa"
        logprobs, _ = learner.score(pack(make_episodes(), one_row=one_row))
        logprobs.square().sum().backward()
        found.append((logprobs.detach(), gradients(learner)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, atol=1e-4, rtol=1e-4)
    assert boundaries(None) == {}
