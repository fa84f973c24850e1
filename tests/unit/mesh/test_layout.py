"""Layout arithmetic against hand-written groups and a brute-force enumeration of coordinates."""

import itertools

import pytest

from moetrain.mesh.layout import axis_groups, format_tables, make_layout, rank_tables

pytestmark = pytest.mark.unit


def test_the_worked_example_of_sixteen_ranks():
    layout = make_layout(16, tp=2, cp=2, pp=2, etp=1, ep=8)
    tables = rank_tables(layout)
    first = {axis: groups[0] for mesh in tables.values() for axis, groups in mesh.items()}
    assert first["tp"] == [0, 1]
    assert first["cp"] == [0, 2]
    assert first["dp_shard"] == [0, 4]
    assert first["pp"] == [0, 8]
    assert first["ep"] == list(range(8))
    assert layout.edp == 1


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12, 16])
def test_every_legal_layout_covers_each_rank_once_per_axis(world):
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    legal = 0
    for pp, tp, cp, ep, etp, rep in itertools.product(divisors, repeat=6):
        if world % (pp * tp * cp) or world % (pp * ep * etp) or (world // (pp * tp * cp)) % rep:
            with pytest.raises(ValueError, match="nearest legal value"):
                make_layout(world, pp=pp, tp=tp, cp=cp, ep=ep, etp=etp, dp_replicate=rep)
            continue
        layout = make_layout(world, pp=pp, tp=tp, cp=cp, ep=ep, etp=etp, dp_replicate=rep)
        legal += 1
        for mesh in (layout.attention, layout.expert):
            coordinates = list(itertools.product(*(range(size) for size in mesh.values())))  # row-major
            assert len(coordinates) == world
            for position, axis in enumerate(mesh):
                expected: dict = {}
                for rank, where in enumerate(coordinates):
                    expected.setdefault(where[:position] + where[position + 1 :], []).append(rank)
                assert sorted(axis_groups(mesh, axis)) == sorted(expected.values())
        assert axis_groups(layout.attention, "pp") == axis_groups(layout.expert, "pp")
    assert legal


@pytest.mark.parametrize(
    ("world", "degrees", "key", "nearest"),
    [
        (8, {"pp": 3}, "parallel.pp=3", "2"),
        (8, {"tp": 16}, "parallel.tp=16", "8"),
        (8, {"pp": 2, "tp": 8}, "parallel.tp=8", "4"),
        (8, {"cp": 3}, "parallel.cp=3", "2"),
        (12, {"tp": 2, "cp": 4}, "parallel.cp=4", "3"),
        (8, {"ep": 5}, "parallel.ep=5", "4"),
        (8, {"ep": 8, "etp": 2}, "parallel.ep=8", "4"),
        (8, {"etp": 3}, "parallel.etp=3", "2"),
        (8, {"tp": 2, "dp_replicate": 8}, "parallel.dp_replicate=8", "4"),
        (4, {"ep": 0}, "parallel.ep=0", "1"),
        (4, {"ep": -2}, "parallel.ep=-2", "1"),
        (4, {"ep": "two"}, "parallel.ep='two'", "1"),
        (4, {"ep": True}, "parallel.ep=True", "1"),
        (0, {}, "world=0", "1"),
    ],
)
def test_refusals_name_the_key_and_the_nearest_legal_value(world, degrees, key, nearest):
    with pytest.raises(ValueError) as error:
        make_layout(world, **degrees)
    assert key in str(error.value)
    assert str(error.value).endswith(f"nearest legal value: {nearest}")


def test_expert_replicas_are_the_common_divisor():
    layout = make_layout(8, ep=2, dp_replicate=2)
    assert (layout.dp_shard, layout.edp_replicate, layout.edp_shard) == (4, 2, 2)
    assert make_layout(4, ep=4, dp_replicate=2).edp_replicate == 1


def test_the_table_is_readable_at_sixteen_thousand_ranks():
    text = format_tables(make_layout(16384, pp=16, tp=8, ep=64))
    assert "attention mesh [pp=16" in text
    assert "ep=64" in text
