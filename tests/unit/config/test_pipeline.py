"""The arithmetic of pipeline stages, against the schedules' own numbering."""

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from moetrain.config.pipeline import STAGES_PER_RANK, V_SCHEDULES, layer_counts, rank_of_stage, stage_layers
from moetrain.config.schema import ParallelConfig

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_stages_lie_where_the_schedules_expect_them(schedule, pp):
    stages = pp * STAGES_PER_RANK[schedule]
    style = "v" if schedule in V_SCHEDULES else "loop"
    parallel = ParallelConfig(pp=pp, schedule=schedule)
    assert {i: rank_of_stage(parallel, i) for i in range(stages)} == generate_stage_to_rank_mapping(pp, stages, style)


@pytest.mark.parametrize(("n_layers", "counts"), [(4, [1, 1, 1, 1]), (6, [2, 2, 1, 1]), (61, [16, 15, 15, 15])])
def test_layers_are_even_and_none_is_lost(n_layers, counts):
    parallel = ParallelConfig(pp=4)
    assert layer_counts(parallel, n_layers) == counts
    assert [layer for span in stage_layers(parallel, n_layers) for layer in span] == list(range(n_layers))


def test_uneven_layers_are_taken_as_given():
    spans = stage_layers(ParallelConfig(pp=2, pp_layers=[1, 3]), 4)
    assert spans == [range(1), range(1, 4)]
