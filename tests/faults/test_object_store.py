"""Run directories, data and models in an object store that fails, crawls, and loses its clients in the middle."""

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from alphatoken.pipeline.run.storage import Storage
from tests.conftest import chat_row, save_model
from tests.faults.interrupted_run import MANY_PIECES, contents, python, without_ray
from tests.faults.object_store import SECRET, USER, every, slowly

TABLE = pa.table({"x": np.arange(5000)})


@pytest.fixture
def storage(object_store, tmp_path) -> Storage:
    return Storage(object_store.uri(f"runs/{tmp_path.name}"))


def test_a_run_from_and_to_an_object_store_is_that_of_a_local_one_however_often_it_is_killed(
    object_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "cache"))
    policy = object_store.put_directory("policy", save_model(tmp_path / "policy", seed=1))
    train = object_store.put("data/train.jsonl", "".join(json.dumps(chat_row(i)) + "\n" for i in range(60)).encode())
    inputs = [f"model.policy='{policy}'", f"data.train='{train}'", *MANY_PIECES, "data.shard_examples=12"]
    assert without_ray(0, 0, "run", f"run.dir={tmp_path}/local", *inputs)["status"] == 0
    told = without_ray(6, 1, "run", f"run.dir='{object_store.uri('killed')}'", *inputs)
    assert told["kills"] == 6 and told["unfinished"] >= 3 and told["status"] == 0
    killed = object_store.get("killed", tmp_path / "killed")
    found, wanted = contents(killed), contents(tmp_path / "local")
    assert found.pop("report/index.html") and wanted.pop("report/index.html")  # it shows the run's own name
    assert found == wanted
    for file in killed.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_what_is_shown_of_a_place_in_a_store_can_be_opened_but_for_the_secret(storage):
    storage.write_bytes("masks/default/x", b"1")
    shown = storage.shown("masks/default")
    assert shown.startswith("s3://") and SECRET not in shown
    assert Storage(shown.replace("***@", f"{USER}:{SECRET}@")).read_bytes("x") == b"1"


def test_a_client_killed_between_upload_and_commit_leaves_nothing_under_the_name(object_store, tmp_path):
    """All parts of the upload have arrived when the process dies; only the request that commits them has not."""
    arrived, parts, uri = threading.Event(), [], object_store.uri("crash")
    go_on = threading.Event()

    def hold_the_commit(method: str, path: str, query: str):
        if method == "PUT" and "partNumber" in query:
            parts.append(query)
        if method == "POST" and "uploadId" in query:
            arrived.set()
            go_on.wait(60)
            return 503  # nobody is there any more to hear it
        return None

    object_store.fault = hold_the_commit
    process = python("tests.faults.write_big_file", uri, "values/part.bin")
    try:
        assert arrived.wait(60), process.communicate(timeout=1)
        process.kill()
        process.communicate(timeout=30)
    finally:
        go_on.set()
    assert len(parts) >= 2
    object_store.fault = lambda method, path, query: None
    storage = Storage(uri)
    assert not storage.exists("values/part.bin") and storage.names("values") == []
    process = python("tests.faults.write_big_file", uri, "values/part.bin")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(storage.read_bytes("values/part.bin")) == 24 << 20


def test_an_exception_while_a_part_is_written_leaves_nothing_under_its_name(storage):
    with pytest.raises(KeyError), storage.table_writer("values/part.parquet", TABLE.schema, "f") as part:
        part.write(TABLE)
        raise KeyError("in the middle")
    assert storage.names("values") == []


@pytest.mark.parametrize("status", [500, 503])
def test_errors_that_pass_are_sat_out(object_store, storage, status):
    object_store.fault = every(3, status)
    for index in range(4):
        storage.write_table(f"values/part-{index}.parquet", TABLE, "f", {"index": index})
    assert [storage.counts_of(name, "f") for name in storage.names("values")] == [{"index": i} for i in range(4)]
    assert storage.rows_of("values/part-3.parquet", "f") == 5000
    storage.remove("values")
    assert storage.names("values") == []


def test_errors_that_do_not_pass_end_in_one_that_names_the_store(object_store, storage, monkeypatch):
    monkeypatch.setattr("alphatoken.pipeline.run.attempts.PAUSES", ())
    object_store.fault = lambda method, path, query: 503 if method == "PUT" else None
    with pytest.raises(OSError, match=r"part\.parquet.*"):
        storage.write_table("values/part.parquet", TABLE, "f")
    object_store.fault = lambda method, path, query: None
    assert storage.names("values") == []


def test_access_that_is_denied_is_not_tried_again(object_store, storage):
    denied = []

    def deny(method: str, path: str, query: str):
        if method == "PUT":
            denied.append(path)
            return 403
        return None

    object_store.fault = deny
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        storage.write_bytes("values/x", b"1")
    assert len(denied) == 1


def test_a_slow_store_is_waited_for(object_store, storage):
    object_store.fault = slowly(1.5)
    storage.write_bytes("x/slow", b"content")
    assert storage.read_bytes("x/slow") == b"content"


def test_data_that_changes_has_another_fingerprint_and_is_fetched_again(object_store, tmp_path, monkeypatch):
    from alphatoken.pipeline.prepare.sources import open_sources

    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "cache"))
    found = []
    for text in ('{"a": 1}\n', '{"a": 1}\n{"a": 2}\n'):
        uri = object_store.put("changing/train.jsonl", text.encode())
        (source,) = open_sources("data.train", uri).files
        assert source.name == "s3://bucket/changing/train.jsonl"
        found.append((len(source.rows), source.fingerprint))
    assert [rows for rows, _ in found] == [1, 2] and found[0][1] != found[1][1]
    pattern = object_store.uri("changing/*.jsonl")
    assert [f.name for f in open_sources("data.train", pattern).files] == ["s3://bucket/changing/train.jsonl"]


@pytest.mark.parametrize("key", ["data.train", "model.policy", "run.dir"])
def test_a_store_that_does_not_answer_is_named_without_its_secret(
    alphatoken, tmp_path, policy, train_file, key, monkeypatch
):
    monkeypatch.setattr("alphatoken.pipeline.run.attempts.PAUSES", ())
    gone = f"s3://{USER}:{SECRET}@bucket/x.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    given = {"run.dir": tmp_path / "r", "model.policy": policy, "data.train": train_file, key: f"'{gone}'"}
    status, out, err = alphatoken("prepare", *[f"{name}={value}" for name, value in given.items()])
    assert status == (1 if key == "run.dir" else 2)
    assert "127.0.0.1:9" in err and SECRET not in out + err
    assert key == "run.dir" or key in err
    assert not Path(tmp_path / "r" / "run.json").exists()
