"""Published models on 1,024 and 16,384 ranks, built on paper: groups, parameters of a rank, and nobody left out.

The parameters are counted a second time here, from the models' published shapes and the rank's number alone.
"""

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch.distributed as dist

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.mesh.layout import Layout, make_layout, rank_tables
from moetrain.plan.params import count
from moetrain.testing.paper import paper_model, paper_ranks

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Published:
    """Shapes [rows, columns] or [length]; what tp divides by rows or columns is listed apart from what it leaves whole.

    expert: F and D of each of its three matrices. dense: the first layers without experts.
    """

    layers: int
    dense: int
    experts: int
    expert: tuple[int, int]
    by_rows: tuple[tuple[int, ...], ...]
    by_columns: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    dense_rows: tuple[tuple[int, ...], ...]
    dense_columns: tuple[tuple[int, ...], ...]
    moe_kept: tuple[tuple[int, ...], ...]
    vocabulary: tuple[int, int]


MIXTRAL_8X22B = Published(
    layers=56,
    dense=0,
    experts=8,
    expert=(16384, 6144),
    by_rows=(
        (48 * 128, 6144),
        (8 * 128, 6144),
        (8 * 128, 6144),
    ),  # q, k, v
    by_columns=((6144, 48 * 128),),  # o
    kept=(
        (6144,),
        (6144,),
    ),  # norms
    dense_rows=(),
    dense_columns=(),
    moe_kept=((8, 6144),),  # router
    vocabulary=(32000, 6144),
)
DEEPSEEK_V3 = Published(
    layers=61,
    dense=3,
    experts=256,
    expert=(2048, 7168),
    by_rows=(
        (128 * 192, 1536),
        (128 * 256, 512),
    ),  # from the latents to all heads: queries, keys and values
    by_columns=((7168, 128 * 128),),  # o
    kept=(
        (1536, 7168),
        (1536,),
        (512 + 64, 7168),
        (512,),
        (7168,),
        (7168,),
    ),  # into the latents, norms
    dense_rows=(
        (18432, 7168),
        (18432, 7168),
    ),
    dense_columns=((7168, 18432),),
    moe_kept=(
        (256, 7168),
        (2048, 7168),
        (2048, 7168),
        (7168, 2048),
    ),  # router, one shared expert
    vocabulary=(129280, 7168),
)
PAPERS = {  # world, model, preset, degrees, ranks to build
    "mixtral 1024": (1024, MIXTRAL_8X22B, "mixtral_8x22b", {"pp": 8, "tp": 4, "ep": 8}, (0, 517, 1023)),
    "mixtral 16384": (
        16384,
        MIXTRAL_8X22B,
        "mixtral_8x22b",
        {"pp": 8, "tp": 8, "cp": 2, "ep": 8, "etp": 2, "dp_replicate": 4},
        (0, 16383),
    ),
    "deepseek 1024": (1024, DEEPSEEK_V3, "deepseek_v3", {"pp": 16, "ep": 64}, (0, 517, 1023)),
    "deepseek 16384": (
        16384,
        DEEPSEEK_V3,
        "deepseek_v3",
        {"pp": 16, "tp": 2, "cp": 2, "ep": 64, "dp_replicate": 4},
        (0, 16383),
    ),
}


def shard(size: int, parts: int, index: int) -> int:
    """The index-th of `parts` shards of ceil(size / parts), the last ones shorter or empty."""
    each = math.ceil(size / parts)
    return max(0, min(each, size - index * each))


def dense_elements(model: Published, layout: Layout, stage: int, index: int) -> int:
    """Elements of dense parameters on the rank at `index` of those that shard them (dp_shard x cp)."""
    shards, tp = layout.dp_shard * layout.cp, layout.tp

    def rows(shapes):  # tp has the rows, so the columns are sharded
        return sum(s[0] // tp * shard(s[1], shards, index) if tp > 1 else whole([s]) for s in shapes)

    def columns(shapes):
        return sum(shard(s[0], shards, index) * s[1] // tp for s in shapes)

    def whole(shapes):  # by rows, or evenly along another dim where there are fewer rows than ranks
        few = [s for s in shapes if s[0] < shards]
        many = sum(shard(s[0], shards, index) * math.prod(s[1:]) for s in shapes if s not in few)
        return many + sum(math.prod(s) // shards for s in few)

    total = 0
    for layer in stage_of(model.layers, layout.pp)[stage]:
        total += rows(model.by_rows) + columns(model.by_columns) + whole(model.kept)
        if layer < model.dense:
            total += rows(model.dense_rows) + columns(model.dense_columns)
        else:
            total += whole(model.moe_kept)
    if stage == 0:
        total += rows([model.vocabulary])
    if stage == layout.pp - 1:
        total += rows([model.vocabulary]) + whole([model.vocabulary[1:]])
    return total


def expert_elements(model: Published, layout: Layout, stage: int, index: int) -> int:
    """Elements of experts on the rank at `index` of those that shard them (edp_shard): w1, w3, and w2."""
    width, d_model = model.expert
    layers = sum(layer >= model.dense for layer in stage_of(model.layers, layout.pp)[stage])
    if layout.etp == 1:
        one = shard(width, layout.edp_shard, index) * d_model
    else:
        one = width // layout.etp * shard(d_model, layout.edp_shard, index)
    return layers * model.experts // layout.ep * 3 * one


def stage_of(layers: int, stages: int) -> list[range]:
    sizes = [layers // stages + (i < layers % stages) for i in range(stages)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(stages)]


def of_rank(model: Published, layout: Layout, rank: int, dense=dense_elements, experts=expert_elements) -> int:
    stage, place = divmod(rank, layout.world // layout.pp)
    shards = layout.dp_shard * layout.cp
    expert_place = place // (layout.etp * layout.ep) % layout.edp_shard
    return dense(model, layout, stage, place // layout.tp % shards) + experts(model, layout, stage, expert_place)


def setup(name):
    world, model, preset, degrees, ranks = PAPERS[name]
    options = [f"model={preset}", "train.global_batch=8192", "train.micro_batch=1", "train.seq_len=4096"]
    config = load_config([*options, *(f"parallel.{key}={value}" for key, value in degrees.items())])
    return config, validate(config, world), model, ranks


@pytest.mark.parametrize("name", PAPERS)
def test_a_rank_holds_what_a_hand_count_says(name):
    config, layout, published, ranks = setup(name)
    tables = rank_tables(layout)
    for rank in ranks:
        with paper_ranks(rank, layout.world):
            model, meshes = paper_model(config, layout)
            held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
            assert held == 4 * of_rank(published, layout, rank), f"rank {rank}"
            for mesh, groups in ((meshes.attention, tables["attention"]), (meshes.expert, tables["expert"])):
                for axis, table in groups.items():
                    mine = dist.get_process_group_ranks(mesh.get_group(axis))
                    assert mine in table, f"{axis} of rank {rank}"
                    assert rank in mine, f"{axis} of rank {rank}"
            stage = layout.world // layout.pp
            sizes = {"data": stage // layout.tp, "tokens": stage, "row": layout.cp * layout.tp}
            for purpose, size in sizes.items():
                group = getattr(meshes, purpose)
                assert (1 if group is None else group.size()) == size, purpose
            assert meshes.dense_fsdp.size() == layout.dp * layout.cp
            assert meshes.expert_fsdp.size() == layout.edp


@pytest.mark.parametrize("name", PAPERS)
def test_no_rank_is_left_out(name):
    config, layout, published, _ = setup(name)
    for mesh, degrees in (("attention", layout.attention), ("expert", layout.expert)):
        for axis, groups in rank_tables(layout)[mesh].items():
            assert {len(group) for group in groups} == {degrees[axis]}
            assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    dense, experts = cache(dense_elements), cache(expert_elements)
    held = sum(of_rank(published, layout, rank, dense, experts) for rank in range(layout.world))
    one = make_layout(1)
    all_dense, all_experts = dense_elements(published, one, 0, 0), expert_elements(published, one, 0, 0)
    assert all_dense + all_experts == count(config.model).total
    dense_copies = layout.dp_replicate * (all_dense + (layout.tp - 1) * whole_on_every_tp_rank(published))
    assert held == dense_copies + layout.edp_replicate * all_experts


def whole_on_every_tp_rank(model: Published) -> int:
    each = sum(math.prod(shape) for shape in model.kept)
    moe = sum(math.prod(shape) for shape in model.moe_kept)
    return model.layers * each + (model.layers - model.dense) * moe + model.vocabulary[1]
