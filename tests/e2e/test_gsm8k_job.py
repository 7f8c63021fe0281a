"""The gsm8k job as shipped, for two steps, on a model folder of one's own: random weights, own tokenizer, ChatML."""

import json
from pathlib import Path
from typing import Any

import pytest
from flowd_process import Flowd, lines_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sim.text.gsm8k import grade, load_problems

CONFIG = Path(__file__).parents[2] / "configs" / "gsm8k_grpo.toml"
SYSTEM = "You are a helpful assistant."
CHATML = (  # like Qwen's: a system message of its own where the conversation brings none
    "{%- if messages[0].role != 'system' -%}"
    f"{{{{ '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
ROWS = [
    {
        "question": f"Ann has {n} apples, and Bob has twice as many. How many do they have?",
        "answer": f"Bob has 2*{n}=<<2*{n}={2 * n}>>{2 * n}.\n#### {3 * n:,}",
    }
    for n in (4, 11, 500, 7, 9)
]
STEPS, GROUPS, GROUP_SIZE = 2, 3, 4
SMALL = (
    f"job.steps={STEPS}",
    f"job.groups_per_step={GROUPS}",
    f"rollout.group_size={GROUP_SIZE}",
    "rollout.max_new_tokens=16",
    f"metrics.samples_per_step={GROUPS}",
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it: Qwen2 with random weights, a byte-level BPE trained on the rows."""
    folder = tmp_path_factory.mktemp("model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row[key] for row in ROWS for key in row], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(name: str, model: Path, rows: Path) -> list[str]:
    """The shipped job with a user's own paths, made small."""
    changes = (f"job.name={name}", f"model.path={model}", f"env.args.path={rows}", *SMALL)
    return [str(CONFIG), *(word for change in changes for word in ("--set", change))]


def check_run(flowd: Flowd, name: str, model: Path, rows: Path) -> None:
    """Metrics, samples and ledger of a job that is done."""
    lines = flowd.steps(name)
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert line["groups"] == GROUPS
        assert line["samples"] == GROUPS * GROUP_SIZE
        assert line["staleness_max"] == 0
        assert line["reward_mean"] == pytest.approx(line["info_correct"], abs=1e-6)
        assert 0 < line["tokens_trained"] == line["tokens"] <= 16 * GROUPS * GROUP_SIZE
        # Sampled in bfloat16 from near-uniform weights, trained with float32 masters.
        assert 0 <= line["kl_sampler"] < 1e-3
        assert line["entropy"] > 1
    counts = flowd.audit(name)
    assert counts["committed"] == STEPS * GROUPS
    assert counts["pending"] == 0
    check_samples(list(lines_of(flowd.run(name).samples)), model, rows)


def check_samples(samples: list[dict[str, Any]], model: Path, rows: Path) -> None:
    """What the model read is the question in the folder's template; the reward is what the reply earns."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    problems = {problem.question: problem for problem in load_problems(rows)}
    assert len(samples) == STEPS * GROUPS
    for sample in samples:
        question, _, rest = sample["prompt"].partition("\n\n")
        assert rest.startswith("Think step by step")
        assert tokenizer.decode(sample["prompt_tokens"]) == (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(sample["tokens"], skip_special_tokens=True) == sample["text"]
        stopped = sample["tokens"][-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert sample["finish"] == ("stop" if stopped else "length")
        assert len(sample["logprobs"]) == len(sample["tokens"]) == len(sample["versions"])
        assert max(sample["logprobs"]) <= 0
        expected = grade(problems[question], sample["text"])
        assert sample["reward"] == expected.reward
        assert sample["info"] == expected.info


def test_shipped_job_trains_a_model_folder_through_flowd(
    flowd: Flowd, model_folder: Path, rows_file: Path
) -> None:
    """Real processes, rollout and trainer taking turns on one device, bfloat16 as shipped."""
    done = flowd.ctl("submit", *words("gsm8k", model_folder, rows_file), "--follow")
    assert done.returncode == 0, done.stderr
    check_run(flowd, "gsm8k", model_folder, rows_file)


def test_shipped_job_trains_a_model_folder_inline(
    flowd: Flowd, model_folder: Path, rows_file: Path
) -> None:
    """The same job in one process, a fresh one: it imports what it needs itself."""
    line = ("run", "--inline", *words("gsm8k-inline", model_folder, rows_file))
    done = flowd.command("flowctl", *line, cold=True)
    assert done.returncode == 0, done.stderr
    check_run(flowd, "gsm8k-inline", model_folder, rows_file)


@pytest.mark.parametrize("command", [("submit",), ("run", "--inline")])
def test_missing_model_folder_is_one_sentence(
    flowd: Flowd, tmp_path: Path, rows_file: Path, command: tuple[str, ...]
) -> None:
    """Exit code 2, the value seen and the way out; nothing is left of the job."""
    done = flowd.ctl(*command, *words("gsm8k-missing", tmp_path / "none", rows_file))
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert f'[model] path = "{tmp_path / "none"}" does not exist' in sentence
    assert "give a Hugging Face model folder; flowd downloads none" in sentence
    assert not flowd.run("gsm8k-missing").root.exists()


def test_folder_without_a_chat_template_fails_the_job_with_its_reason(
    flowd: Flowd, tmp_path: Path, model_folder: Path, rows_file: Path
) -> None:
    """A base model's folder: exit code 1, and the user reads what to put into it."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    done = flowd.ctl("run", "--inline", *words("gsm8k-base", folder, rows_file))
    assert done.returncode == 1
    assert "has no chat template: use the instruct model's tokenizer" in done.stderr
