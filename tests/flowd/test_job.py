"""Job files: what is right is read, what is wrong gets one sentence with the way out."""

import os
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowd.errors import JobFileError
from flowd.job import dump_job, load_job, parse_job

OWN = ["env.task=my.module:Task"]  # whose arguments only its actors know
MINIMAL = '[job]\nname = "toy"\nsteps = 3\n[env]\ntask = "arithmetic"\n'


def sentence(text: str = MINIMAL, overrides: list[str] | None = None) -> str:
    """The error of a job text; checks what holds for all of them."""
    with pytest.raises(JobFileError) as raised:
        parse_job(text, "toy.toml", overrides or [])
    assert raised.value.exit_code == 2
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_minimal_job_has_the_defaults_of_every_section():
    """Only what differs from the defaults needs to be written."""
    config = parse_job(MINIMAL, "toy.toml")
    assert (config.job.name, config.job.steps, config.rollout.group_size) == ("toy", 3, 8)


@given(
    learning_rate=st.floats(1e-12, 10),
    seed=st.integers(0, 2**62),
    args=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda k: k != "path"),
        st.integers().filter(lambda n: abs(n) < 2**62)
        | st.text(st.characters(exclude_categories=["Cs"]))
        | st.lists(st.booleans()),
    ),
    stop=st.none() | st.floats(-5, 5),
)
def test_a_dumped_job_reads_back_equal(learning_rate, seed, args, stop):
    """The resolved job.toml of a run is a job file of the same job."""
    config = parse_job(MINIMAL, "toy.toml", OWN)
    config = msgspec.structs.replace(
        config,
        job=msgspec.structs.replace(config.job, seed=seed, stop_reward=stop),
        env=msgspec.structs.replace(config.env, args=args),
        trainer=msgspec.structs.replace(config.trainer, learning_rate=learning_rate),
    )
    assert parse_job(dump_job(config), "dumped") == config


def test_overrides_win_over_the_file():
    """Values as in TOML; a bare word is text; deep paths reach into task arguments."""
    config = parse_job(
        MINIMAL,
        "toy.toml",
        [
            "job.steps=7",
            "trainer.dtype=bfloat16",
            "trainer.betas=[0.8, 0.9]",
            "rollout.temperature=0",
            'job.name="other"',
            *OWN,
            "env.args.digits=3",
            "env.args.order=by size",
        ],
    )
    assert config.job.steps == 7
    assert config.job.name == "other"
    assert config.trainer.dtype == "bfloat16"
    assert config.trainer.betas == (0.8, 0.9)
    assert config.rollout.temperature == 0.0
    assert config.env.args == {"digits": 3, "order": "by size"}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.group_szie=4"], ["[rollout] group_szie = 4", "did you mean group_size?"]),
        (["rolout.group_size=4"], ["[rolout] is not a section", "did you mean rollout?"]),
        (["rollout.learning_rate=0.1"], ["belongs below [trainer]"]),
        (["rollout.zzz=1"], ["keys of [rollout] are devices, group_size"]),
        (["job.steps=many"], ['steps = "many"', "must be a whole number", "write steps = 1"]),
        (['job.steps="7"'], ["must be a whole number", "without quotes"]),
        (["rollout.group_size=2.5"], ["group_size = 2.5", "whole number", "default is 8"]),
        (["rollout.group_size=true"], ["group_size = true", "whole number"]),
        (["trainer.learning_rate=fast"], ["must be a number"]),
        (["trainer.gradient_checkpointing=1"], ["must be true or false"]),
        (["job.name=3"], ["name = 3", "must be a string"]),
        (["trainer.betas=[0.9]"], ["exactly 2 values", "default is [0.9, 0.95]"]),
        (['trainer.betas=[0.9, "x"]'], ["must be a number in every place"]),
        (["trainer.betas=[0.9, 1.5]"], ["betas = [0.9, 1.5]", "less than 1"]),
        (
            ["checkpoint.every_steps=10", "checkpoint.keep_every_steps=25"],
            ["keep_every_steps = 25", "commits come every 10 steps", "a multiple"],
        ),
        (["checkpoint.keep_best=1"], ["keep_best = 1", "[eval] every_steps = 0", "multiple"]),
        (["env.args=3"], ["must be a table", "write args = {name = value}"]),
        (["env.args.digits=3"], ["[env] args = {digits = 3}", 'did you mean "min_digits"?']),
        (["env.task=gsm8k"], ['[env] task = "gsm8k"', 'needs the argument "path"']),
        (["job.steps=1e3"], ["steps = 1000.0", "whole number", "write steps = 1000"]),
        (["job.seed=99999999999999999999"], ["[job] seed holds 99999999999999999999", "smaller"]),
        (["job.name="], ["--set job.name=", "no value after the ="]),
        (["env={}"], ["env is a section", "--set env.task=…"]),
        (["rollout.devices=0"], ["devices = 0", "must be at least 1", "default is 2"]),
        (["trainer.devices=0"], ["devices = 0", "must be at least 1"]),
        (["env.actors=0"], ["actors = 0", "must be at least 1"]),
        (["algorithm.clip_low=2.0"], ["must be less than 1"]),
        (["trainer.learning_rate=-1.0"], ["must be more than 0"]),
        (["trainer.max_grad_norm=inf"], ["must be finite"]),
        (["job.stop_reward=nan"], ["must be finite"]),
        (["env.args.day=2024-01-01"], ["dates and times", "quotes"]),
        (["job.name=my job"], ['name = "my job"', "not a job name", '"my-job"']),
        (["job.name=../x"], ["not a job name", 'such as "x"']),
        (["job.mode=colocated"], ['mode = "colocated"', "did you mean collocated?"]),
        (["rollout.adopt=groups"], ["did you mean group?"]),
        (["rollout.dtype=fp8"], ["known are bfloat16, float32"]),
        (["trainer.dtype=float23"], ["did you mean float32?"]),
        (["algorithm.name=grop"], ["did you mean grpo?"]),
        (["algorithm.loss_aggregation=tokens"], ["did you mean token?"]),
        (["algorithm.kl_place=rewards"], ["did you mean reward?"]),
        (["algorithm.correction=token"], ['correction = "token"', 'set proximal = "recomputed"']),
        (["algorithm.name=gspo", "rollout.group_size=1"], ["gspo compares the samples"]),
        (
            ["algorithm.name=ppo", "rollout.group_size=1", "algorithm.dynamic_sampling=true"],
            ["dynamic_sampling = true leaves every group", "rollout.group_size to 2"],
        ),
        (
            ["inference.devices=1"],
            ["[inference] devices = 1 has nothing to compute", "set computes"],
        ),
        (['inference.computes=["values"]'], ["set inference.devices to 1"]),
        (
            ["inference.devices=1", "inference.computes=[]"],
            ["computes = [] leaves inference actors"],
        ),
        (
            ["inference.devices=1", 'inference.computes=["value"]'],
            ['computes = ["value"] holds "value"; did you mean values?'],
        ),
        (
            ["inference.devices=1", 'inference.computes=["values"]'],
            ["grpo has no critic (ppo and decoupled_ppo have)"],
        ),
        (
            [
                "inference.devices=1",
                'inference.computes=["proximal"]',
                "algorithm.name=decoupled_ppo",
            ],
            ['has "proximal", which nobody reads', "more than one update"],
        ),
        (
            [
                "inference.devices=1",
                'inference.computes=["reference","values"]',
                "algorithm.name=ppo",
            ],
            ['has "reference"', "kl_coefficient = 0"],
        ),
        (
            [
                "inference.devices=1",
                'inference.computes=["values"]',
                "algorithm.name=ppo",
                "rollout.dtype=bfloat16",
            ],
            ['[rollout] dtype = "bfloat16" is what weights are published in', "trainer.dtype"],
        ),
        (["model.tokenizer=character"], ["did you mean characters?"]),
        (["model.hidden_size=100", "model.num_heads=8"], ["multiple of 16", "use 112"]),
        (["env.task=arithmetics"], ["is not a task", "did you mean arithmetic?"]),
        (["env.task=metaworld"], ['needs the argument "env_name"']),
        (["env.task=point_reach", "env.args.max_step=9"], ['did you mean "max_steps"?']),
        (["env.workers=999"], ["workers = 999 are more than an env actor has slots", "makes 128"]),
        (["env.task=my.module:"], ["is not a task", "module:Class"]),
        (["rollout.group_size=1"], ["group_size = 1", "zero advantage everywhere", "use 2"]),
        (["rollout.group_size=512"], ["does not fit max_running = 256", "use at most 256"]),
        (
            ["rollout.max_new_tokens=64", "rollout.max_context_tokens=64"],
            ["max_new_tokens = 64", "max_context_tokens = 64"],
        ),
        (["model.path=/no/such/model"], ["does not exist", "flowd downloads none"]),
        (["env.args.path=/no/such/data.jsonl"], ["does not exist: /no/such/data.jsonl"]),
        (["trainer.python=/no/such/python"], ["not a program that can be run", ".venv/bin/python"]),
        (["rollout.python=no-such-python"], ["not a program that can be run"]),
        (["steps=5"], ["needs its section", "--set job.steps=5"]),
        (["job.steps"], ["section.key=value"]),
        (["job.steps=[1"], ["is not TOML"]),
        (["job.steps.x=1"], ["job.steps is a value, not a table"]),
    ],
)
def test_a_wrong_override_gets_one_sentence(overrides, parts):
    """The value seen, the rule, and the way out, and where it came from."""
    message = sentence(overrides=overrides)
    assert "--set" in message
    for part in parts:
        assert part in message


def test_a_wrong_file_is_named_and_an_innocent_override_is_not():
    """The sentence begins with where the value came from."""
    text = MINIMAL + "[rollout]\ngroup_size = 1\n"
    message = sentence(text, ["job.steps=5"])
    assert message.startswith("toy.toml: [rollout] group_size = 1 gives zero advantage everywhere")


def test_missing_section_and_missing_key():
    """What has no default must be there."""
    assert "section [env] is missing" in sentence('[job]\nname = "x"\nsteps = 1\n')
    assert "[job] steps is missing" in sentence('[job]\nname = "x"\n[env]\ntask = "arithmetic"\n')


def test_values_outside_of_sections():
    """A key before the first section is told where it belongs."""
    assert "move it below [rollout]" in sentence("group_size = 4\n" + MINIMAL)
    assert "write [rollout]" in sentence("rollout = 3\n" + MINIMAL)


def test_syntax_errors_say_the_line_and_show_it():
    """TOML's own complaint, with the line it is about."""
    message = sentence('[job]\nname = "x"\nsteps 3\n')
    assert message.startswith("toy.toml, line 3")
    assert message.endswith("in: steps 3")
    assert "not TOML" in sentence('[job]\nname = "x')


def test_a_missing_file_suggests_the_near_name(tmp_path):
    """Also a folder, and a file that is not text."""
    (tmp_path / "arithmetic.toml").write_text(MINIMAL)
    with pytest.raises(JobFileError, match=r"does not exist; did you mean .*arithmetic\.toml\?"):
        load_job(tmp_path / "arithmetik.toml")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pyproject.toml").touch()
    with pytest.raises(JobFileError, match="holds no job"):  # none that is a job
        load_job(tmp_path / "other" / "project.toml")
    with pytest.raises(JobFileError, match="is a folder"):
        load_job(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(JobFileError, match=r"not UTF-8 text \(byte 0\)"):
        load_job(tmp_path / "binary.toml")


def test_a_model_path_must_be_a_folder_with_a_config(tmp_path):
    """A folder without config.json, and a file, are refused; a real one becomes absolute."""
    assert "has no config.json" in sentence(overrides=[f"model.path={tmp_path}"])
    config_file = tmp_path / "config.json"
    config_file.write_text("{}")
    assert "is not a folder" in sentence(overrides=[f"model.path={config_file}"])
    assert parse_job(MINIMAL, "t", [f"model.path={tmp_path}"]).model.path == str(tmp_path)


def test_relative_paths_become_absolute_and_links_stay(tmp_path, monkeypatch):
    """The daemon has another working directory; a virtual environment's python is a link."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("")
    Path("python").symlink_to(sys.executable)
    config = parse_job(MINIMAL, "t", [*OWN, "env.args.path=data.jsonl", "env.python=./python"])
    assert config.env.args["path"] == str(tmp_path / "data.jsonl")
    assert config.env.python == str(tmp_path / "python")
    assert os.path.islink(config.env.python)


def test_paths_within_tables_of_a_task_are_paths_too(tmp_path, monkeypatch):
    """Also in lists of tables; other keys stay as they are."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("")
    sources = 'env.args.sources=[{path = "data.jsonl", name = "data.jsonl"}]'
    config = parse_job(MINIMAL, "t", [*OWN, sources])
    (source,) = config.env.args["sources"]
    assert source == {"path": str(tmp_path / "data.jsonl"), "name": "data.jsonl"}
    assert parse_job(dump_job(config), "again").env.args == config.env.args
    wrong = [*OWN, 'env.args.sources=[{path = "nothing.jsonl"}]']
    assert f"does not exist: {tmp_path}/nothing.jsonl" in sentence(overrides=wrong)


def test_text_task_is_checked_whole_at_submit(tmp_path):
    """Tables of its arguments included."""
    data = tmp_path / "rows.jsonl"
    data.write_text("")
    right = [
        "env.task=text",
        f'env.args={{sources = [{{path = "{data}"}}], rewards = [{{function = "exact"}}]}}',
    ]
    assert parse_job(MINIMAL, "t", right).env.task == "text"
    assert "one of exact" in sentence(overrides=[*right, 'env.args.rewards=[{function = "exac"}]'])


def test_a_python_that_is_not_executable_is_refused(tmp_path):
    """A file is not enough."""
    plain = tmp_path / "python"
    plain.write_text("")
    assert "not a program that can be run" in sentence(overrides=[f"env.python={plain}"])


def test_a_task_may_be_an_import_path():
    """Tasks of one's own are found when the env actor starts."""
    assert parse_job(MINIMAL, "t", ["env.task=my.tasks:Puzzle"]).env.task == "my.tasks:Puzzle"
