import pytest

from moetrain.data.content import BLOCK, BLOCKS, LEAST, sampled_hash

pytestmark = pytest.mark.unit


def _hash(path, data, others=()):
    path.write_bytes(data)
    return sampled_hash("data.sources.x", [path, *others])


def test_a_file_up_to_its_blocks_is_hashed_whole(tmp_path):
    others = [tmp_path / f"{i}" for i in range(BLOCKS)]  # so many that this file has the least blocks
    for other in others:
        other.touch()
    data = bytes(LEAST * BLOCK)
    seen = {_hash(tmp_path / "a", data, others)}
    for place in (0, BLOCK, len(data) // 2, 2 * BLOCK - 1, len(data) - 1):
        seen.add(_hash(tmp_path / "a", data[:place] + b"1" + data[place + 1 :], others))
    assert len(seen) == 6
    assert _hash(tmp_path / "a", data, others) in seen


@pytest.mark.parametrize("size", [BLOCKS * BLOCK + 1, 3 * BLOCKS * BLOCK + 17])
def test_a_large_file_is_sampled_from_head_to_tail(tmp_path, size):
    data = bytearray(size)
    seen = {_hash(tmp_path / "a", data)}
    places = [0, BLOCK - 1, size - BLOCK, size - 1, (size - BLOCK) * 500 // (BLOCKS - 1)]
    for place in places:
        data[place] = 1
        seen.add(_hash(tmp_path / "a", data))
    assert len(seen) == 1 + len(places)


def test_which_file_holds_what_counts(tmp_path):
    for name, text in {"a": "1", "b": "2", "c": "12"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert len({sampled_hash("x", files) for files in ([a, b], [b, a], [a], [c], [c, a])}) == 5
    assert sampled_hash("x", []) == ""


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.x: .*/gone cannot be read"):
        sampled_hash("data.sources.x", [tmp_path / "gone"])
