import numpy as np
import pytest

from moetrain.data.permute import Permutation

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_place_is_taken_once(size):
    assert sorted(Permutation(size, 0, "a", 0)(np.arange(size))) == list(range(size))


def test_a_place_does_not_depend_on_the_other_positions_asked_for():
    order = Permutation(4097, 3, "a", 1)
    assert [int(order(np.array([i]))[0]) for i in (0, 5, 4096)] == order(np.array([0, 5, 4096])).tolist()


@pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)])
def test_seed_source_and_epoch_each_give_another_order(other):
    places = np.arange(1000)
    # Two random permutations agree in one place on average (Poisson); 12 has a probability below 1e-9.
    assert (Permutation(1000, 0, "a", 0)(places) == Permutation(1000, *other)(places)).sum() < 12


def test_neighbours_are_scattered():
    n = 4097
    order = Permutation(n, 0, "a", 0)(np.arange(n))
    # |a - b| of two independent uniform places has mean n/3 and standard deviation n/sqrt(18); five standard errors.
    for distance in (np.abs(np.diff(order)), np.abs(order - np.arange(n))):
        assert abs(distance.mean() - n / 3) < 5 * n / np.sqrt(18) / np.sqrt(n)


def test_a_domain_of_terabytes_costs_no_memory():
    size = 10**13
    places = Permutation(size, 0, "a", 0)(np.array([0, 1, size - 1]))
    assert len(set(places.tolist())) == 3
    assert (places < size).all()
    assert (places >= 0).all()
