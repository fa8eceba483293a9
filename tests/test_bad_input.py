"""Bad input: what users get wrong and the message each of them gets (bad_input.yaml); code 2, nothing half-written.

A case runs a command in this process: starting Python a hundred times would be most of the time otherwise. What the
command line makes of a UserError is tested with real processes in test_end_to_end.py.
"""

import gzip
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_model import make_folder

from adaptive_reasoning.errors import run_cli

ROOT = Path(__file__).parent.parent
SMALL = (
    "--prompts_per_step 4 --num_generations 4 --ref_samples 1 --max_new_tokens 12 --nothinking_max_new_tokens 8 "
    "--grader_workers 1 --rollout_rows 32 --tokens_per_micro_batch 2048 --eval_data= --dtype fp32 --max_steps 1"
)
GOOD = '{"problem": "1+1", "answer": "2"}\n'
FILES = {  # name -> content of a broken file
    "empty.jsonl": b"",
    "no_json.jsonl": GOOD + "{not json\n",
    "list.jsonl": GOOD + "[1, 2]\n",
    "no_answer.jsonl": GOOD + '{"problem": "2+2"}\n',
    "no_problem.jsonl": '{"answer": "2"}\n',
    "empty_problem.jsonl": '{"problem": " ", "answer": "2"}\n',
    "wrong_type.jsonl": '{"problem": ["1+1"], "answer": "2"}\n',
    "no_number.jsonl": '{"problem": "1+1", "answer": "it is\\n#### "}\n',
    "no_box.jsonl": '{"problem": "1+1", "solution": "it is 2"}\n',
    "choices.jsonl": '{"question": "which?", "choices": "a, b", "answerKey": "A"}\n',
    "columns.csv": "question,option_a,option_b,answer\nwhich?,a,b,A\n",
    "letter.jsonl": '{"question": "which?", "options": ["a", "b"], "answer": "C"}\n',
    "place.jsonl": '{"question": "which?", "options": ["a", "b"], "answer": 1}\n',
    "nan.jsonl": '{"problem": "1+1", "answer": NaN}\n',
    "half.jsonl": '{"problem": "p \\ud83d?", "answer": "2"}\n',
    "twice.jsonl": '{"problem": "1+1", "Problem": "1+1", "answer": "2"}\n',
    "semicolons.csv": "Problem;Answer\n1+1;2\n",
    "comma.csv": "problem,answer\n1,1?,2\n",
    "cut.jsonl.gz": gzip.compress(GOOD.encode())[:-9],
    "latin1.jsonl": GOOD.encode() + '{"problem": "café", "answer": "1"}\n'.encode("latin-1"),
    "few.jsonl": GOOD,
    "no.parquet": GOOD,
    "unknown.yaml": "detla: 0.1\n",
    "list.yaml": "- delta\n- 0.1\n",
    "types.yaml": "max_steps: many\n",
    "range.yaml": "adam_beta1: 1\n",
    "none.yaml": "model:\n",
    "bool.yaml": "max_steps: true\n",
    "syntax.yaml": "delta: [0.1\n",
    "latin1.yaml": "output_dir: caf\xe9\n".encode("latin-1"),
    "ref_layout.json": '{"problem": "1+1"}',
    "ref_rows.json": '[{"problem": "1+1", "answer": "2"}]',
    "ref_short.json": '[{"problem": "1+1", "metrics": {"avg_acc_thinking": 0.5}}]',
    "ref_broken.json": "[{",
    "sft_no_response.jsonl": '{"problem": "1+1"}\n',
    "sft_row.jsonl": '{"problem": "1+1", "response": "2"}\n' * 3,
}


OPENED = {"metrics.json", "config.yaml", ".lock"}  # what opening the folder of a run writes


def change_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def change_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap_tokens(path: Path) -> None:
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    path.write_text(json.dumps(content))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def make_parquet(path: Path) -> None:
    """Write a table of questions without their answers."""
    from pyarrow import parquet, table

    parquet.write_table(table({"problem": ["1+1"], "points": [3]}), path)


def more_tokens(folder: Path) -> None:
    """Add a token to the tokenizer that the model has no row for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.vocab_size -= 2  # the last two are <think> and </think>
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


MODELS = {  # name -> what is broken in a copy of the model folder
    "no_config": lambda f: (f / "config.json").unlink(),
    "no_json_config": lambda f: (f / "config.json").write_text("{"),
    "no_weights": lambda f: (f / "model.safetensors").unlink(),
    "cut_weights": lambda f: cut(f / "model.safetensors", 5000),
    "no_tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
    "no_template": lambda f: (f / "chat_template.jinja").unlink(),
    "no_think": lambda f: change_text(f / "chat_template.jinja", "<think>", ""),
    "split_token": lambda f: change_text(f / "tokenizer.json", '"</think>"', '"</thought>"'),
    "broken_template": lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}"),
    "small_vocabulary": more_tokens,
    "gpt2": lambda f: change_json(f / "config.json", model_type="gpt2"),
    "sliding": lambda f: change_json(f / "config.json", use_sliding_window=True),
    "rope": lambda f: change_json(
        f / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "other_token": lambda f: swap_tokens(f / "tokenizer.json"),
    "other_template": lambda f: change_text(f / "chat_template.jinja", "{{ bos_token }}", "{{ bos_token }}Hi."),
    "gelu": lambda f: change_json(f / "config.json", hidden_act="gelu"),
}
BEGUN = {  # name -> what is broken in a copy of the folder of a run
    "as_it_is": lambda f: None,
    "grpo": lambda f: change_text(f / "config.yaml", "algorithm: adaptthink", "algorithm: grpo"),
    "config": lambda f: (f / "config.yaml").write_text("delta: ["),
    "config_list": lambda f: (f / "config.yaml").write_text("- delta\n"),
    "metrics": lambda f: (f / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew\n{"step": 1}\n'),
    "no_step": lambda f: (f / "metrics.jsonl").write_text('{"stepp": 0}\n'),
    "no_table": lambda f: (f / "reference.json").unlink(),
    "broken_table": lambda f: (f / "reference.json").write_text("{"),
    "no_checkpoint": lambda f: shutil.rmtree(f / "checkpoints"),
    "ten_steps": lambda f: (f / "checkpoints" / "step_000001").rename(f / "checkpoints" / "step_000010"),
}

CASES = yaml.safe_load((Path(__file__).parent / "bad_input.yaml").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the good and the broken inputs."""
    tmp = tmp_path_factory.mktemp("bad")
    data = make_folder(tmp / "model")
    paths = SimpleNamespace(tmp=tmp, model=tmp / "model", data=data, files=tmp / "files", run=tmp / "out" / "run")
    paths.files.mkdir()
    make_parquet(paths.files / "columns.parquet")
    rows = [json.loads(line) | {"answer": "7"} for line in data.read_text().splitlines()]
    (paths.files / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"problem": r["problem"], "metrics": {"avg_acc_thinking": "high"}} for r in rows]
    (paths.files / "ref_value.json").write_text(json.dumps(rows))
    for name, content in FILES.items():
        (paths.files / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


@pytest.fixture(scope="module")
def begun(place):
    """A run of one step with its checkpoint."""
    argv, sys.argv = sys.argv, ["adaptthink", *base(place), "--output_dir", str(place.tmp / "one_step")]
    try:
        run_cli(importlib.import_module("adaptive_reasoning.adaptthink").main)
    finally:
        sys.argv = argv
    return place.tmp / "one_step"


def base(place) -> list[str]:
    options = f"--model {place.model} --data {place.data} --ref_cache {place.tmp / 'ref'} {SMALL}"
    return ["--config", str(ROOT / "experiments/adaptthink_1_5b.yaml"), *options.split()]


def swap(place, name: str):
    """Put another file or model in the place of the good one; return what undoes it."""
    if name == "other_data":
        old = place.data.read_bytes()
        shutil.copy(place.files / "other.jsonl", place.data)
        return lambda: place.data.write_bytes(old)
    changed = place.model / {"other_token": "tokenizer.json", "other_template": "chat_template.jinja"}[name]
    old = changed.read_bytes()
    MODELS[name](place.model)
    return lambda: changed.write_bytes(old)


def contents(folder: Path | None) -> dict[Path, bytes]:
    """Return {path: content} of a run's files, apart from what opening it writes again."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in OPENED] if folder else []
    return {p: p.read_bytes() for p in files}


def command_of(place, module: str, options: str) -> list[str]:
    """Return the command line: for the training of the small model what works, and then what is wrong."""
    if module == "adaptthink":
        return [*base(place), "--output_dir", str(place.run), *options.split()]
    return ["--output_dir", str(place.run), "--dtype", "fp32", *options.split()]


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_and_how_to_mend_it(place, name, monkeypatch, capsys, request):
    options, message, module = CASES[name]["options"], CASES[name]["message"], CASES[name].get("command", "adaptthink")
    words = {k: str(v) for k, v in vars(place).items()} | {"root": str(ROOT)}
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ADAPTIVE_REASONING_DATA", raising=False)
    shutil.rmtree(place.tmp / "out", ignore_errors=True)
    kept = None
    for word in options.split():
        if word.startswith("{model:"):  # a broken copy of the model
            which = word[7:-1]
            copy = place.tmp / "models" / which
            if not copy.exists():
                shutil.copytree(place.model, copy)
                MODELS[which](copy)
            options = options.replace(word, str(copy))
            words["copy"] = str(copy)
        if word.startswith("{begun:"):  # a broken copy of a run
            kept = place.tmp / "out" / "begun"
            shutil.copytree(request.getfixturevalue("begun"), kept)
            BEGUN[word[7:-1]](kept)
            options = options.replace(word, f"--output_dir {kept}")
            words["begun"] = str(kept)
        if word.startswith("{now:"):  # model or data are no longer what the run was begun with
            request.getfixturevalue("begun")
            request.addfinalizer(swap(place, word[5:-1]))
            options = options.replace(word, "")
    before = contents(kept)
    capsys.readouterr()
    argv = [module, *command_of(place, module, options.format(**words))]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        run_cli(importlib.import_module(f"adaptive_reasoning.{module}").main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for word in sorted(words, key=lambda word: -len(words[word])):
        error = error.replace(words[word], "{" + word + "}") if words[word] else error
    found = error[error.rindex("error: ") + 7 :].strip()
    assert found == message if not message.endswith("...") else found.startswith(message[:-3])
    assert {p.name for p in place.run.rglob("*")} <= OPENED, "nothing is written before all was checked"
    assert contents(kept) == before
