"""Merging: the mean against mergekit and the exact numbers (tests/golden), two folders end to end, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from adaptive_reasoning import formats, merge
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.merge import Source, name_of, parse_weights, shards

GOLDEN = json.loads((Path(__file__).parent / "golden" / "merge.json").read_text())["cases"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_mean_equals_the_exact_one_and_mergekits(case):
    """Bit for bit the exact mean rounded once; mergekit rounds its weights and products to bfloat16 too."""
    inputs, want = case["inputs"], case["expected"]
    dtype = getattr(torch, inputs["dtype"])
    a, b = inputs.get("weights") or (inputs["weight"], 1 - inputs["weight"])
    scale = 1.0 if inputs.get("normalize", True) else a + b  # mergekit's sum of products; ours is a mean
    for name, rows in inputs["reasoner"].items():
        x, y = (torch.tensor(t, dtype=dtype) for t in (rows, inputs["other"][name]))
        if len(x) != len(y):
            x, y = x[: len(y)], y[: len(x)]  # --rows cut
        found = merge.merge(x, y, inputs.get("weight", a / (a + b)))
        assert found.dtype == dtype
        far = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 2e-2}
        for method in {"linear", "task_arithmetic", "average"} & want.keys():
            torch.testing.assert_close(found * scale, torch.tensor(want[method][name], dtype=dtype), **far)
        if "exact_rounded" in want:
            assert torch.equal(found, torch.tensor(want["exact_rounded"][name], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends_and_the_model_with_itself_are_bit_for_bit(dtype):
    """-0.0 too, whose sign a sum with 0 x other loses; 0.7 a + 0.3 a is not always a in fp32."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5000).to(dtype)
    a[:2], b[:2] = torch.tensor([-0.0, 0.0]), torch.tensor([1.0, -1.0])
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    assert torch.equal(merge.merge(a, b, 1.0).view(bits), a.view(bits))
    assert torch.equal(merge.merge(a, b, 0.0).view(bits), b.view(bits))
    for w in (0.1, 0.3, 0.5, 0.7):
        assert torch.equal(merge.merge(a, a.clone(), w).view(bits), a.view(bits))


def test_weights_and_their_folders():
    assert [name_of(w) for w in parse_weights("0.7,0.5,1,0")] == ["w0.7", "w0.5", "w1", "w0"]
    for text in ("", "x", "0.7,", "1.1", "-0.1", "nan", "0.7,0.70"):
        with pytest.raises(UserError, match="takes numbers from 0 to 1"):
            parse_weights(text)


# --------------------------------------------------------------------------------------------------- folders


def save(folder: Path, tied: bool = False, seed: int = 0, vocab: int = 320) -> Path:
    """Write a small bf16 model folder with the laboratory's tokenizer of 304 tokens."""
    torch.manual_seed(seed)
    sizes = {**BASE, "num_hidden_layers": 2, "vocab_size": vocab, "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.normal_(0.0, 0.3)
    model.generation_config.temperature, model.generation_config.do_sample = 0.1 + seed / 10, True
    model.save_pretrained(folder)
    tokenizer = formats.tokenizer("think")
    tokenizer.chat_template += f"{{# {seed} #}}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An untied reasoner and a tied other model, as R1-Distill-Qwen-1.5B and Qwen2.5-Math-1.5B are."""
    folder = tmp_path_factory.mktemp("two")
    return save(folder / "reasoner"), save(folder / "other", tied=True, seed=1)


def test_two_folders_end_to_end(two, go, tmp_path, monkeypatch):
    """Ended while it writes the second weight; the same command again keeps the first and makes the second."""
    reasoner, other = two
    out, whole = tmp_path / "out", merge.merged
    options = ["--model", reasoner, "--other", other, "--weight", "0.7,0.25", "--output_dir", out]

    def ends(*args):
        for number, tensor in enumerate(whole(*args)):
            if args[3] == 0.25 and number == 5:
                raise MemoryError  # nothing tidies up behind it, as behind a kill
            yield tensor

    monkeypatch.setattr(merge, "merged", ends)
    with pytest.raises(MemoryError):
        go("merge", *options)
    monkeypatch.undo()
    assert {p.name for p in out.iterdir()} == {"w0.7", "w0.25.partial", "config.yaml", ".lock"}
    first = (out / "w0.7" / "model.safetensors").stat().st_mtime_ns
    assert go("merge", *options) == (0, "")
    assert {p.name for p in out.iterdir()} == {"w0.7", "w0.25", "config.yaml", ".lock"}
    assert (out / "w0.7" / "model.safetensors").stat().st_mtime_ns == first

    a, b = load_file(reasoner / "model.safetensors"), load_file(other / "model.safetensors")
    assert HEAD in a and HEAD not in b
    b[HEAD] = b[EMBED]  # written out before the mean: neither the reasoner's alone nor none
    for w in (0.7, 0.25):
        folder = out / f"w{w}"
        found = load_file(folder / "model.safetensors")
        assert found.keys() == a.keys()
        for name, tensor in found.items():
            want = (w * a[name].double() + (1 - w) * b[name].double()).bfloat16()
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, want), name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert not model.config.tie_word_embeddings and torch.equal(model.lm_head.weight, found[HEAD])
        assert model.generation_config.temperature == pytest.approx(0.1), "the reasoner's"
        assert load_tokenizer(str(folder)).chat_template.endswith("{# 0 #}")


def test_ends_are_the_inputs_files(two, go, tmp_path):
    reasoner, other = two
    assert go("merge", "--model", reasoner, "--other", other, "--weight", "1,0", "--output_dir", tmp_path) == (0, "")
    a, b = load_file(reasoner / "model.safetensors"), load_file(other / "model.safetensors")
    b[HEAD] = b[EMBED]
    for folder, want in (("w1", a), ("w0", b)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(found[name], want[name]) for name in want) and found.keys() == want.keys()


def test_tied_with_untied_and_tied_with_tied(two, go, tmp_path):
    """A tied reasoner is written out too; two tied models stay tied, whatever a file has for the output embedding."""
    untied, tied = two
    more = shutil.copytree(tied, tmp_path / "more")
    tensors = load_file(tied / "model.safetensors")
    save_file(tensors | {HEAD: torch.zeros_like(tensors[EMBED])}, more / "model.safetensors", {"format": "pt"})
    assert go("merge", "--model", tied, "--other", untied, "--output_dir", tmp_path / "a") == (0, "")
    head = load_file(tmp_path / "a" / "w0.7" / "model.safetensors")[HEAD]
    want = 0.7 * tensors[EMBED].double() + (1 - 0.7) * load_file(untied / "model.safetensors")[HEAD].double()
    assert torch.equal(head, want.bfloat16())
    assert json.loads((tmp_path / "a" / "w0.7" / "config.json").read_text())["tie_word_embeddings"] is False
    assert go("merge", "--model", tied, "--other", more, "--output_dir", tmp_path / "b") == (0, "")
    found = load_file(tmp_path / "b" / "w0.7" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "b" / "w0.7" / "config.json").read_text())["tie_word_embeddings"] is True


def test_shards_in_and_out_and_one_tensor_at_a_time(two, go, tmp_path, monkeypatch):
    """Shards of 60 kB; blocks of three rows; the tensors of a file have one tensor's memory."""
    reasoner, other = two
    parts = tmp_path / "parts"
    shutil.copytree(other, parts, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(other, dtype="auto").save_pretrained(parts, max_shard_size="40kB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    monkeypatch.setattr(merge, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(merge, "BLOCK", 3 * 64)
    whole, places = merge.merged, []

    def merged(*args):
        for tensor in whole(*args):
            places.append((args[2][0].name, tensor.data_ptr()))
            yield tensor

    monkeypatch.setattr(merge, "merged", merged)
    out = tmp_path / "out"
    assert go("merge", "--model", reasoner, "--other", parts, "--output_dir", out / "parts") == (0, "")
    monkeypatch.undo()
    assert len(list((out / "parts" / "w0.7").glob("*.safetensors"))) > 2 and len(places) == 27
    assert len(set(places)) == len({first for first, _ in places}) > 2
    assert go("merge", "--model", reasoner, "--other", other, "--output_dir", out / "one") == (0, "")
    one, many = (AutoModelForCausalLM.from_pretrained(out / name / "w0.7").state_dict() for name in ("one", "parts"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((out / "parts" / "w0.7" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()


def test_wider_types_come_first_in_a_file():
    entries = [merge.Entry(name, dtype, (3,)) for name, dtype in (("a", torch.bfloat16), ("b", torch.float32))]
    assert [[e.name for e in part] for part in shards(entries)] == [["b", "a"]], "b would begin at byte 6 of 18"


def test_rows_are_cut_where_that_is_asked_for(two, go, tmp_path):
    reasoner, _ = two
    longer = save(tmp_path / "longer", seed=1, vocab=340)
    options = ["--model", longer, "--other", reasoner, "--output_dir", tmp_path / "out"]
    code, error = go("merge", *options)
    assert code == 2 and f"{HEAD} is [340, 64] in {longer}/model.safetensors" in error.replace(EMBED, HEAD)
    assert "--rows cut" in error and not (tmp_path / "out").exists()
    assert go("merge", *options, "--rows", "cut") == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "w0.7")
    assert model.config.vocab_size == 320 and model.lm_head.weight.shape == (320, 64)


# ------------------------------------------------------------------------------------------------------- refusals


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    vocab = json.loads(text)["model"]["vocab"]
    added = {token["content"] for token in json.loads(text)["added_tokens"]}
    first = min(vocab.keys() - added, key=vocab.get)
    swapped = json.loads(text)
    swapped["model"]["vocab"] = {("€" if token == first else token): i for token, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(swapped))


NORM = "model.norm.weight"
REFUSED = {
    "tensor missing": (
        lambda f: change_tensors(f, lambda t: t.pop(NORM)),
        f"{NORM} is in .*reasoner/model.safetensors .*--other .*other has no such tensor",
    ),
    "one too many": (
        lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(2))),
        "extra is in .*other/model.safetensors .*--model .*has no such tensor",
    ),
    "untied without an output embedding": (
        lambda f: change_json(f / "config.json", tie_word_embeddings=False),
        f"{HEAD} is in .*reasoner/model.safetensors",
    ),
    "shape": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(65)})),
        rf"{NORM} is \[64\] in .*reasoner/model.safetensors .*, \[65\] in .*other/model.safetensors .*merged\.$",
    ),
    "type": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        f"{NORM} in .*other/model.safetensors .* is I8",
    ),
    "heads": (lambda f: change_json(f / "config.json", num_attention_heads=8, num_key_value_heads=4),
              "num_attention_heads is 4 in --model .*, 8 in --other"),
    "tokens": (other_token, "token \\d+ is .* in the tokenizer of --model .*, '€' in that of --other"),
    "family": (lambda f: change_json(f / "config.json", model_type="qwen3"), "model_type is 'qwen2' .*'qwen3'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "--other .*: no safetensors there"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is missing or damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "--other .*the folder has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name, two, go, tmp_path):
    damage, message = REFUSED[name]
    shutil.copytree(two[1], tmp_path / "other")
    damage(tmp_path / "other")
    code, error = go("merge", "--model", two[0], "--other", tmp_path / "other", "--output_dir", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    pytest.raises(UserError, lambda: (_ for _ in ()).throw(UserError(error.strip()))).match(message)


def test_a_folder_of_something_else_is_left_alone(two, go, tmp_path, monkeypatch):
    options = ["--model", two[0], "--other", two[1], "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    code, error = go("merge", *options)
    assert code == 2 and "1 x 0.00 GB are to be written" in error
    monkeypatch.undo()
    assert go("merge", *options) == (0, "")
    code, error = go("merge", *options[:3], two[0], *options[4:])
    assert code == 2 and "holds a run with other = " in error
    changed = shutil.copytree(two[1], tmp_path / "changed")
    options[3] = changed
    assert go("merge", *options[:5], tmp_path / "again") == (0, "")
    change_tensors(changed, lambda t: t[NORM].add_(1))
    code, error = go("merge", *options[:5], tmp_path / "again", "--weight", "0.7,0.5")
    assert code == 2 and f"--other {changed} has changed since" in error
    code, error = go("merge", "--preflight")
    assert code == 2 and "one tensor at a time" in error


def test_an_index_that_names_what_is_not_there(two, tmp_path):
    shutil.copytree(two[1], tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "other" / "part.safetensors")
    index = tmp_path / "other" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "part.safetensors", "ghost": "part.safetensors"}}))
    with pytest.raises(UserError, match="part.safetensors lacks ghost, which the index says"):
        Source("--other", str(tmp_path / "other"))
