"""Supervised fine-tuning: the mean of means, rows held out, the best checkpoint, epochs, schedules, control tokens."""

import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from small_model import make_folder

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import Row
from adaptive_reasoning.formats.rows import batch_of, held_out, share_of
from adaptive_reasoning.learner.learner import Learner
from adaptive_reasoning.learner.packing import Counts, fill, pack
from adaptive_reasoning.learner.runtime import make_accelerator
from adaptive_reasoning.sft import Args, loss, needed_tokens, rate, start_tokenizer, weigh


def rows(n: int) -> list[Row]:
    return [Row(Question(f"q/{i}", f"{i}?", ""), f"<ANSWER>\n{i}\n</ANSWER>") for i in range(n)]


def episode(i: int, tokens: int) -> Episode:
    zeros, ones = torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool)
    ids = torch.full((tokens,), 10 + i)
    return Episode(Question(str(i), "", ""), i, torch.tensor([1]), ids, zeros, ones, "stop", advantage=1.0)


# --- the loss


def test_mean_of_means_by_hand():
    """Two means of two rows: (1 + 3 tokens) and (2 + 6 tokens). Each token -log p = i + 1 of its row i."""
    lengths = [1, 3, 2, 6]
    episodes = weigh([episode(i, n) for i, n in enumerate(lengths)], 4, SimpleNamespace(rows_per_mean=2))
    want = ((1 * 1 + 3 * 2) / 4 + (2 * 3 + 6 * 4) / 8) / 2
    token_mean = (1 * 1 + 3 * 2 + 2 * 3 + 6 * 4) / 12
    for split in (fill(episodes, 1000, False), fill(episodes, 8, False), [episodes[::-1]]):
        got = {}
        for n in (2, 0):
            args, mbs = SimpleNamespace(rows_per_mean=n), [pack(part) for part in split]
            logprobs = [-(mb.targets - 9).float() for mb in mbs]
            got[n] = sum(float(loss(x, mb, Counts(12, 4), args)) for x, mb in zip(logprobs, mbs))
        assert got == {2: pytest.approx(want), 0: pytest.approx(token_mean)}


def test_a_last_mean_of_fewer_rows_counts_by_its_rows():
    (one, two, three) = weigh([episode(i, 2) for i in range(3)], 3, SimpleNamespace(rows_per_mean=2))
    assert [float(e.columns["weight"][0]) for e in (one, two, three)] == pytest.approx([1 / 6] * 3)


def test_a_mean_is_the_same_on_any_number_of_processes():
    args, lengths = SimpleNamespace(rows_per_mean=4), [1, 9, 2, 7, 3, 3, 8, 5, 1, 1, 6, 4]
    everything = rows(12)
    whole = {
        e.question.id: e.columns["weight"] for e in weigh([episode(i, n) for i, n in enumerate(lengths)], 12, args)
    }
    for ranks in (2, 3, 4):
        found = {}
        for rank in range(ranks):
            mine = share_of(everything, args, SimpleNamespace(process_index=rank, num_processes=ranks))
            at = [everything.index(row) for row in mine]
            found |= {e.question.id: e.columns["weight"] for e in weigh([episode(i, lengths[i]) for i in at], 12, args)}
        assert found.keys() == whole.keys() and all(found[i].equal(whole[i]) for i in whole)


def test_a_run_does_not_depend_on_how_it_is_packed(go, tmp_path):
    """P4: one forward pass a step, or many small ones."""
    options = (
        "--config experiments/cold_start_arm.yaml --max_steps 3 --batch_size 8 --rows_per_mean 4 --layers 1".split()
    )
    for name, tokens in (("one", 100_000), ("many", 200)):
        assert go("sft", *options, "--output_dir", tmp_path / name, "--tokens_per_micro_batch", tokens)[0] == 0
    one, many = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    for a, b in zip(one, many):
        assert a == pytest.approx(b, rel=1e-5)


# --- epochs, rows held out


@pytest.mark.parametrize("pairs", [False, True])
def test_every_row_comes_once_an_epoch(pairs):
    """10 rows (or pairs), 4 a step: the third batch takes two from the old epoch and two from the new one."""
    unit = 1 + pairs
    data, args = rows(10 * unit), SimpleNamespace(seed=3, pairs=pairs, batch_size=4 * unit)
    picked = [row.question.id for step in range(1, 6) for row in batch_of(data, step, args)]
    for epoch in (picked[: 10 * unit], picked[10 * unit :]):
        assert Counter(epoch) == Counter(row.question.id for row in data)
    assert picked[: 10 * unit] != picked[10 * unit :]
    if pairs:
        numbers = [int(i.split("/")[1]) for i in picked]
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(numbers[::2], numbers[1::2]))


def test_held_out_rows():
    data = rows(45)
    kept, out = held_out(data, SimpleNamespace(seed=0, pairs=False, validation_share=0.1))
    assert (len(kept), len(out)) == (40, 5)  # rounded up
    assert kept == [row for row in data if row not in out]
    assert held_out(data, SimpleNamespace(seed=1, pairs=False, validation_share=0.1))[1] != out
    assert held_out(data, SimpleNamespace(seed=0, pairs=False, validation_share=0.0)) == (data, [])
    kept, out = held_out(data[:40], SimpleNamespace(seed=0, pairs=True, validation_share=0.1))
    numbers = [int(row.question.id[2:]) for row in out]
    assert len(out) == 4 and all(a % 2 == 0 and b == a + 1 for a, b in zip(numbers[::2], numbers[1::2]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "best"}, "--keep best: needs rows to compare by"),
        ({"task": "chain", "validation_share": 0.1}, "code makes new ones in every step"),
        (
            {"keep": "best", "validation_share": 0.1, "eval_every": 15},
            "--eval_every 15 is no multiple of --save_every 10",
        ),
        ({"keep": "best", "validation_share": 0.1, "save_every": 0}, "--save_every 0 saves the last step alone"),
        ({"rows_per_mean": 3}, "--rows_per_mean 3: --batch_size 128 is no multiple of it"),
        ({"min_learning_rate": 1.0}, "--min_learning_rate 1.0: is above --learning_rate"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        Args(**{"task": "math", "model": "m", "data": "d.jsonl", **options})


def test_the_best_checkpoint_is_kept_and_survives_a_kill(go, tmp_path):
    """P6: what the rows teach is wrong for those held out, whose loss rises; LoRA is merged from the best one."""
    make_folder(tmp_path / "base")
    out = held_out(rows(20), SimpleNamespace(seed=0, pairs=False, validation_share=0.2))[1]
    others = {row.question.problem for row in out}
    lines = [{"problem": f"{i}?", "response": "no " * 9 if f"{i}?" in others else "apples " * 9} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = (
        f"--task math --model {tmp_path / 'base'} --data {tmp_path / 'rows.jsonl'} --chat_template arm --dtype fp32 "
        "--batch_size 8 --rows_per_mean 4 --validation_share 0.2 --keep best --eval_every 2 --save_every 2 "
        "--max_steps 8 --keep_checkpoints 1 --learning_rate 0.003 --lr_schedule constant --lora_rank 4"
    ).split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert go("sft", *options, "--output_dir", whole) == (0, "")
    scored = {r["step"]: r["validation/loss"] for r in read_jsonl(whole / "metrics.jsonl") if "validation/loss" in r}
    best = min(scored, key=scored.get)
    assert list(scored) == [2, 4, 6, 8] and best < 8
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [f"step_{best:06d}", "step_000008"]
    state = json.loads((whole / "checkpoints/step_000008/state.json").read_text())["state"]["state"]
    assert state == {"best": {"step": best, "loss": scored[best]}}
    assert "Validation loss" in (whole / "report.html").read_text()

    shutil.copytree(whole, killed)  # as if killed before the last checkpoint: it goes on from the best one
    for path in (killed / "summary.json", killed / "model", killed / "checkpoints/step_000008"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert go("sft", *options, "--output_dir", killed) == (0, "")
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/step_000008/model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    code, error = go("sft", *options, "--output_dir", killed, "--eval_every", "4")
    assert code == 2 and "eval_every = 2, now it is 4" in error


# --- schedule, weight decay


def test_the_cosine_begins_behind_the_warm_up_and_has_a_floor():
    args = SimpleNamespace(lr_schedule="cosine", max_steps=110, learning_rate=2.0, warmup_steps=10,
                           cosine_from="warmup", min_learning_rate=0.5)  # fmt: skip
    assert [rate(args, step) for step in (1, 10, 11)] == [2.0, 2.0, 2.0]  # the learner multiplies by step / 10
    assert rate(args, 61) == pytest.approx(1.25)
    assert rate(args, 110) == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 0.99)))
    args.cosine_from = "start"
    assert rate(args, 56) == pytest.approx(1.25) and rate(args, 10) < 2.0


def options_of_learner(folder, **more) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(Args(output_dir=str(folder), dtype="fp32", gradient_checkpointing=False)), **more})


def test_norms_and_biases_without_weight_decay(tmp_path):
    """No gradient, so decay alone moves a weight: by the factor 1 - rate * decay, and norms and biases not at all."""
    args = options_of_learner(tmp_path, weight_decay=0.5, learning_rate=0.1)
    for whole in (True, False):
        learner = Learner(args, make_model(), make_accelerator(args), decay_vectors=whole)
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        (minibatch,) = learner.minibatches([episode(0, 3)], 1, 0)
        for mb in minibatch:
            learner.backward(learner.score(mb)[0].sum() * 0.0)
        learner.step(0.1)
        for name, p in learner.model.named_parameters():
            decayed = whole or p.dim() > 1
            assert torch.allclose(p, before[name] * (0.95 if decayed else 1.0)), name
    assert {p.dim() for p in learner.optimizer.param_groups[1]["params"]} == {1}


# --- control tokens


@pytest.mark.parametrize(
    "response, options, needed",
    [
        ("<short>\n\\boxed{1}", {}, ["<short>"]),
        ("<think>\na\n</think>\nb", {}, ["<think>", "</think>"]),
        ("a\n</think>\nb", {}, ["</think>"]),
        ("a\n</think>\nb", {"chat_template": "plain+think"}, ["<think>", "</think>"]),
        ("<ANSWER>1</ANSWER>", {"chat_template": "thinkless"}, ["</think>", "<think>", "<short>"]),
        ("<ANSWER>1</ANSWER>", {}, []),
    ],
)
def test_rows_whose_control_tokens_would_be_split(tmp_path, response, options, needed):
    """Training would go well, and the method or evaluation that is given the model would refuse it."""
    formats.tokenizer("arm").save_pretrained(tmp_path)
    args = Args(task="math", model=str(tmp_path), data="rows.jsonl", **options)
    found = needed_tokens(args, [Row(Question("a", "1+1", ""), response)])
    assert list(found) == needed
    if not needed:
        assert start_tokenizer(args, args.model, found)
        return
    with pytest.raises(UserError, match=f"{needed[0]}' as one token; it reads it as .* --control_tokens add"):
        start_tokenizer(args, args.model, found)


def test_a_laboratory_format_is_refused_before_it_is_trained(go, tmp_path):
    """A model of R1's kind has no `<short>`: nothing is loaded or written before the command says so."""
    make_folder(tmp_path / "base")
    code, error = go("sft", "--formats", "thinkless", "--model", tmp_path / "base", "--output_dir", tmp_path / "out",
                     "--dtype", "fp32")  # fmt: skip
    assert code == 2 and "--control_tokens add" in error and not (tmp_path / "out").exists()
