"""A few pairs of the reshape matrix; `python -m moetrain.testing.reshape` runs all."""

from __future__ import annotations

import pytest
import torch

from moetrain.testing import reshape

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return reshape.Matrix(tmp_path_factory.mktemp("reshape"))


@pytest.mark.parametrize(
    "pair", [(optimizer, *pair) for optimizer, pairs in reshape.QUICK.items() for pair in pairs], ids=" - ".join
)
def test_a_layout_continues_what_another_saved(matrix, pair):
    cells, passed = matrix.pair(*pair)
    assert passed, cells


def test_the_verdict_sees_a_lost_moment_a_changed_sample_and_a_drift(matrix):
    optimizer, source, _ = ("adamw", *reshape.QUICK["adamw"][0])
    matrix.pair(optimizer, source, "one")
    saved, reference = matrix.saved[optimizer, source], matrix.references[optimizer]
    good = reshape.Continued(saved, reference.steps, reference.weights, reference.samples)
    assert reshape.verdict(good, saved, reference)[1]
    name = next(name for name in saved.tensors if name.endswith("exp_avg"))
    lost = reshape.State({**saved.tensors, name: torch.zeros_like(saved.tensors[name])}, saved.cursor)
    swapped = {step: ids[::-1] for step, ids in reference.samples.items()}
    weight = next(iter(reference.weights))
    drifted = {**reference.weights, weight: reference.weights[weight] * (1 + 1e-8)}
    for bad in (
        reshape.Continued(lost, good.steps, good.weights, good.samples),
        reshape.Continued(saved, good.steps, good.weights, swapped),
        reshape.Continued(saved, good.steps, drifted, good.samples),
        reshape.Continued(saved, good.steps[1:] + good.steps[:1], good.weights, good.samples),
    ):
        assert not reshape.verdict(bad, saved, reference)[1]


def test_the_matrix_has_what_it_promises():
    pairs = [(o, *pair) for o, some in reshape.PAIRS.items() for pair in some]
    assert len(set(pairs)) == len(pairs) >= 20
    worlds = {(reshape.LAYOUTS[source][0], reshape.LAYOUTS[target][0]) for _, source, target in pairs}
    assert {(8, 4), (4, 2), (2, 1), (1, 8), (4, 4)} <= worlds
    assert {name for _, source, target in pairs for name in (source, target)} == set(reshape.LAYOUTS)
