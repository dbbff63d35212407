import pytest

from tests.prepare.reading import Reader


@pytest.fixture
def reader(tmp_path) -> Reader:
    return Reader(tmp_path)
