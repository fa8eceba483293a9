"""Checkpoints on disk: pieces of tensors, what a damaged file does to a resume, and what pruning may delete."""

import json
import os
import re
import shutil

import pytest
import torch
from distributed_worker import make_args, make_episodes, make_learner, train, weights, write_model
from safetensors.torch import load_file

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import load_checkpoint, prune, save_checkpoint, whole_checkpoint
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.tensors import Pieces, digest_of, write_tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(learner after two steps, tokenizer)."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_model(folder / "model", tied=True)
    learner = make_learner(path, make_args(folder))
    train(learner, make_episodes(), 2)
    return learner, load_model(path, learner.args)[1]


@pytest.fixture
def root(trained, tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    learner, tokenizer = trained
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / f"step_{step:06d}", learner, tokenizer, {"step": step})
    return tmp_path


def test_a_file_written_tensor_by_tensor_is_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7).bfloat16(), "c": torch.tensor(2.5), "d": torch.empty(0)}
    layout = [(name, t.dtype, t.shape) for name, t in tensors.items()]
    about = write_tensors(tmp_path / "x.safetensors", layout, iter(tensors.values()), {"adam_step": "4"})
    assert about == digest_of(tmp_path / "x.safetensors")
    opened = load_file(tmp_path / "x.safetensors")
    assert opened.keys() == tensors.keys() and all(torch.equal(opened[k], t) for k, t in tensors.items())
    assert Pieces([tmp_path / "x.safetensors"]).metadata == [{"format": "pt", "adam_step": "4"}]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_piece_of_what_any_number_of_processes_wrote(tmp_path, ranks):
    """Pieces as ZeRO-3 cuts them: equally long but for the last ones, which may be short or empty."""
    whole = torch.randn(5, 4)
    size = -(-whole.numel() // ranks)
    files = []
    for rank in range(ranks):
        piece = whole.reshape(-1)[rank * size : (rank + 1) * size]
        files.append(tmp_path / f"{rank}.safetensors")
        write_tensors(files[-1], [("w", piece.dtype, piece.shape)], [piece], {})
    pieces = Pieces(files)
    for start in range(20):
        for stop in range(start, 21):
            assert torch.equal(pieces.read("w", start, stop, 20), whole.reshape(-1)[start:stop])
    with pytest.raises(UserError, match="has 20 numbers for w, the model 21"):
        pieces.read("w", 0, 1, 21)


def test_a_piece_of_a_matrix_is_cut_within_its_rows(tmp_path):
    """A process that starts from weights of model/, which are whole matrices, reads the part that it will hold."""
    whole = torch.randn(6, 7).bfloat16()
    write_tensors(tmp_path / "m.safetensors", [("w", whole.dtype, whole.shape)], [whole], {})
    pieces = Pieces([tmp_path / "m.safetensors"])
    for start, stop in ((0, 42), (3, 5), (6, 8), (13, 30), (41, 42), (42, 42)):
        assert torch.equal(pieces.read("w", start, stop, 42), whole.reshape(-1)[start:stop].float())


def test_every_file_is_in_the_manifest_and_none_is_a_pickle(root):
    folder = root / "step_000003"
    there = {p.relative_to(folder).as_posix(): digest_of(p) for p in folder.rglob("*") if p.is_file()}
    there.pop("manifest.json")
    assert json.loads((folder / "manifest.json").read_text())["files"] == there
    assert {"model/model.safetensors", "model/tokenizer.json", "optimizer/rank_0.safetensors", "state.json"} <= set(
        there
    )
    assert {p.rpartition(".")[2] for p in there} <= {"json", "safetensors", "jinja"}


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def flipped(path):
    """One bit of the middle byte: the size stays, and the file still opens."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [
    (truncated, "model/model.safetensors", r"model\.safetensors has \d+ bytes, \d+ were written"),
    (flipped, "model/model.safetensors", r"model\.safetensors has changed since it was written"),
    (flipped, "optimizer/rank_0.safetensors", r"rank_0\.safetensors has changed since it was written"),
    (os.remove, "optimizer/rank_0.safetensors", r"rank_0\.safetensors is missing"),
    (truncated, "state.json", r"state\.json has \d+ bytes"),
    (flipped, "manifest.json", r"manifest\.json|has changed|were written|is missing"),
    (os.remove, "manifest.json", r"manifest\.json is missing"),
    (lambda path: path.write_text("[]"), "manifest.json", r"manifest\.json is not what was written"),
]


@pytest.mark.parametrize(("harm", "name", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, root, harm, name, message):
    learner, _ = trained
    harm(root / "step_000003" / name)
    folder, told = whole_checkpoint(root, learner.accelerator)
    assert folder == root / "step_000002" and len(told) == 1
    assert "step_000003.damaged and not used" in told[0]
    assert re.search(message, told[0]), told[0]
    assert sorted(p.name for p in root.iterdir()) == ["step_000001", "step_000002", "step_000003.damaged"]
    assert load_checkpoint(folder, learner)["step"] == 2


def test_damaged_ones_are_passed_over_until_none_is_left(trained, root):
    learner, _ = trained
    assert whole_checkpoint(root, learner.accelerator) == (root / "step_000003", [])
    for step in (3, 2):
        truncated(root / f"step_{step:06d}" / "state.json")
    folder, told = whole_checkpoint(root, learner.accelerator)
    assert folder == root / "step_000001" and len(told) == 2
    flipped(folder / "model" / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* is whole.*Restore one from a copy, or start a new run"):
        whole_checkpoint(root, learner.accelerator)
    assert whole_checkpoint(root / "nothing", learner.accelerator) == (None, [])


def test_pruning_spares_the_older_ones_while_the_newest_is_not_whole(root):
    truncated(root / "step_000003" / "model" / "model.safetensors")
    prune(root, keep=1)
    assert len(list(root.iterdir())) == 3
    shutil.rmtree(root / "step_000003")
    prune(root, keep=1)
    assert [p.name for p in root.iterdir()] == ["step_000002"]


def test_what_is_not_the_disks_fault_is_printed_where_it_happens(trained, tmp_path, capsys):
    """A bug while writing ends all ranks with a message; the traceback is on the rank that has it."""
    learner, _ = trained
    with pytest.raises(UserError, match="AttributeError"):
        save_checkpoint(tmp_path / "step_000001", learner, None, {})
    assert "Traceback" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_loading_takes_the_weights_and_moments_that_were_saved(trained, root):
    learner, _ = trained
    before = weights(learner), learner.optimizer.state_dict()
    moments = [{k: v.clone() for k, v in s.items()} for s in before[1]["state"].values()]
    train(learner, make_episodes(), 1, first=2)
    load_checkpoint(root / "step_000003", learner)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), weights(learner).values()))
    for old, new in zip(moments, learner.optimizer.state_dict()["state"].values(), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert learner.steps == 2
