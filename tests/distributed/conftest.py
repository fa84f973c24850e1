import pytest

from moetrain.testing.small import write_documents


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Overrides of data that pack unevenly; runs share its tokenized cache."""
    return write_documents(tmp_path_factory.mktemp("documents"))
