import numpy as np
import pytest

from moetrain.config.data import DataConfig, MixtureStage, SourceConfig
from moetrain.data.mixture import Mixture

pytestmark = pytest.mark.unit


def _config(weights, mixture=()):
    return DataConfig(sources={n: SourceConfig(weight=w) for n, w in weights.items()}, mixture=list(mixture))


def test_shares_follow_the_weights():
    n = 20000
    drawn = Mixture(_config({"a": 3.0, "none": 0.0, "b": 1.0, "last": 0.0}), seed=0).draw(0, np.arange(n))
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == counts[3] == 0
    assert abs(counts[0] - 0.75 * n) < 5 * np.sqrt(n * 0.75 * 0.25)


def test_a_draw_depends_on_seed_and_sample_alone():
    mixture = Mixture(_config({"a": 1.0, "b": 1.0}), seed=1)
    whole = mixture.draw(0, np.arange(100))
    assert mixture.draw(9, np.arange(40, 50)).tolist() == whole[40:50].tolist()
    assert Mixture(_config({"a": 1.0, "b": 1.0}), seed=2).draw(0, np.arange(100)).tolist() != whole.tolist()


def test_a_stage_starts_at_its_step_and_lasts_until_the_next():
    stages = [MixtureStage(20, {"a": 1.0}), MixtureStage(10, {"b": 1.0})]  # order in the file does not matter
    mixture = Mixture(_config({"a": 1.0, "b": 1.0}, stages), seed=0)
    sample = np.arange(50)
    assert set(mixture.draw(9, sample).tolist()) == {0, 1}
    assert set(mixture.draw(10, sample).tolist()) == set(mixture.draw(19, sample).tolist()) == {1}
    assert set(mixture.draw(20, sample).tolist()) == {0}
