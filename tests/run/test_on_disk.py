"""Arrays on this node's disk: their numbers, no file that stays, an error that names the directory."""

import os

import numpy as np
import pytest

from alphatoken.pipeline.run import on_disk as module
from alphatoken.pipeline.run.on_disk import on_disk, zeros_on_disk


def test_arrays_hold_what_they_are_given_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "cache"))
    chunks = [np.arange(5, dtype=np.int32), np.zeros(0, np.int32), np.arange(20, dtype=np.int64)[::2]]
    found = on_disk(np.int32, chunks)
    assert found.dtype == np.int32 and found.tolist() == [*range(5), *range(0, 20, 2)]
    found[3:5] = 7
    assert found[2:6].tolist() == [2, 7, 7, 0]
    monkeypatch.setattr(module, "CHUNK", 4)
    zeros = zeros_on_disk(np.bool_, 10)
    zeros[9] = True
    assert zeros.dtype == np.bool_ and zeros.tolist() == [*[False] * 9, True]
    assert on_disk(np.float32, []).shape == zeros_on_disk(np.float32, 0).shape == (0,)
    assert not list((tmp_path / "cache").iterdir())
    assert type(found) is np.ndarray and type(found[1:3]) is np.ndarray  # as it travels to workers


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path))
    with (
        open("/dev/full", "r+b", buffering=0) as full,
        pytest.raises(OSError, match=rf"No space left on device: {tmp_path} .*ALPHATOKEN_CACHE"),
    ):
        monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda dir: full)
        zeros_on_disk(np.float32, 100)
