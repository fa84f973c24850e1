"""A resume goes on with the data of its checkpoint, or says what is other."""

import dataclasses
import os

import pytest

from moetrain.config.data import DataConfig, SourceConfig

pytestmark = pytest.mark.unit


def test_a_resume_on_other_data_is_refused_and_names_both(config, load, write_jsonl, texts):
    old = load(config)
    state = old.state_dict()
    write_jsonl([{"text": t + "!"} for t in texts], "mapped.jsonl")
    new = load(config)
    with pytest.raises(ValueError, match=rf"{old.fingerprint()} there, {new.fingerprint()} here; source mapped: "):
        new.load_state_dict(state)
    for changes, named in ({"seed": 5}, "seed: 0 there, 5 here"), ({"seq_len": 16}, "seq_len: 32 there, 16 here"):
        with pytest.raises(ValueError, match=named):
            load(config, **changes).load_state_dict(state)
    config.sources.pop("streamed")
    config.mixture = []
    with pytest.raises(ValueError, match=r"source streamed: .* absent"):
        load(config).load_state_dict(state)


def test_a_stream_that_would_be_read_otherwise_is_refused_at_a_resume(config, load, write_jsonl, texts):
    path = write_jsonl([{"text": t, "other": t[::-1]} for t in texts], "two_columns.jsonl")
    config.sources = {"s": SourceConfig(kind="jsonl", path=path, streaming=True)}
    config.mixture = []
    state = load(config).state_dict()
    load(config).load_state_dict(state)
    other = dataclasses.replace(config, sources={"s": dataclasses.replace(config.sources["s"], text_column="other")})
    with pytest.raises(ValueError, match=r"source s: jsonl, text 'text', .* there, jsonl, text 'other', .* here"):
        load(other).load_state_dict(state)
    held = dataclasses.replace(config, validation_percent=config.validation_percent + 10)
    with pytest.raises(ValueError, match=r"source s: .*% held out there, .*% held out here"):
        load(held).load_state_dict(state)
    del state["data"]["reading"]  # as the first checkpoints were
    load(other).load_state_dict(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resume_on_data_that_only_looks_the_same_is_refused(load, write_jsonl, texts, tmp_path, streaming):
    """Names, sizes, and times are those of the data that the checkpoint was trained on; a copy of that goes on."""
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    states = {}
    for name, rows in {"there": texts, "other": [t.swapcase() for t in texts], "copy": texts}.items():
        path = write_jsonl([{"text": t} for t in rows], f"{name}/rows.jsonl")
        os.utime(path, ns=(10**18, 10**18))
        config.sources = {"s": SourceConfig(kind="jsonl", path=path, streaming=streaming)}
        loader = load(config)
        states[name] = loader.state_dict()
        if name == "other":
            with pytest.raises(ValueError, match=r"the checkpoint was trained on other data: .*source s: "):
                loader.load_state_dict(states["there"])
    loader.load_state_dict(states["there"])
    states["other"]["data"].pop("sampled", None)  # as checkpoints once were: of streams, names and sizes alone
    if streaming:
        loader.load_state_dict(states["other"])


def test_a_directory_in_place_of_a_hub_is_known_by_its_files(load, write_jsonl, texts, tmp_path):
    config = DataConfig(sources={"s": SourceConfig(kind="hub", path=str(tmp_path / "hub"), streaming=True)})
    path = write_jsonl([{"text": t} for t in texts], "hub/rows.jsonl")
    state = load(config).state_dict()
    os.utime(path, ns=(10**18, 10**18))
    load(config).load_state_dict(state)
    write_jsonl([{"text": t.swapcase()} for t in texts], "hub/rows.jsonl")
    with pytest.raises(ValueError, match=r"the checkpoint was trained on other data: .*source s: "):
        load(config).load_state_dict(state)


def test_a_copy_of_the_data_is_the_same_data(config, load, write_jsonl, texts):
    old = load(config)
    config.sources["mapped"].path = write_jsonl([{"text": t} for t in texts], "elsewhere/mapped.jsonl")
    assert load(config).fingerprint() == old.fingerprint()
