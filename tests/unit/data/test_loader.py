import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from moetrain.config.data import DataConfig, MixtureStage, SourceConfig

pytestmark = pytest.mark.unit
S, G = 32, 8


def _rows(batches):
    """Every tensor of some micro-batches by sample, in order."""
    rows = []
    for batch in batches:
        tensors = [getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "sample_ids"]
        rows += [(id_, *(t[b].tolist() for t in tensors)) for b, id_ in enumerate(batch.sample_ids)]
    return rows


@pytest.mark.parametrize(("dp", "micro"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_every_layout_reads_the_same_samples_in_the_same_place(config, load, dp, micro):
    single = load(config, micro_batch=1)
    ranks = [load(config, r, dp, micro) for r in range(dp)]
    for _ in range(12):
        expected = _rows(single.next_step())
        steps = [rank.next_step() for rank in ranks]
        assert {len(step) for step in steps} == {G // (dp * micro)}
        # Micro-step by micro-step, rank by rank, the global batch is read in order.
        assert _rows(batch for micro_step in zip(*steps) for batch in micro_step) == expected
        assert len({row[0] for row in expected}) == G
    assert all(rank.state_dict() == single.state_dict() for rank in ranks)


@pytest.mark.parametrize("stop", [0, 3, 5, 7, 11])
def test_resume_on_another_layout_equals_uninterrupted(config, load, stop):
    uninterrupted = load(config)
    steps = [_rows(uninterrupted.next_step()) for _ in range(15)]
    interrupted = load(config, 1, 2)
    for _ in range(stop):
        interrupted.next_step()
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert state["step"] == stop  # handed out, though one more was read ahead
    resumed = [load(config, r, 4, 1) for r in range(4)]
    for rank in resumed:
        rank.next_step()  # whatever it did before is forgotten
        rank.load_state_dict(state)
        assert rank.state_dict() == state
    for expected in steps[stop:]:
        read = [rank.next_step() for rank in resumed]
        assert _rows(batch for micro_step in zip(*read) for batch in micro_step) == expected


def test_an_epoch_is_every_row_once_then_another_order(config, load):
    config.sources.pop("streamed")
    config.mixture = []
    loader = load(config)
    n = loader._sources["mapped"]._n_rows
    ids = [id_ for _ in range(3 * n // G) for batch in loader.next_step() for id_ in batch.sample_ids]
    epochs = [ids[e * n : (e + 1) * n] for e in range(2)]
    for epoch, read in enumerate(epochs):
        assert sorted(read) == sorted(f"mapped:{epoch}:{r}" for r in range(n))
    assert [i.split(":")[2] for i in epochs[0]] != [i.split(":")[2] for i in epochs[1]]


def test_the_seed_changes_the_order_and_nothing_else_does(config, load):
    first, same, other = load(config), load(config), load(config, seed=1)
    rows = _rows(first.next_step())
    assert _rows(same.next_step()) == rows
    assert _rows(other.next_step()) != rows


def test_the_mixture_changes_at_its_step_even_when_named_only_at_the_resume(config, load):
    planned = load(config)
    steps = [_rows(planned.next_step()) for _ in range(30)]
    streamed = [sum(row[0].startswith("streamed") for row in step) for step in steps]
    # Binomials: 40 draws at 1/3, 200 at 0.9, five standard deviations.
    assert abs(sum(streamed[:5]) - 40 / 3) < 5 * np.sqrt(40 * 2 / 9)
    assert abs(sum(streamed[5:]) - 180) < 5 * np.sqrt(200 * 0.09)
    before = load(dataclasses.replace(config, mixture=[]))
    for _ in range(5):
        before.next_step()
    after = load(config)
    after.load_state_dict(before.state_dict())
    assert _rows(after.next_step()) == steps[5]


def test_a_rollback_takes_back_the_stage_and_no_samples(config, load):
    config.mixture = [MixtureStage(8, {"streamed": 1.0})]
    staged, plain = load(config), load(dataclasses.replace(config, mixture=[]))
    for _ in range(8):
        assert _rows(staged.next_step()) == _rows(plain.next_step())
    staged.continue_at(5)  # step 8 was read ahead, of the stage
    assert (staged.state_dict()["step"], staged.state_dict()["samples"]) == (5, 8 * G)
    expected = [_rows(plain.next_step()) for _ in range(3)]
    state = None
    for rows in expected:
        assert _rows(staged.next_step()) == rows
        state = json.loads(json.dumps(staged.state_dict()))
    assert any(row[0].startswith("mapped") for rows in expected for row in rows)
    resumed = load(config, micro_batch=1)
    resumed.load_state_dict(state)
    for _ in range(3):
        read = _rows(staged.next_step())
        assert all(row[0].startswith("streamed") for row in read)
        assert _rows(resumed.next_step()) == read


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_can_join_at_a_resume(config, load, write_jsonl, texts, streaming):
    old = load(config)
    old.next_step()
    joined = SourceConfig(kind="jsonl", path=write_jsonl([{"text": t} for t in texts], "new.jsonl"))
    config.sources = config.sources | {"new": joined}
    config.sources["new"].streaming = streaming
    config.mixture = [MixtureStage(1, {"new": 1.0})]
    new, used = load(config), load(config)
    for _ in range(2):
        used.next_step()
    read = []
    for loader in new, used:
        loader.load_state_dict(old.state_dict())
        read.append(_rows(loader.next_step()))
    assert all(row[0].startswith("new:0:") for row in read[0])
    assert read[0] == read[1]  # from its beginning, whatever the loader had read before


def test_sources_of_equal_content_are_mixed(load, write_jsonl, texts, tmp_path):
    config = DataConfig(cache_dir=str(tmp_path / "cache"), validation_percent=0.0)
    for name in "ab":
        path = write_jsonl([{"text": t} for t in texts], f"{name}/rows.jsonl")
        os.utime(path, ns=(10**18, 10**18))
        config.sources[name] = SourceConfig(kind="jsonl", path=path)
    loader = load(config)
    rows = [row for _ in range(20) for row in _rows(loader.next_step())]
    tokens = {name: {row[0].split(":")[2]: row[1] for row in rows if row[0][0] == name} for name in "ab"}
    shared = tokens["a"].keys() & tokens["b"].keys()
    assert len(shared) > 20
    assert all(tokens["a"][row] == tokens["b"][row] for row in shared)
    orders = [[row[0].split(":")[2] for row in rows if row[0][0] == name][:20] for name in "ab"]
    assert orders[0] != orders[1]  # each source has an order of its own


def _documents(rows):
    """Whole documents seen in rows of tokens: between two end tokens."""
    found = set()
    for row in rows:
        text = bytes(t if t < 256 else 0 for t in row[1])
        found.update(text.split(b"\0")[1:-1])
    return found - {b""}


def test_validation_shares_no_document_with_training_and_never_changes(config, load, texts):
    config.validation_percent = 30.0
    loader = load(config, seq_len=512)  # so that rows hold whole documents
    first = [_rows(batches) for batches in loader.validation(50)]
    loader.next_step()
    assert [_rows(batches) for batches in loader.validation(50)] == first
    rows = [row for step in first for row in step]
    held = _documents(rows)
    trained = set().union(*(_documents(_rows(loader.next_step())) for _ in range(40)))
    assert len(held) > 5
    assert len(trained) > 20
    assert not held & trained
    ids = [row[0] for row in rows if row[0]]
    assert len(set(ids)) == len(ids)
    assert [i.split(":")[0] for i in ids[:4]] == ["mapped", "streamed"] * 2  # the sources take turns


def test_validation_is_split_over_ranks_and_padded_alike(config, load):
    config.validation_percent = 30.0
    single = [_rows(batches) for batches in load(config, micro_batch=1, seq_len=40).validation(50)]
    parts = [list(load(config, r, 4, 1, seq_len=40).validation(50)) for r in range(4)]
    assert len({len(part) for part in parts}) == 1
    for expected, *per_rank in zip(single, *parts):
        assert _rows(batch for micro_step in zip(*per_rank) for batch in micro_step) == expected
    assert len(list(load(config).validation(2))) == 2
    assert all(len(step) == G for step in single)
    padding = [row for row in single[-1] if not row[0]]
    assert padding
    assert all(set(row[5]) == {-1} and not any(row[3]) for row in padding)


def test_named_validation_sources_leave_training_whole(config, load, write_jsonl, texts):
    config.sources.pop("streamed")
    config.mixture = []
    config.validation = {"held": SourceConfig(kind="jsonl", path=write_jsonl([{"text": "held out"}], "held.jsonl"))}
    loader = load(config)
    ((batch, *_),) = loader.validation(3)
    assert loader.tokenizer.decode(batch.token_BS[0][:8]) == "held out"
    assert loader._sources["mapped"]._store.meta["documents"] == len(texts)


def test_nothing_held_out_says_what_to_do(config, load):
    config.validation_percent = 0.0
    with pytest.raises(ValueError, match=r"nothing is held out of mapped, streamed: raise data\.validation_percent"):
        next(load(config).validation(1))


def test_the_mask_column_and_the_document_rule_reach_the_batch(load, write_jsonl, tmp_path):
    path = write_jsonl([{"text": "abcdef", "m": [0, 0, 0, 1, 1, 1]}] * 12)
    source = SourceConfig(kind="jsonl", path=path, mask_column="m")
    config = DataConfig(sources={"x": source}, validation_percent=0.0, cache_dir=str(tmp_path / "c"))
    counts = {}
    for documents in ("stop", "cross"):
        config.documents = documents
        batch = load(config, micro_batch=8).next_step()[0]
        learnt = batch.target_BS[batch.loss_mask_BS].tolist()
        assert set(learnt) == {*b"def", 256}
        counts[documents] = len(learnt)
        assert bool((batch.document_BS > 0).any()) == (documents == "stop")
    assert counts["stop"] == counts["cross"]  # a document's first token is masked already


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"), [({"text": 3}, "3 .int. in column 'text' is not text"), ({"t": ""}, "no column")]
)
def test_bad_rows_stop_the_run_before_a_step_on_them(load, write_jsonl, texts, tmp_path, streaming, bad, message):
    path = write_jsonl([*({"text": t} for t in texts), bad])
    source = SourceConfig(kind="jsonl", path=path, streaming=streaming)
    config = DataConfig(sources={"x": source}, cache_dir=str(tmp_path / "c"))

    def train():
        loader = load(config)
        for _ in range(20):
            loader.next_step()

    with pytest.raises(ValueError, match=rf"data\.sources\.x: row 60 of rows\.jsonl.*{message}"):
        train()
    assert not [p for p in (tmp_path / "c").glob("*") if p.suffix != ".lock"]  # nothing half-made is left in the cache


def test_empty_and_too_small_sources(load, write_jsonl, tmp_path):
    config = DataConfig(sources={"x": SourceConfig(kind="jsonl", path=write_jsonl([]))}, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"data\.sources\.x is empty"):
        load(config)
    write_jsonl([{"text": "short"}])
    config.validation_percent = 0.0
    with pytest.raises(
        ValueError, match=r"data\.sources\.x holds 6 training tokens, fewer than train\.seq_len \+ 1 = 33"
    ):
        load(config)


def test_batches_and_vocabulary_that_do_not_fit(config, load):
    with pytest.raises(ValueError, match=r"train\.global_batch=9 is not a multiple .* nearest that is: 8"):
        load(config, 0, 2, 2, global_batch=9)
    with pytest.raises(ValueError, match=r"model\.vocab_size=256"):
        load(config, vocab_size=256)


def test_the_tensors_are_what_the_model_wants(config, load):
    batch = load(config).next_step()[0]
    types = [batch.token_BS, batch.target_BS, batch.loss_mask_BS, batch.position_BS, batch.document_BS]
    assert [t.dtype for t in types] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int32]
    assert {t.shape for t in types} == {(2, S)}
    assert (batch.token_BS[:, 1:] == batch.target_BS[:, :-1]).all()
