"""Secure by default: no code from files, no open ports, no secrets in what is written or said."""

import os
import pickle
import socket

import psutil
import pytest
import torch

from alphatoken.pipeline.maths.model_source import ModelSource, UnreadableModel
from alphatoken.pipeline.maths.models import load_model
from alphatoken.pipeline.run.manifest import Manifest
from alphatoken.pipeline.run.redaction import redacted
from alphatoken.pipeline.run.storage import Storage
from tests.conftest import save_model
from tests.faults.interrupted_run import MANY_PIECES, family, python, until


class Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_are_a_pickle_run_no_code(tmp_path):
    model = save_model(tmp_path / "m", seed=1)
    (model / "model.safetensors").unlink()
    with open(model / "pytorch_model.bin", "wb") as file:
        pickle.dump(Opens(str(tmp_path / "executed")), file)
    with pytest.raises(UnreadableModel, match="cannot be read as a model"):
        load_model(ModelSource(str(model)), torch.device("cpu"))
    torch.save({"a": Opens(str(tmp_path / "executed"))}, model / "pytorch_model.bin")
    with pytest.raises(UnreadableModel):
        load_model(ModelSource(str(model)), torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_adapter_weights_that_are_a_pickle_run_no_code(tmp_path):
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", seed=1)
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"a": Opens(str(tmp_path / "executed"))}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, it must not have run
        load_model(ModelSource(str(tmp_path / "adapter")), torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_with_code_of_its_own_runs_none_unless_told_to(tmp_path, alphatoken, train_file):
    model = save_model(tmp_path / "m", seed=1)
    (model / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    config = (model / "config.json").read_text()
    config = config.replace('"model_type": "llama"', '"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}')
    (model / "config.json").write_text(config)
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", f"model.policy={model}", f"data.train={train_file}")
    assert status == 2 and "trust_remote_code" in err
    assert not (tmp_path / "executed").exists()


def test_the_local_ray_listens_on_the_loopback_interface_alone(tmp_path, policy, train_file):
    process = python("alphatoken.jobs", "run", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}",
                     *MANY_PIECES)  # fmt: skip
    try:
        until(lambda: any(p.name().startswith("ray::Host") for p in family(process)), 120)
        ports = []
        for member in family(process):
            try:
                ports += [(member.name(), c.laddr.ip) for c in member.net_connections() if c.status == "LISTEN"]
            except psutil.Error:
                continue
        assert len(ports) >= 5
        assert not [p for p in ports if p[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
        outer = [a.address for card in psutil.net_if_addrs().values() for a in card if a.family == socket.AF_INET]
        assert set(outer) - {"127.0.0.1"}, "this machine has no other interface to listen on"
    finally:
        for member in family(process):
            member.kill()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://user:pass/word@bucket/x", None),
        ("s3://AKIA:abc@bucket/x?region=eu", "s3://***@bucket/x?region=eu"),
        ("https://h/x?X-Amz-Signature=abc123&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("gs://b/x?access_token=abc", "gs://b/x?access_token=***"),
        ("plain /path/with@sign and key=value", "plain /path/with@sign and key=value"),
    ],
)
def test_secrets_of_uris_are_hidden(text, expected):
    if expected is None:  # a slash in a password must be escaped to be a URI at all
        expected = text
    assert redacted(text) == expected


def test_secrets_of_the_environment_do_not_reach_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "hf_0123456789abcdef")
    storage = Storage(str(tmp_path))
    manifest = Manifest(storage)
    manifest.begin("prepare", {"data": "https://x/hf_0123456789abcdef/y"}, {"model": {"policy": "hf_0123456789abcdef"}})
    manifest.note("prepare", tokenizer="s3://user:secret@bucket/m")
    written = (tmp_path / "run.json").read_text()
    assert "hf_0123456789abcdef" not in written and "secret" not in written and "s3://***@bucket/m" in written
    assert os.environ["MY_API_TOKEN"] == "hf_0123456789abcdef"


def test_a_mask_name_cannot_lead_out_of_the_run(alphatoken, tmp_path):
    for name in ("../x", "a/b", "/x", "..", ".hidden"):
        status, _, err = alphatoken("mask", f"run.dir={tmp_path}/r", f"mask.name='{name}'")
        assert status == 2 and "mask.name" in err
