"""`flowctl export`: what a job learnt, as a folder that any Hugging Face tool loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flowd_process import Flowd
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.conductor.manifest import checkpoint_dir, committed_steps
from actors.retention import score_commit, scores
from actors.trainer.shard_files import Shards

NAME = "exported"


@pytest.fixture
def job(flowd: Flowd) -> str:
    """A job that is done, PPO so that it has a critic; commits at steps 5 and 10."""
    if not flowd.run(NAME).root.exists():
        flowd.submit(NAME, "job.steps=10", "algorithm.name=ppo", "trainer.learning_rate=1e-2")
        flowd.wait_done(NAME)
    return NAME


def masters(flowd: Flowd, step: int) -> Shards:
    return Shards(checkpoint_dir(flowd.run(NAME).root, step))


def check_weights(folder: Path, saved: Shards, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    parameters = dict(model.named_parameters())
    policy = {n for n in saved if n.startswith("model.") and not n.startswith("model.critic.")}
    assert {f"model.{name}" for name in parameters} == policy
    for name, parameter in parameters.items():
        assert torch.equal(parameter, saved[f"model.{name}"].to(dtype)), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_transformers_loads_what_was_trained(flowd: Flowd, job: str, tmp_path: Path) -> None:
    """Bit for bit, the newest commit; the critic stays behind, and the tokenizer comes along."""
    assert any(name.startswith("model.critic.") for name in masters(flowd, 10))
    folder = tmp_path / "new" / "folder"
    told = flowd.ctl_json("export", job, str(folder))
    assert (told["job"], told["step"], told["dtype"]) == (job, 10, "float32")
    assert told["folder"] == str(folder)
    check_weights(folder, masters(flowd, 10), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.eos_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"]
    )
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_a_step_of_a_copied_run_in_half_precision(flowd: Flowd, job: str, tmp_path: Path) -> None:
    """By the path of a run directory, with no flowd or state directory that knows it."""
    copy = tmp_path / "copy"
    shutil.copytree(flowd.run(job).root, copy)
    folder = tmp_path / "half"
    folder.mkdir()
    words = ("export", str(copy), "--step", "5", str(folder), "--dtype", "bfloat16")
    told = Flowd(tmp_path / "elsewhere").ctl_json(*words)
    assert (told["step"], told["dtype"]) == (5, "bfloat16")
    check_weights(folder, masters(flowd, 5), torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_job_starts_from_the_best_policy(flowd: Flowd, job: str, tmp_path: Path) -> None:
    """Of an earlier commit that scored better than the newest; its export is a model like any other."""
    run_dir = flowd.run(job).root
    refused = flowd.ctl("export", job, str(tmp_path / "model"), "--best")
    assert refused.returncode == 2
    assert "has no commit with a score" in refused.stderr
    assert score_commit(run_dir, 5, 0.5)
    assert score_commit(run_dir, 10, 0.25)
    folder = tmp_path / "model"
    assert flowd.ctl_json("export", job, str(folder), "--best")["step"] == 5
    name = "from-export"
    flowd.submit(name, "job.steps=1", f"model.path={folder}", "checkpoint.keep=9")
    flowd.wait_done(name)
    begun, saved = Shards(checkpoint_dir(flowd.run(name).root, 0)), masters(flowd, 5)
    for parameter in begun:
        if parameter.startswith("model."):
            assert torch.equal(begun[parameter], saved[parameter]), parameter


def test_an_export_that_fails_is_told_in_its_own_words(
    flowd: Flowd, job: str, tmp_path: Path
) -> None:
    """It runs with the trainer's interpreter; what went wrong there is the answer, exit code 1."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'a warning' >&2; echo 'BadCheckpoint: gone' >&2; exit 1\n")
    python.chmod(0o755)
    copy = tmp_path / "copy"
    shutil.copytree(flowd.run(job).root, copy)
    toml = (copy / "job.toml").read_text().replace("[trainer]", f'[trainer]\npython = "{python}"')
    (copy / "job.toml").write_text(toml)
    done = flowd.ctl("export", str(copy), str(tmp_path / "x"))
    assert done.returncode == 1
    assert done.stderr == 'error: step 10 of job "copy" cannot be exported: BadCheckpoint: gone\n'


def test_a_damaged_commit_is_told_in_one_sentence(flowd: Flowd, job: str, tmp_path: Path) -> None:
    """Exit code 1, and no folder."""
    copy = tmp_path / "copy"
    shutil.copytree(flowd.run(job).root, copy)
    (shards,) = checkpoint_dir(copy, 10).glob("state-*")
    shards.write_bytes(shards.read_bytes()[:100])
    done = flowd.ctl("export", str(copy), str(tmp_path / "x"))
    assert done.returncode == 1
    assert done.stderr.startswith('error: step 10 of job "copy" cannot be exported: BadCheckpoint:')
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_commit_that_evaluates_best_stays(flowd: Flowd) -> None:
    """Beside the newest one; every score is the evaluation's mean reward."""
    name = "keeps-best"
    flowd.submit(
        name,
        *("job.steps=12", "env.task=e2e_tasks:Parity", "trainer.learning_rate=1e-2"),
        *("eval.every_steps=3", "eval.problems=8", "eval.k=2"),
        *("checkpoint.every_steps=3", "checkpoint.keep=1", "checkpoint.keep_best=1"),
    )
    flowd.wait_done(name)
    evaluated = {
        line["step"]: line["eval_reward_mean"]
        for line in flowd.metrics(name)
        if "eval_reward_mean" in line
    }
    assert list(evaluated) == [0, 3, 6, 9, 12]
    run_dir = flowd.run(name).root
    best = max((0, 3, 6, 9), key=lambda step: (evaluated[step], step))
    assert committed_steps(run_dir) == [best, 12]
    assert scores(run_dir) == {step: evaluated[step] for step in (best, 12)}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no-such", "{tmp}/x"], 'no job "no-such"'),
        (["{tmp}/nowhere", "{tmp}/x"], "is no run directory"),
        ([NAME, "{tmp}/x", "--step", "7"], "no commit of step 7: there are 5, 10"),
        ([NAME, "{tmp}"], "not empty"),
        ([NAME, "{tmp}/file"], "not empty"),
        ([NAME, "{tmp}/file/x"], "is a file"),
        ([NAME, "{tmp}/x", "--step", "5", "--best"], "not allowed with"),
        ([NAME, "{tmp}/x", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_what_cannot_be_exported_is_said(
    flowd: Flowd, job: str, tmp_path: Path, words: list[str], says: str
) -> None:
    """One sentence, exit code 2, and nothing is left behind."""
    (tmp_path / "file").write_text("in the way")
    done = flowd.ctl("export", *(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
