"""Validation rows for simulated runs, which refuse fewer than 16."""

from pathlib import Path

import pytest

from tests.conftest import chat_row, write_rows


@pytest.fixture(scope="session")
def twenty_rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "validation.jsonl", [chat_row(i) for i in range(500, 520)])
