"""The digest of the code that runs."""

import pytest

from moetrain.comm.code import digest_of

pytestmark = pytest.mark.unit


def test_the_digest_knows_every_file_and_its_place(tmp_path):
    seen = set()
    for name, text in [("a.py", "x"), ("sub/b.py", "y"), ("sub/b.py", "z"), ("a.py", ""), ("note.txt", "z")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.add(digest_of(tmp_path))
    assert len(seen) == 4
    (tmp_path / "sub" / "b.py").rename(tmp_path / "c.py")
    assert digest_of(tmp_path) not in seen
