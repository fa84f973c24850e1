"""Plans counted by hand: which experts change ranks, and when none does."""

import itertools

import pytest
import torch

from moetrain.moe.placement import Placement, loads, rank_of, swapped

pytestmark = pytest.mark.unit


def rank_loads(count_LE, slot_LE, ranks):
    return loads(count_LE, rank_of(slot_LE, ranks), ranks)


def logical(layers, experts):
    return torch.arange(experts).repeat(layers, 1)


def test_loads_of_ranks():
    count_LE = torch.tensor([[5, 1, 2, 0], [1, 1, 1, 1]])
    slot_LE = torch.tensor([[0, 1, 2, 3], [3, 0, 2, 1]])
    assert rank_loads(count_LE, slot_LE, 2).tolist() == [[6, 2], [2, 2]]
    assert rank_loads(count_LE, torch.tensor([[0, 2, 1, 3]] * 2), 2).tolist() == [[7, 1], [2, 2]]


def test_one_swap_balances():
    # Ranks of 90 and 10: experts 0 (50) and 3 (10) change places, as good as 1 and 2 would, and before them.
    assert swapped(torch.tensor([50, 40, 0, 10]), torch.arange(4), 2).tolist() == [3, 1, 2, 0]


def test_a_plan_starts_where_experts_are():
    slot_E = torch.tensor([2, 0, 3, 1])  # rank 0 has experts 1 and 3, rank 1 has 0 and 2
    assert swapped(torch.tensor([30, 1, 30, 1]), slot_E, 2).tolist() == [
        0,
        2,
        3,
        1,
    ]  # 61 to 31: one of the thirties goes


def test_a_hot_expert_gets_the_coldest_company():
    slot_E = swapped(torch.tensor([70, 10, 9, 8, 2, 1]), torch.arange(6), 3)
    load_R = rank_loads(torch.tensor([[70, 10, 9, 8, 2, 1]]), slot_E[None], 3)[0]
    assert int(load_R.max()) == 71  # of 80: the expert itself cannot be divided


@pytest.mark.parametrize("seed", range(5))
def test_near_the_best_of_all_placements(seed):
    """8 experts on 4 ranks: all 105 ways to pair them."""
    count_E = (1000 / torch.arange(1, 9) ** 0.8).long()[
        torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    ]
    slot_E = swapped(count_E, torch.arange(8), 4)
    assert sorted(slot_E.tolist()) == list(range(8))
    found = int(rank_loads(count_E[None], slot_E[None], 4).max())
    best = min(
        max(int(count_E[list(order[i : i + 2])].sum()) for i in range(0, 8, 2))
        for order in itertools.permutations(range(8))
        if all(order[i] < order[i + 1] for i in range(0, 8, 2)) and list(order[::2]) == sorted(order[::2])
    )
    assert best <= found <= 1.1 * best


@pytest.mark.parametrize("count_E", [[0] * 6, [7] * 6, [100, 0, 100, 0, 100, 0]])
def test_balance_is_left_alone(count_E):
    assert torch.equal(swapped(torch.tensor(count_E), torch.arange(6), 3), torch.arange(6))


def test_a_gain_below_a_hundredth_is_not_worth_a_move():
    count_E = torch.tensor([1009, 1000, 1000, 1000])  # swapping could gain at most 9 of a mean of 2004
    assert torch.equal(swapped(count_E, torch.arange(4), 2), torch.arange(4))


def test_only_layers_above_the_threshold_are_planned():
    count_LE = torch.tensor([[60, 50, 40, 50], [90, 60, 20, 30]])  # fullest over mean: 1.1 and 1.5
    plan_LE = Placement(every=1, threshold=1.1).plan(count_LE, logical(2, 4), 2)
    assert plan_LE[0].tolist() == [0, 1, 2, 3]
    assert rank_loads(count_LE, plan_LE, 2)[1].tolist() in ([110, 90], [90, 110])
    assert Placement(every=1, threshold=1.0).plan(count_LE, logical(2, 4), 2)[0].tolist() != [0, 1, 2, 3]


def test_nothing_was_chosen_yet():
    plan_LE = Placement(every=1, threshold=1.0).plan(torch.zeros(2, 4, dtype=torch.int64), logical(2, 4), 2)
    assert torch.equal(plan_LE, logical(2, 4))


@pytest.mark.parametrize("options", [{"every": -1}, {"every": 2.5}, {"threshold": 0.9}, {"threshold": float("nan")}])
def test_wrong_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=rf"dispatch\.placement\.{next(iter(options))}=.*nearest legal value"):
        Placement(**options)
