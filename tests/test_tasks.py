"""Chains, prompts, control tokens, data order and options: small pure functions against hand-made values."""

import dataclasses
from types import SimpleNamespace

import docstring_parser
import numpy as np
import pytest
from transformers import AutoTokenizer

from adaptive_reasoning import formats
from adaptive_reasoning.adaptthink import Args
from adaptive_reasoning.core.intervals import accuracy_interval
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.run.evaluation import EvalSpec, compare, summarise
from adaptive_reasoning.run.options import RunArgs, parse_args
from adaptive_reasoning.sft import episodes_of, rate
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.task import ExactGrader, Task, load_task
from adaptive_reasoning.tasks.think_template import answer_behind


@pytest.fixture(scope="module")
def tokenizer():
    return formats.tokenizer("think")


# --- chains


def test_a_chain_is_worked_out_from_left_to_right_modulo_ten():
    assert chain.steps("3*7+4-9") == [("3*7=1", 1), ("1+4=5", 5), ("5-9=6", 6)]


def test_questions_hold_the_mix_exactly_and_repeat_with_the_seed():
    mix = "0.4,0.2,0.1,0.1,0.1,0.1"
    asked = chain.questions(60, mix, seed=3, name="x")
    levels = [q.difficulty for q in asked]
    assert {level: levels.count(level) for level in set(levels)} == {"1": 24, "2": 12, "3": 6, "4": 6, "5": 6, "6": 6}
    assert all(len(q.problem) == 2 * int(q.difficulty) + 1 for q in asked)
    assert asked == chain.questions(60, mix, seed=3, name="x") != chain.questions(60, mix, seed=4, name="x")
    assert levels != sorted(levels)


@pytest.mark.parametrize("mix", ["", "a,b", "-1,2", "0,0"])
def test_a_mix_that_is_none(mix):
    with pytest.raises(UserError, match="--chain_mix"):
        chain.parse_mix(mix)


def test_responses_are_right_in_the_eyes_of_the_grader_and_survive_the_tokenizer(tokenizer):
    rng = np.random.default_rng(0)
    for i in range(120):
        q = chain.make_question(rng, i % 6 + 1, "x")
        for mode in Think.modes:
            text = Think.response(q, mode, rng)
            assert answer_behind(text) == q.answer
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert prompts.decode(tokenizer, ids + [tokenizer.eos_token_id], (tokenizer.eos_token_id,)) == text
            assert (ids[0] == prompts.control_token(tokenizer, "</think>")) == (mode == "nothinking")


def test_thinking_opens_in_more_than_one_way():
    """Models open their thinking with various words; the forced one is only the most frequent."""
    rng = np.random.default_rng(0)
    q = chain.make_question(rng, 2, "x")
    openers = {Think.response(q, "thinking", rng).split(",")[0] for _ in range(60)}
    assert openers == {"Alright", "Okay"}


def test_the_tokenizer_folder_opens_the_same_in_both_ways(tokenizer, tmp_path):
    """AutoTokenizer rebuilds tokenizers beside a Qwen2 config; ours must survive that to be opened elsewhere."""
    chain.tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = prompts.prompt_text(tokenizer, "3*7+4") + "Okay, let me see.\n3*7=1\n</think>\n\\boxed{5}<|end|>"
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    for opened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert opened(text, add_special_tokens=False)["input_ids"] == want
        assert opened.decode(want) == text


# --- prompts


def test_prompts_end_in_an_opened_thinking_block(tokenizer):
    template = tokenizer.chat_template
    assert Think(tokenizer, None).prompt_lines["template"] == "ends in '<|Assistant|><think>\\n'"
    assert tokenizer.chat_template == template, "there is nothing to wrap"
    ids = prompts.render(tokenizer, "1+2")
    assert tokenizer.decode(ids) == "<|begin|><|User|>1+2<|Assistant|><think>\n"
    assert (
        ids.count(tokenizer.bos_token_id) == 1
    )  # the template brings it; a second one would be another model's prompt


def test_stop_tokens_join_tokenizer_and_generation_config(tokenizer):
    eos = tokenizer.eos_token_id
    assert prompts.stop_tokens(tokenizer) == (eos,)
    assert prompts.stop_tokens(tokenizer, SimpleNamespace(eos_token_id=[eos, 5])) == (eos, 5)
    with pytest.raises(UserError, match="no EOS token"):
        prompts.stop_tokens(SimpleNamespace(eos_token_id=None, name_or_path="x"))


def test_only_the_last_stop_token_is_left_out_of_the_text(tokenizer):
    eos, seven = tokenizer.eos_token_id, tokenizer.encode("7")[0]
    assert prompts.decode(tokenizer, [seven, eos], (eos,)) == "7"
    assert prompts.decode(tokenizer, [seven], (eos,)) == "7"
    assert prompts.decode(tokenizer, [], (eos,)) == ""


def test_long_prompts_are_left_out_and_counted(tokenizer):
    asked = [Question(str(i), p, "1") for i, p in enumerate(["1+1", "1+1+1+1+1+1", "2+2"])]
    kept, ids = prompts.fitting(asked, tokenizer, 9)
    assert [q.id for q in kept] == ["0", "2"] and all(len(p) <= 9 for p in ids)
    with pytest.raises(UserError, match="longer than --max_prompt_tokens 5: the shortest of 3 has 8"):
        prompts.fitting(asked, tokenizer, 5)


# --- data order


def test_an_epoch_is_a_permutation_and_its_rest_is_dropped():
    task = Task([Question(str(i), "", "") for i in range(10)], [[1]] * 10, 0)
    first = [i for step in (1, 2, 3) for i in task.batch(step, 3, seed=1)]
    second = [i for step in (4, 5, 6) for i in task.batch(step, 3, seed=1)]
    assert len(set(first)) == len(set(second)) == 9 and first != second
    assert task.batch(2, 3, seed=1) == first[3:6] and task.batch(2, 3, seed=2) != first[3:6]
    assert task.epoch(6, 3) == 2.0
    with pytest.raises(UserError, match="needs 11 questions, the training data has 10"):
        task.batch(1, 11, seed=0)


def test_the_evaluation_questions_do_not_change_with_the_seed(tokenizer):
    """Seeds of a run are compared on the same questions."""
    a, b = (load_task(Args(task="chain", seed=s), tokenizer) for s in (0, 1))
    assert a.benchmarks[0].questions == b.benchmarks[0].questions
    assert a.questions != b.questions


def test_exact_grader():
    with ExactGrader() as grader:
        grader.submit("7", "7", key=3)
        grader.submit("07", "7", key=4)
        assert {k: g.correct for k, g in grader.drain().items()} == {3: True, 4: False}
        assert grader.drain() == {}


# --- evaluation


MODES = ("thinking", "nothinking")


def test_summary_of_graded_responses():
    def row(question, mode, correct, tokens):
        level = str(question + 1)
        return {"question": question, "mode": mode, "difficulty": level, "correct": correct, "tokens": tokens}

    rows = [row(0, "nothinking", True, 6), row(1, "thinking", True, 40), row(0, "nothinking", False, 8)]
    rows.append(row(1, "nothinking", True, 6))
    assert summarise(rows, MODES) == {
        "accuracy": 3 / 4,
        "interval": accuracy_interval({0: [1, 0], 1: [1, 1]}),
        "questions": 2,
        "samples": 2,
        "pass_at": {"2": 1.0},
        "mean_tokens": 15.0,
        "modes": {
            "thinking": {"share": 1 / 4, "accuracy": 1.0, "mean_tokens": 40.0},
            "nothinking": {"share": 3 / 4, "accuracy": 2 / 3, "mean_tokens": 20 / 3},
        },
        "by_difficulty": {  # one question each: no interval
            "1": {"accuracy": 0.5, "interval": None, "mean_tokens": 7.0, "modes": {"thinking": 0, "nothinking": 1}},
            "2": {"accuracy": 1.0, "interval": None, "mean_tokens": 23.0, "modes": dict.fromkeys(MODES, 0.5)},
        },
    }
    assert summarise(rows[::-1], MODES) == summarise(rows, MODES), "processes hand their rows over in any order"
    alone = summarise(rows[:1], MODES)
    assert alone["modes"]["thinking"] == {"share": 0.0, "accuracy": None, "mean_tokens": None}
    assert alone["pass_at"] == {} and alone["samples"] == 1


def test_settings_are_compared_question_by_question():
    """Four questions: thinking is right on all, skipping on two; the model skips the first and the last."""
    spec = EvalSpec({"adaptive": (), "think": ((1, 1.0),), "skip": ((2, 1.0),), "own_prompt": ()}, None, None, {})

    def rows(modes: str, right) -> list[dict]:
        of = {"t": ("thinking", 40), "n": ("nothinking", 5)}
        names = ("question", "mode", "tokens", "correct")
        return [dict(zip(names, (i, *of[m], r))) for i, (m, r) in enumerate(zip(modes, right))]

    thought, skipped = rows("tttt", (1, 1, 1, 1)), rows("nnnn", (1, 1, 0, 0))
    graded = {"adaptive": rows("nttn", (1, 1, 1, 0)), "think": thought, "skip": skipped, "own_prompt": thought}
    results = {setting: {} for setting in graded}
    compare(results, graded, spec)
    assert {s: r["paired"]["difference"] for s, r in results.items() if s != "adaptive"} == {
        "think": -0.25, "skip": 0.25, "own_prompt": -0.25
    }  # fmt: skip
    # Better is to skip 0 and 1 (both right, fewer tokens) and to think on 2 and 3: the model was right about 0 and 2.
    assert results["adaptive"]["hybrid"]["accuracy"] == 0.5
    assert results["adaptive"]["hybrid"]["better"] == {"thinking": 0.5, "nothinking": 0.5}
    alone = {"think": {}}
    compare(alone, {"think": graded["think"]}, spec)
    assert alone == {"think": {}}


# --- cold start


def test_most_direct_rows_do_not_teach_the_choice_to_skip_thinking(tokenizer):
    from adaptive_reasoning.sft import Args as SftArgs

    args = SftArgs(nothinking_rows=0.5, nothinking_supervised=0.1)
    rows = Think.rows(args, np.random.default_rng(0), 2000, step=1)
    direct = [r for r in rows if r.response.startswith("</think>")]
    assert 0.45 < len(direct) / 2000 < 0.55
    assert 0.05 < sum(r.start == 0 for r in direct) / len(direct) < 0.16
    assert all(r.start == 0 for r in rows if not r.response.startswith("</think>"))
    e = episodes_of([r for r in direct if r.start][:1], tokenizer, 100)[0]
    assert e.action_mask.tolist() == [False] + [True] * (e.num_tokens - 1)
    assert e.response_ids[-1] == tokenizer.eos_token_id  # EOS is taught: a model that cannot stop is of no use


def test_cosine_schedule():
    args = SimpleNamespace(lr_schedule="cosine", max_steps=100, learning_rate=2.0, warmup_steps=0,
                           cosine_from="warmup", min_learning_rate=0.0)  # fmt: skip
    assert rate(args, 1) == 2.0
    assert rate(args, 51) == pytest.approx(1.0)
    assert 0 < rate(args, 100) < 0.002
    args.lr_schedule = "constant"
    assert rate(args, 70) == 2.0


# --- options


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 2e-6\ndelta: 0.1\ngradient_checkpointing: false\nmax_steps: 7\n")
    args = parse_args(Args, ["--config", str(path), "--delta", "0.2", "--seed", "5"])
    assert (args.learning_rate, args.delta, args.gradient_checkpointing, args.max_steps, args.seed) == (
        2e-6, 0.2, False, 7, 5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("detla: 1\n", "unknown option 'detla'. Did you mean 'delta'"),
        ("max_steps: many\n", "--max_steps: Not of type PositiveInt: invalid literal for int() with base 10: 'many'"),
        ("max_steps: 1.5\n", "--max_steps: Not of type PositiveInt: 1.5 not an integer"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad.yaml") as error:
        parse_args(Args, ["--config", str(path)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "nowhere.yaml"], "no such file"),
        (["--max_stepz", "3"], "unknown option --max_stepz. Did you mean '--max_steps'"),
        (["--max_steps", "0"], "--max_steps: Not of type PositiveInt: 0 does not conform to restriction v>0"),
        (
            ["--learning_rate", "inf"],
            "--learning_rate: Not of type Positive: inf does not conform to restriction v>0 and v<inf",
        ),
        (["--temperature", "-1"], "--temperature: Not of type Positive: -1 does not conform to restriction v>0"),
        (["--dtype", "fp16"], "--dtype: Expected a Literal['bf16', 'fp32']. Got value: fp16"),
        (
            ["--eval_top_p", "0"],
            "--eval_top_p: Not of type PositiveShare: 0 does not conform to restriction v>0 and v<=1",
        ),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(UserError) as error:
        parse_args(Args, argv)
    assert message in str(error.value)


def test_every_option_is_documented():
    bases = [base for base in reversed(Args.__mro__) if dataclasses.is_dataclass(base)]
    params = [param for base in bases for param in docstring_parser.parse_from_object(base).params]
    docs = {param.arg_name: param.description for param in params}
    names = {f.name for f in dataclasses.fields(Args)}
    assert all(len(docs.get(name, "")) > 10 for name in names)
    assert {f.name for f in dataclasses.fields(RunArgs)} <= names
