"""Episodes into minibatches and micro-batches: nothing lost, nothing doubled, every index where it belongs."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed_worker import make_episodes

from adaptive_reasoning.learner.packing import draw, fill, filler, group_chunks, pack
from adaptive_reasoning.run.metrics import Drift


def tiny(prompt, response, **changes):
    """Return one episode with the given token ids."""
    episode = make_episodes(1)[0]
    episode.prompt_ids, episode.response_ids = torch.tensor(prompt), torch.tensor(response)
    episode.behaviour_logprobs = -torch.arange(1.0, len(response) + 1)
    episode.action_mask = torch.ones(len(response), dtype=torch.bool)
    episode.forced = ~episode.action_mask
    for name, value in changes.items():
        setattr(episode, name, value)
    return episode


def test_pack_by_hand():
    """The example of the docstring, with one token that is no action and one that was forced."""
    first = tiny([5], [8, 9, 3], advantage=2.0, action_mask=torch.tensor([True, False, True]))
    second = tiny([6, 7], [1], advantage=-1.0, forced=torch.tensor([True]), old_logprobs=torch.tensor([-0.5]))
    mb = pack([first, second])
    assert mb.input_ids.tolist() == [[5, 8, 9, 3], [6, 7, 1, 0]] and mb.position_ids is None
    assert mb.predict_index.tolist() == [0, 2, 5] and mb.targets.tolist() == [8, 3, 1]
    assert mb.sequence.tolist() == [0, 0, 1] and mb.position.tolist() == [0, 2, 0]
    assert mb.lengths.tolist() == [2, 1] and mb.forced.tolist() == [False, False, True]
    assert mb.behaviour_logprobs.tolist() == [-1.0, -3.0, -1.0] and mb.old_logprobs.tolist() == [-1.0, -3.0, -0.5]
    assert mb.advantages.tolist() == [2.0, 2.0, -1.0] and mb.sequence_advantages.tolist() == [2.0, -1.0]
    assert mb.weight == 1.0

    row = pack([first, second], one_row=True)
    assert row.input_ids.tolist() == [[5, 8, 9, 3, 6, 7, 1]] and row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.predict_index.tolist() == [0, 2, 5] and row.targets.tolist() == [8, 3, 1]


@pytest.mark.parametrize("one_row", [False, True])
def test_each_target_is_the_token_after_its_predicting_position(one_row):
    mb = pack(make_episodes(12), one_row=one_row)
    flat = mb.input_ids.flatten()
    assert torch.equal(flat[mb.predict_index + 1], mb.targets)
    assert len(mb.targets) == sum(int(e.action_mask.sum()) for e in mb.episodes) == int(mb.lengths.sum())


def test_eos_is_scored_even_if_it_equals_the_padding_id():
    """A mask made from token values would drop it, and the policy would never learn to stop."""
    mb = pack([tiny([4, 4], [7, 0]), tiny([4], [7, 7, 7, 0])])
    assert mb.targets.tolist() == [7, 0, 7, 7, 7, 0]


@pytest.mark.parametrize("one_row", [False, True])
def test_fill_keeps_the_budget_and_every_episode(one_row):
    episodes = make_episodes(40)
    batches = fill(episodes, 60, one_row)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, episodes))
    for batch in batches:
        mb = pack(batch, one_row=one_row)
        assert mb.input_ids.numel() <= 60
    assert len(batches) < 20, "several episodes have to share a micro-batch"


@pytest.mark.parametrize("one_row", [False, True])
def test_episode_longer_than_the_budget_is_a_micro_batch_of_its_own(one_row):
    long, short = tiny([1] * 50, [2] * 50), [tiny([1], [2]) for _ in range(3)]
    batches = fill([*short, long], 10, one_row)
    assert [len(b) for b in batches] == [1, 3] and batches[0][0] is long


def test_fill_breaks_ties_by_order():
    episodes = [tiny([1], [2, 3]) for _ in range(5)]
    assert [id(e) for b in fill(episodes, 6, False) for e in b] == [id(e) for e in episodes]


def test_group_chunks_deal_all_groups_evenly_and_by_seed():
    chunks = group_chunks(10, 3, seed=1)
    assert sorted(np.bincount(chunks).tolist()) == [3, 3, 4]
    assert (chunks == group_chunks(10, 3, seed=1)).all() and (chunks != group_chunks(10, 3, seed=2)).any()
    assert group_chunks(4, 1, seed=5).tolist() == [0, 0, 0, 0]


def seen(mb, logprobs) -> Drift:
    drift = Drift()
    drift.see(mb, logprobs, first_update=True)
    return drift


def test_filler_has_no_tokens_and_sums_to_zero():
    mb = filler()
    assert mb.weight == 0.0 and mb.input_ids.shape == (1, 1)
    mean = torch.zeros(0).index_add(0, mb.sequence, mb.old_logprobs) / mb.lengths
    assert float((mean.exp() * mb.sequence_advantages).sum()) == 0.0
    assert mb.column("values").shape == (0,)
    assert seen(mb, mb.old_logprobs) == Drift()


def test_logprob_gap_leaves_forced_tokens_out():
    mb = pack([tiny([5], [8, 9, 3], forced=torch.tensor([True, False, False]))])
    drift = seen(mb, torch.tensor([50.0, -2.25, -2.5]))
    assert (drift.gap_sum, drift.gap_tokens, drift.gap_max) == (0.75, 2, 0.5)


def test_ratios_and_divergence_leave_forced_tokens_out():
    """A first token forced against p = 0.005 had raised the alarm of a policy that moves too far, from step 1."""
    mb = pack([tiny([5], [8, 9, 3], forced=torch.tensor([True, False, False]))])
    logprobs = mb.old_logprobs + torch.tensor([-4.6, math.log(2), -math.log(2)])
    drift = seen(mb, logprobs)
    assert (drift.ratio_sum, drift.ratio_tokens, drift.ratio_max) == pytest.approx((2.5, 2, 2.0))
    assert drift.kl == pytest.approx((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)))


def adaptthink_lengths(number: int) -> list[int]:
    """Half NoThinking, half thinking, both log-normal (quantiles, so always the same), with a prompt of 150 tokens."""
    z = [NormalDist().inv_cdf((i + 0.5) / (number // 2)) for i in range(number // 2)]
    thinking = [min(16_384, 5000 * math.exp(0.6 * x)) for x in z]
    return [150 + int(T) for T in thinking + [min(4096, 600 * math.exp(0.6 * x)) for x in z]]


@pytest.mark.parametrize("number, most", [(128, 0.09), (256, 0.05), (2048, 0.01)])
def test_padding_of_rows_sorted_by_length_is_small(number, most):
    """Why rows are not packed where flash-attn is missing: the figures that `pack` names."""
    episodes = [SimpleNamespace(prompt_ids=range(150), response_ids=range(L - 150)) for L in adaptthink_lengths(number)]
    batches = fill(episodes, 32_768, one_row=False)
    lengths = [[150 + len(e.response_ids) for e in batch] for batch in batches]
    computed = sum(len(batch) * max(batch) for batch in lengths)
    assert all(len(batch) * max(batch) <= 32_768 for batch in lengths)
    assert 1 - sum(map(sum, lengths)) / computed < most
    assert len(batches) <= len(fill(episodes, 32_768, one_row=True)) + max(3, 0.1 * len(batches))


def test_what_is_drawn_is_epochs_one_behind_the_other():
    drawn = [n for step in range(1, 6) for n in draw(10, 4, step, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert drawn[:10] != [n for step in range(1, 6) for n in draw(10, 4, step, seed=1)][:10]
    assert len(draw(3, 4, 1, seed=0)) == 4, "fewer than a step needs: some come twice"
