"""Every misspelling is an error that names the nearest key; the defaults and every choice of every group compose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moetrain.config.compose import config_dir, describe_groups, load_config, to_config, to_yaml
from moetrain.config.plugins import check_plugins

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "train.steps"]),
        ("trian.steps=3", ["trian.steps", "train.steps"]),
        ("modle=tiny", ["modle", "model"]),
        ("model=tinny", ["model=tinny", "'tiny'"]),
        ("router=sigmoyd", ["router=sigmoyd", "'sigmoid'"]),
        ("router.top_kk=3", ["router.top_kk", "router.top_k"]),
        ("balance=none balance.switch.coefficient=1", ["balance.switch.coefficient", "what balance= chooses here"]),
        ("parallel.eq=3", ["parallel.eq", "parallel.ep"]),
        ("balance.switch.coeficient=1", ["balance.switch.coeficient", "balance.switch.coefficient"]),
        ("+balance.switch.coeficient=1", ["balance.switch.coeficient", "'coefficient'"]),
        ("++router._target_=moetrain.moe.router.softmax.SoftMax", ["router._target_", "cannot be imported"]),
        ("+foo=1", ["foo", "no such key"]),
        ("train.steps=abc", ["train.steps", "'abc'", "Integer"]),
        ("run.resume", ["run.resume", "key=value"]),
        ("--cfg", ["'--cfg'", "key=value"]),
        ("lr=0.1", ["lr", "'optim.lr'"]),
        ("train.lr=0.1", ["train.lr", "'optim.lr'"]),
        ("+balance.bias.rate=0.1", ["balance.bias has no _target_", "balance=bias"]),
        ("~router", ["router has no _target_", "router=..."]),
        ("train.warmup_steps=5", ["train.warmup_steps", "'optim.schedule.warmup_steps'"]),
        ("run.dir=~/runs", ["run.dir=~/runs", "quotes", f"""'run.dir="{Path.home()}/runs"'"""]),
        ("run.name=a,b", ["run.name=a,b", """'run.name="a,b"'"""]),
    ],
)
def test_a_mistake_names_itself_and_the_nearest_key(override, words):
    with pytest.raises(ValueError) as error:
        check_plugins(load_config(override.split()))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("parallel.pp_layers=4", "[4]"),
        ("train.steps=[100]", "100"),
        ("train.steps=1e3", "1000"),
        ("train.steps=null", "100"),
        ("train.precision=[bf16]", "bf16"),
        ("train.max_loss=never", "null"),
        ("data.mixture=5", "[]"),
        ("model.moe=8", "model.moe.n_experts=..."),
        ("init=runs/a", "init.from=..."),
    ],
)
def test_a_value_of_the_wrong_kind_names_one_of_the_right_kind(override, nearest):
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: .*; nearest legal value: {re.escape(nearest)}$"):
        load_config([override])


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("data.sources.jsonl.path=a", "sources.jsonl", "data=jsonl before it"),
        ("+data.sources.late.kind=text", "sources.late", "'+data.sources={late: {kind: jsonl, path: FILE}}'"),
        ("data.sources={late: {kind: text}}", "sources.late", "'+data.sources={late: {kind: jsonl, path: FILE}}'"),
        ("data.validation={v: {kind: text}}", "validation.v", "'+data.validation={v: {kind: jsonl, path: FILE}}'"),
    ],
)
def test_a_source_that_is_not_there_says_how_to_add_it(override, key, nearest):
    with pytest.raises(ValueError) as error:
        load_config([override])
    assert str(error.value) == f"data.{key}: no source of that name is chosen; nearest legal value: {nearest}"
    if nearest.startswith("'"):
        assert key.split(".")[1] in getattr(load_config([nearest.strip("'")]).data, key.split(".")[0])


def groups():
    return [
        (path.parent.name, path.stem)
        for path in sorted(config_dir().glob("*/*.yaml"))
        if path.parent.name not in ("experiment", "upcycle")  # upcycle belongs to the verb of that name
    ]


@pytest.mark.parametrize(("group", "choice"), groups())
def test_every_choice_of_every_group_composes(group, choice):
    base = ["model=deepseek_v3"] if choice in ("sigmoid", "deepseek_v3") and group == "router" else []
    config = load_config([*base, f"{group}={choice}"])
    check_plugins(config)
    assert config.run.dir.startswith("runs/")


@pytest.mark.parametrize("choice", sorted(p.stem for p in (config_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_the_command_line_wins(choice):
    assert load_config([f"experiment={choice}", "train.steps=7"]).train.steps == 7


def test_a_preset_brings_its_router_and_the_command_line_wins():
    assert load_config(["model=deepseek_v3"]).router["n_groups"] == 8
    assert "n_groups" not in load_config(["model=deepseek_v3", "router=softmax"]).router
    assert load_config(["model=deepseek_v3", "balance=none"]).balance == {}


def test_the_stored_configuration_reads_back_equal():
    config = load_config(["model=olmoe_1b_7b", "train.steps=9", "balance=[bias]"])
    assert to_config(OmegaConf.create(to_yaml(config))) == config


def test_the_schema_needs_no_torch():
    code = "import sys, moetrain.config.schema, moetrain.config.validate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_lists_every_choice_with_what_it_is():
    text = describe_groups()
    for group, choice in groups():
        lines = text.split(f"{group}=\n")[1].splitlines()
        line = next(line for line in lines if line.split()[:1] == [choice])
        assert len(line.split()) > 1, f"configs/{group}/{choice}.yaml has no comment to head it"
