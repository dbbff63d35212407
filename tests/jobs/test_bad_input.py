"""What is wrong is said in one line, with the right exit status, before any worker starts where that is possible."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config

from tests.conftest import SMALL, chat_row, save_model, save_tokenizer, write_rows


def test_wrong_keys_types_and_groups_are_all_said_at_once(alphatoken, tmp_path):
    status, out, err = alphatoken(
        "run",
        f"run.dir={tmp_path}/r",
        "mask.rhoo=0.5",
        "valuation.layers=three",
        "cluster=moon",
        "mask.rho=2",
        "data.max_length=1",
    )
    assert status == 2 and out == ""
    for text in (
        "did you mean mask.rho",
        "valuation.layers=three",
        "cluster=moon: no such choice",
        "mask.rho=2",
        "data.max_length=1",
    ):
        assert text in err
    assert not (tmp_path / "r").exists()


ONE_LINE = [
    (["valuation.scores=[paper,magic]"], "valuation.scores=magic: must be one of paper, information, loss, entropy"),
    (["mask.score=magic"], "mask.score=magic: must be one of auto, paper, information, entropy, loss, excess_loss"),
    ([f"mask.name={'x' * 300}"], "mask.name: 300 characters, and a directory's name has 200 at most"),
    (["run.seed=20261130153000"], "run.seed=20261130153000: must be at most 4294967295"),
    (["mask=magic"], "mask=magic: no such choice; choices: full, half, information, noise, paper, random"),
    (["valuation=magic"], "valuation=magic: no such choice; choices: alphatoken, direct, paper, rehearsal"),
    (["mask.score=random", "mask.loss_weight=0.5"], "mask.loss_weight=0.5: mask.score=random looks at no values"),
    (["mask.score=full", "mask.stability_weight=1"], "mask.stability_weight=1.0: mask.score=full looks at no values"),
    (["mask=random", "mask.divide_by_gradient_norm=true"], "mask.score=random looks at no values: leave it out"),
    (["valuation=rehearsal", "valuation.scores=[information,loss]"], "add paper to valuation.scores"),
    (["valuation=rehearsal", "valuation.reference_loss=true"], "a rehearsal has none, set valuation.schedule=static"),
]


@pytest.mark.parametrize("command", ["run", "mask", "plan", "submit run"])
@pytest.mark.parametrize(("overrides", "reason"), ONE_LINE, ids=[" ".join(one) for one, _ in ONE_LINE])
def test_scores_and_presets_that_do_not_exist_or_go_together_are_refused_in_a_line(
    alphatoken, tmp_path, command, overrides, reason
):
    status, out, err = alphatoken(*command.split(), f"run.dir={tmp_path}/r", *overrides)
    assert status == 2 and out == "" and reason in err, err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["valuation.scores=[loss]"], "mask.score=information needs the column information"),
        (["valuation=paper", "mask.score=entropy"], "set valuation.scores=[paper,loss,entropy]"),
        (["valuation.scores=[information]", "mask=noise"], "set valuation.scores=[information,loss]"),
        (["valuation.scores=[information]", "mask.stability_weight=1"], "set valuation.scores=[paper,information]"),
        (["mask.score=exact"], "set valuation.exact=true"),
        (["mask.score=excess_loss"], "set valuation.reference_loss=true"),
        (["valuation.scores=[]"], "set valuation.scores=[information]"),
    ],
)  # fmt: skip
def test_a_mask_of_a_column_that_the_run_will_not_have_is_refused_before_anything_runs(
    alphatoken, tmp_path, policy, train_file, overrides, remedy
):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("run", *same, *overrides)
    assert status == 2 and remedy in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "r/prepared").exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_more_layers_than_the_model_has_are_refused_before_anything_is_made(
    alphatoken, tmp_path, policy, train_file, command
):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken(command, *same, "valuation.layers=99")
    assert status == 2 and "valuation.layers=99, but LlamaForCausalLM has 3 decoder layers" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r/prepared").exists()


def test_anchor_leaves_no_trace_of_layers_that_the_model_does_not_have(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    assert alphatoken("prepare", *same)[0] == 0
    status, _, err = alphatoken("anchor", *same, "valuation.layers=99")
    assert status == 2 and "has 3 decoder layers" in err
    assert "anchor" not in json.loads((tmp_path / "r/run.json").read_text())["stages"]


def test_an_encoder_decoder_is_refused_in_a_short_line_before_anything_is_made(alphatoken, tmp_path, train_file):
    save_tokenizer(tmp_path / "t5")
    T5Config(vocab_size=320, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8).save_pretrained(tmp_path / "t5")
    same = [f"run.dir={tmp_path}/r", f"model.policy={tmp_path}/t5", f"data.train={train_file}", *SMALL]
    status, _, err = alphatoken("run", *same)
    assert status == 2 and "model.policy: t5 is no decoder-only language model" in err and len(err) < 200
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r/prepared").exists()


@pytest.mark.parametrize("place", ["foo://x/y", "file:///tmp/with blank"])
def test_a_run_directory_that_is_no_uri_is_refused_in_a_line(alphatoken, place):
    status, out, err = alphatoken("run", f"run.dir={place}")
    assert status == 2 and out == "" and f"{place}: " in err and "give a directory or a URI" in err
    assert len(err.strip().splitlines()) == 1 and "debug=true" not in err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_column_that_no_row_has_is_refused_and_another_shape_is_not_read_instead(
    alphatoken, tmp_path, policy, command
):
    rows = [chat_row(i) | {"question": f"the fox {i}", "answer": "a lazy dog"} for i in range(30)]
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", *SMALL, "data.validation=4"]
    same.append(f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}")
    status, _, err = alphatoken(command, *same, "data.columns.prompt=qestion", "data.columns.completion=answer")
    assert status == 2 and "data.columns.prompt=qestion: no row has such a column" in err and "'question'" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r/prepared").exists()


def test_a_column_that_later_rows_may_have_is_said_and_not_refused(alphatoken, tmp_path, policy):
    rows = [{"prompt": "the fox", "completion": f" jumps over {i}"} for i in range(4100)]
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", *SMALL, "data.validation=4", "data.shard_examples=1000"]
    same.append(f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}")
    status, _, err = alphatoken("prepare", *same, "data.columns.system=persona")
    assert (
        status == 0 and "data.columns.system=persona: none of the first 4,096 rows of a file has such a column" in err
    )


def test_a_reference_loss_needs_two_models(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("run", *same, f"model.reference={policy}", "valuation.reference_loss=true")
    assert status == 2 and "set model.reference to a model that was trained on good data" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r/prepared").exists()


@pytest.mark.parametrize("command", ["run", "mask", "report", "plan"])
def test_a_run_directory_of_the_former_layout_is_refused_and_not_misread(alphatoken, tmp_path, policy, command):
    manifest = {"schema": 1, "versions": {}, "configuration": {}, "stages": {}}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    status, out, err = alphatoken(command, f"run.dir={tmp_path}", f"model.policy={policy}")
    last = err.strip().splitlines()[-1]
    assert status == 1 and out == "" and "Traceback" not in err
    assert f"{tmp_path}/run.json" in last and "its schema is 1" in last and "choose another run.dir" in last
    assert json.loads((tmp_path / "run.json").read_text()) == manifest
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


def test_no_drift_with_a_stability_weight_names_the_remedies(alphatoken, tmp_path):
    status, _, err = alphatoken("run", f"run.dir={tmp_path}/r", "anchor.drift=none", "mask.stability_weight=1.5")
    assert status == 2 and "checkpoint" in err and "warmup" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["plan", "run"])
def test_no_drift_of_pairs_is_refused_as_soon_as_they_are_known_to_be_pairs(
    alphatoken, tmp_path, policy, pairs_file, command
):
    data = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={pairs_file}", "data.validation=5"]
    status, _, err = alphatoken(command, *data, *SMALL, "anchor.drift=none")
    assert status == 2 and "mask.stability_weight=1.5" in err.splitlines()[-1]
    assert not (tmp_path / "r/anchors").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (("anchor.drift=none", "mask.stability_weight=0"), "anchor.drift=none leaves no stability"),
        (("valuation.scores=[entropy]", "mask.score=entropy"), "set valuation.scores=[paper,entropy]"),
        (("valuation.schedule=rehearsal",), "a rehearsal decides with least_stable=0.0"),
        (("mask.rho=0.95",), "more than all tokens together"),
    ],
)
def test_the_least_stable_need_stability_and_room(alphatoken, tmp_path, override, reason):
    status, _, err = alphatoken("run", f"run.dir={tmp_path}/r", "mask.least_stable=0.1", *override)
    assert status == 2 and reason in err
    assert len(err.strip().splitlines()) == 1


def test_snapshots_are_of_a_warm_up_and_refused_where_there_is_none(
    alphatoken, tmp_path, policy, reference, train_file
):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("run", *same, f"model.reference={reference}", "anchor.snapshots=3")
    assert status == 2 and "set anchor.drift=warmup or anchor.snapshots=1" in err.splitlines()[-1], err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "r/prepared").exists()


def test_no_drift_is_fine_without_a_stability_weight(alphatoken, tmp_path, policy, train_file):
    status, _, err = alphatoken(
        "run", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4",
        "anchor.drift=none", "mask.stability_weight=0",
    )  # fmt: skip
    assert status == 0, err


def test_checkpoint_drift_of_equal_models_is_refused(alphatoken, tmp_path, policy, train_file):
    common = [
        f"run.dir={tmp_path}/r",
        f"model.policy={policy}",
        f"data.train={train_file}",
        *SMALL,
        "data.validation=4",
    ]
    status, _, err = alphatoken("run", *common, "anchor.drift=checkpoint")
    assert status == 2 and "anchor.drift=warmup" in err


def test_unknown_commands_and_options_are_refused(alphatoken):
    status, _, err = alphatoken("fly")
    assert status == 2 and "fly" in err and "prepare" in err
    status, _, err = alphatoken("mask", "--fast")
    assert status == 2 and "--fast" in err and "--from" in err


def test_missing_file(alphatoken, tmp_path, policy):
    status, _, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={tmp_path}/no.jsonl"
    )
    assert status == 2 and "data.train" in err and "no.jsonl: no such file" in err


def test_unreadable_model_directory(alphatoken, tmp_path, train_file):
    (tmp_path / "empty").mkdir()
    status, _, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={tmp_path}/empty", f"data.train={train_file}"
    )
    assert status == 2 and "model.policy" in err and "config.json" in err


def test_a_model_directory_that_is_not_there_is_not_taken_for_a_hub_id(alphatoken, tmp_path, train_file):
    asked = f"model.policy={tmp_path}/no-such-model"
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", asked, f"data.train={train_file}")
    assert status == 2 and f"{asked}: there is no such directory" in err and "Repo id" not in err


def test_several_values_without_m_name_the_sweep(alphatoken, tmp_path):
    status, _, err = alphatoken("mask", f"run.dir={tmp_path}/r", "mask.rho=0.3,0.5")
    assert status == 2 and "mask.rho=0.3,0.5: several values: -m tries each of them" in err
    assert "mask.rho=0.3 is one" in err and "is a list" not in err
    for typed, remedy in (
        ("mask.rho=0,5", "mask.rho=0.5 is a number"),
        ("trial.rho=0.5,0.7,[", "it cannot be read"),
        ("data.train=/a.jsonl,/b.jsonl", "data.train=[/a.jsonl,/b.jsonl] is a list"),
        ("model.policy=a,b", "model.policy=[a,b] is a list"),
    ):
        status, _, err = alphatoken("config", typed)
        assert status == 2 and remedy in err, err
    status, _, err = alphatoken("mask", "run.dir=/r/a,b")
    assert status == 2 and """'run.dir="/r/a,b"' is one text""" in err, err


def test_chat_data_without_a_template(alphatoken, tmp_path, train_file):
    plain = save_model(tmp_path / "plain", seed=3, chat_template=None)
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", f"model.policy={plain}", f"data.train={train_file}")
    assert status == 2 and "chat template" in err and str(plain) in err


def test_too_few_rows_to_hold_out(alphatoken, tmp_path, policy, train_file):
    status, _, err = alphatoken(
        "prepare", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", "data.validation=40"
    )
    assert status == 2 and "data.validation=40" in err


def test_of_few_rows_fewer_are_held_out_and_more_than_a_third_is_warned_of(alphatoken, tmp_path, policy, train_file):
    """40 rows once left 4 to train on, without a word."""
    same = [f"model.policy={policy}", f"data.train={train_file}", "cluster.cpus_per_worker=1"]
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/few", *same)
    assert status == 0 and "28 training examples" in err and "8 for validation" in err and "WARNING" not in err, err
    assert "hold out: done, 12 rows" in err
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/many", *same, "data.validation=32")
    assert status == 0 and "4 training examples" in err
    assert "WARNING: 36 of 40 rows are held out, more than a third (32 for validation, 4 Fisher prompts)" in err
    status, out, _ = alphatoken("plan", f"run.dir={tmp_path}/plan", *same)
    assert status == 0 and "28 of 40 rows" in out


def test_no_usable_rows(alphatoken, tmp_path, policy, validation_file):
    train = write_rows(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 5)
    status, _, err = alphatoken(
        "prepare",
        f"run.dir={tmp_path}/r",
        f"model.policy={policy}",
        f"data.train={train}",
        f"data.validation={validation_file}",
    )
    assert status == 1 and "usable" in err.strip().splitlines()[-1]


def test_validation_without_a_response_token(alphatoken, tmp_path, policy, train_file):
    bad = write_rows(tmp_path / "v.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3)
    status, _, err = alphatoken(
        "prepare",
        f"run.dir={tmp_path}/r",
        f"model.policy={policy}",
        f"data.train={train_file}",
        f"data.validation={bad}",
    )
    assert status == 1 and "data.validation" in err.splitlines()[-1] and "response token" in err.splitlines()[-1]


def test_damaged_parquet_is_named(alphatoken, tmp_path, policy):
    damaged = tmp_path / "d.parquet"
    damaged.write_bytes(b"PAR1 and then nothing useful")
    status, _, err = alphatoken("prepare", f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={damaged}")
    assert status == 2 and "d.parquet" in err and "parquet" in err


@pytest.mark.parametrize("command", ["prepare", "plan"])
def test_rows_of_which_none_can_be_used_are_told_with_the_reason(alphatoken, tmp_path, policy, command):
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "bot", "content": "a dog"}]}] * 30)
    status, _, err = alphatoken(
        command, f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={data}", *SMALL
    )
    last = err.splitlines()[-1]
    assert (
        status == 1 and "(unknown_role: " in last and "; the first: unknown_role: messages[0] has role 'bot'" in last
    ), err


def test_a_place_that_is_a_file_is_no_run_directory(alphatoken, tmp_path, policy, train_file):
    (tmp_path / "file").write_text("")
    status, _, err = alphatoken("run", f"run.dir={tmp_path}/file", f"model.policy={policy}", f"data.train={train_file}")
    assert status == 2 and "is a file: give a directory" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("wrong", "said", "stages"),
    [
        (["mask.always_keep=[nosuchtoken]"], "mask.always_keep=nosuchtoken: not a token", {"prepare"}),
        (["trial.auto=true", "trial.masks=[nosuch]"], "trial.masks=nosuch: neither a mask", set()),
        (["anchor.drift=checkpoint"], "model.policy and model.reference are the same", set()),
        (["data.validation=200"], "would leave none to train on", set()),
        (["run.seed=-1"], "run.seed=-1: must be at least 0", set()),
        (["anchor=unrolled", "data.validation=16", "anchor.unroll.batch_size=99"], "give a smaller one", {"prepare"}),
    ],
)
def test_what_can_be_known_is_said_before_a_model_runs(alphatoken, tmp_path, policy, train_file, wrong, said, stages):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    status, _, err = alphatoken("run", *same, *wrong)
    assert status == 2 and said in err.splitlines()[-1], err
    place = tmp_path / "r/run.json"
    found = json.loads(place.read_text())["stages"] if place.exists() else {}
    assert {
        name for name, record in found.items() if record["state"] == "done"
    } == stages and "anchor: Fisher" not in err


def test_a_stage_before_its_time_names_the_one_to_run(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/run.json").write_text("{}")
    for stage in ("anchor", "value", "mask", "report", "trial"):
        status, _, err = alphatoken(stage, *same)
        assert status == 1 and f"run.dir={tmp_path}/r: there is no such directory" in err
        assert f"runs beside it: {tmp_path}/beside" in err and "alphatoken run" in err and not (tmp_path / "r").exists()
    assert alphatoken("prepare", *same)[0] == 0
    for stage, missing in (("value", "anchor"), ("mask", "value"), ("report", "mask")):
        status, _, err = alphatoken(stage, *same)
        own = f"--from {tmp_path}/r/run.json run.dir={tmp_path}/r"
        assert status == 1 and f"run `alphatoken {missing} {own}` first" in err
    assert alphatoken("anchor", *own.split())[0] == 0  # as it says


def test_a_prepared_part_that_is_gone_is_no_empty_one(alphatoken, tmp_path, policy, train_file):
    same = [f"run.dir={tmp_path}/r", f"model.policy={policy}", f"data.train={train_file}", *SMALL, "data.validation=4"]
    assert alphatoken("prepare", *same)[0] == 0
    part = sorted((tmp_path / "r/prepared").glob("part-*"))[1]
    part.unlink()
    status, _, err = alphatoken("anchor", *same)
    assert status == 1 and f"prepared/{part.name} is missing or damaged" in err.splitlines()[-1]
    assert alphatoken("prepare", *same)[0] == 0 == alphatoken("anchor", *same)[0]


def test_nan_stops_the_run_and_names_example_and_module(alphatoken, tmp_path, policy, reference):
    train = write_rows(tmp_path / "t.jsonl", [{**chat_row(i), "id": f"row-{i}"} for i in range(20)])
    common = [
        f"run.dir={tmp_path}/r", f"model.policy={policy}", f"model.reference={reference}", f"data.train={train}", *SMALL,
        "data.validation=3",
    ]  # fmt: skip
    assert alphatoken("prepare", *common)[0] == 0 and alphatoken("anchor", *common)[0] == 0
    broken = save_model(tmp_path / "broken", seed=1)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    model.save_pretrained(broken)
    manifest = json.loads((tmp_path / "r/run.json").read_text())
    from alphatoken.pipeline.run.fingerprint import of_model

    manifest["stages"]["anchor"]["inputs"]["policy"] = of_model(str(broken))  # as if the file had rotted since
    (tmp_path / "r/run.json").write_text(json.dumps(manifest))
    status, _, err = alphatoken("value", *common[:1], f"model.policy={broken}", *common[2:])
    last = err.strip().splitlines()[-1]
    assert status == 1 and "row-" in last and "part-0000" in last and "mlp" in last
