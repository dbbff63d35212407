"""masks/<name>/: shards in data/ that every reader of directories opens, and what becomes of masks without that folder."""

import shutil
from pathlib import Path

import datasets
import pandas
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from alphatoken.pipeline.mask.comparison import MaskPlace, compare
from alphatoken.pipeline.mask.layout import has_shards, open_part
from alphatoken.pipeline.run.failure import RunFailed
from alphatoken.pipeline.run.storage import Storage
from tests.mask.synthetic_run import contents, mask, masks, write_run


def as_an_earlier_version_left_it(place: Path) -> None:
    for shard in (place / "data").iterdir():
        shutil.move(shard, place / shard.name)
    (place / "data").rmdir()


def test_the_folder_of_shards_opens_with_pandas_and_pyarrow(tmp_path):
    storage, *_ = write_run(tmp_path, (40, 0, 33))
    mask(storage)
    place, rows = tmp_path / "masks/default/data", masks(storage)
    assert {path.name for path in place.parent.iterdir()} == {"README.md", "summary.json", "data"}
    assert all(path.name.startswith("train-") and path.suffix == ".parquet" for path in place.iterdir())
    assert len(rows) == 73
    assert pq.read_table(place).to_pylist() == rows
    assert pyarrow.dataset.dataset(place).to_table().to_pylist() == rows
    assert [list(one) for one in pandas.read_parquet(place)["labels"]] == [row["labels"] for row in rows]
    assert datasets.load_dataset(str(place), split="train", cache_dir=str(tmp_path / "c")).to_list() == rows


@pytest.mark.parametrize("configuration", [None, "default"])
def test_the_cache_of_datasets_keeps_runs_apart_whose_masks_have_one_name(tmp_path, configuration):
    """One after the other into one cache, and the first once more: none is given the rows of another."""
    found = []
    for run, size, settings in (("one", 7, {}), ("two", 11, {}), ("three", 7, {"rho": 0.2})):
        storage, *_ = write_run(tmp_path / run, (size,))
        mask(storage, **settings)
        found.append((str(tmp_path / run / "masks/default"), masks(storage)))
    for place, rows in (*found, *found):
        loaded = datasets.load_dataset(place, configuration, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == rows
    assert len({str(rows) for _, rows in found}) == 3


def test_readers_of_a_mask_of_an_earlier_version_say_what_to_do_and_the_mask_stage_does_it(tmp_path):
    storage, *_ = write_run(tmp_path)
    mask(storage)
    before, rows = contents(storage), masks(storage)
    as_an_earlier_version_left_it(tmp_path / "masks/default")
    assert not has_shards(storage, "default")
    with pytest.raises(RunFailed) as error:
        compare(MaskPlace(storage, "default"), [MaskPlace(storage, "default")])
    assert f"alphatoken mask run.dir={storage.root} mask.name=default" in str(error.value)
    assert "\n" not in str(error.value)
    mask(storage)
    assert contents(storage) == before and masks(storage) == rows
    assert {path.name for path in (tmp_path / "masks/default").iterdir()} == {"README.md", "summary.json", "data"}


def test_a_missing_or_damaged_shard_is_said(tmp_path):
    storage, *_ = write_run(tmp_path, (5, 6))
    mask(storage)
    part = "part-00001-of-00002.parquet"
    shard = tmp_path / "masks/default/data/train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(RunFailed, match="cannot be read"), open_part(storage, "default", part):
        pass
    shard.unlink()
    with pytest.raises(RunFailed, match="is missing"), open_part(storage, "default", part):
        pass


def test_a_part_is_opened_without_a_look_at_all_others(tmp_path, monkeypatch):
    """A listing for each of many shards is quadratic: over 10,000 of them the report was not done in ten minutes."""
    storage, *_ = write_run(tmp_path, (3, 4))
    mask(storage)
    parts = [Path(name).name for name in storage.names("values")]
    monkeypatch.setattr(Storage, "names", lambda *_: pytest.fail("a directory is listed"))
    for part, rows in zip(parts, (3, 4), strict=True):
        with open_part(storage, "default", part) as file:
            assert file.metadata.num_rows == rows
