"""`flowctl samples`: what the policy generated."""

import argparse
from typing import Any

NAME = "samples"
HELP = (
    "show what was generated: prompt, text, reward, versions, log-probs; default: of the last step"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--step", type=int, metavar="N")


def run(args: argparse.Namespace) -> int:
    from flowd.console import print_json
    from flowd.errors import FlowdError, RequestError
    from flowd.runs import existing_run, json_lines, paths_of

    run_paths = existing_run(paths_of(args), args.job)
    missing = (
        f'job "{args.job}" has no samples yet ({run_paths.samples}): they come with its first '
        "step, unless [metrics] samples_per_step = 0"
    )
    chosen: list[dict[str, Any]] = []
    steps: list[int] = []
    for sample in json_lines(run_paths.samples, missing):
        if not steps or steps[-1] != sample["step"]:
            steps.append(sample["step"])
            if args.step is None:
                chosen.clear()  # only the last step's are wanted, and this is a later one
        if args.step in (None, sample["step"]):
            chosen.append(sample)
    if not steps:
        raise FlowdError(missing)
    if not chosen:
        raise RequestError(
            f'job "{args.job}" has no samples of step {args.step}: it has steps {min(steps)} to '
            f"{max(steps)}"
        )
    for sample in chosen:
        if args.json:
            print_json(sample)
        else:
            print(sample_text(sample), end="\n\n")
    return 0


def sample_text(sample: dict[str, Any]) -> str:
    """One sample for reading."""
    from flowd.console import cell, number

    versions = sample.get("versions") or []
    logprobs = sample.get("logprobs") or []
    span = f"{min(versions)}..{max(versions)}" if versions else "-"
    if versions and min(versions) == max(versions):
        span = str(versions[0])
    lines = [
        f"step {sample['step']}  group {sample.get('group')}  sample {sample.get('sample')}  "
        f"reward {number(sample.get('reward'))}  version {span}  "
        f"tokens {len(sample.get('tokens') or [])}  finish {sample.get('finish')}",
        _indented("prompt", str(sample.get("prompt", ""))),
        _indented("text", str(sample.get("text", ""))),
    ]
    if logprobs:
        mean = sum(logprobs) / len(logprobs)
        lines.append(f"  logprobs  mean {mean:.3f}, least {min(logprobs):.3f}")
    if sample.get("info"):
        lines.append(f"  info      {cell(sample['info'])}")
    return "\n".join(lines)


def _indented(label: str, text: str) -> str:
    first, *others = text.split("\n")
    return "\n".join([f"  {label:<8}  {first}", *(" " * 12 + line for line in others)])
