from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moetrain.config.data import KINDS, DataConfig, MixtureStage, SourceConfig, check_data

pytestmark = pytest.mark.unit
GROUP = Path(__file__).parents[3] / "configs" / "data"


@pytest.mark.parametrize("name", [*KINDS, "mixture"])
def test_every_yaml_of_the_group_is_a_legal_config(name):
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(GROUP / f"{name}.yaml"))
    config = OmegaConf.to_object(merged)
    assert name == "mixture" or [s.kind for s in config.sources.values()] == [name]
    for source in config.sources.values():
        source.path = source.path or ("" if source.kind == "stdlib" else "somewhere")
    check_data(config)


def _one(**source):
    return {"sources": {"x": SourceConfig(**source)}}


TWO = {"sources": {"code": SourceConfig(), "prose": SourceConfig()}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"data\.sources is empty"),
        (_one(kind="jsn"), r"data\.sources\.x\.kind='jsn' is unknown; did you mean 'jsonl'"),
        (_one(kind="jsonl"), r"data\.sources\.x\.path is empty: kind jsonl needs a file"),
        (_one(streaming=True), r"data\.sources\.x\.streaming=true: kind stdlib is read mapped"),
        (_one(kind="text", path="a", mask_column="m"), r"data\.sources\.x\.mask_column='m': kind text has no columns"),
        (_one(path="/my/corpus"), r"data\.sources\.x\.path='/my/corpus': kind stdlib reads this Python's own"),
        (_one(kind="parquet", path="a", split="test"), r"data\.sources\.x\.split='test': kind parquet has none"),
        (_one(kind="arrow", path="a", subset="b"), r"data\.sources\.x\.subset='b': kind arrow has none"),
        (_one(weight=0.0), r"data\.sources\.\*\.weight sum to zero"),
        (_one(weight=-1.0), r"source 'x' has weight -1"),
        (_one(weight=float("nan")), r"source 'x' has weight nan"),
        (_one() | {"documents": "stp"}, r"data\.documents='stp' is unknown; did you mean 'stop'"),
        (
            _one() | {"eos_token": "</s>"},
            r"^data\.eos_token='</s>' with data\.tokenizer=byte.*nearest legal value: \"\"$",
        ),
        (_one() | {"validation_percent": 100.0}, r"data\.validation_percent=100\.0"),
        (_one() | {"validation": {"v": SourceConfig(kind="text")}}, r"data\.validation\.v\.path is empty"),
        (
            TWO | {"mixture": [MixtureStage(5, {"cod": 1.0})]},
            r"data\.mixture\[0\]\.weights names .* 'cod'; did you mean 'code'",
        ),
        (TWO | {"mixture": [MixtureStage(5, {"code": 0.0})]}, r"data\.mixture\[0\]\.weights sum to zero"),
        (TWO | {"mixture": [MixtureStage(-1, {"code": 1.0})]}, r"from_step=-1 is negative"),
        (TWO | {"mixture": [MixtureStage(5, {"code": 1.0})] * 2}, r"data\.mixture\[1\]\.from_step=5 is already"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        check_data(DataConfig(**keys))


def test_own_weights_may_be_zero_where_a_stage_covers_step_0():
    check_data(DataConfig(**_one(weight=0.0), mixture=[MixtureStage(0, {"x": 1.0})]))
