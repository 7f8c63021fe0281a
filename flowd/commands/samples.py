"""`flowctl samples`: what the policy generated."""

import argparse
from collections.abc import Mapping
from typing import Any

NAME = "samples"
HELP = (
    "show what was generated: prompt, text, reward, versions, log-probs; default: of the last step"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--step", type=int, metavar="N")
    parser.add_argument(
        "--eval",
        action="store_true",
        help="of evaluations; --step N is then the policy after N steps",
    )
    parser.add_argument(
        "--rolled-back", action="store_true", help="also of steps that a rollback took back"
    )


def run(args: argparse.Namespace) -> int:
    from actors.conductor.ledger import LedgerError, beginnings
    from flowd.console import print_json
    from flowd.errors import FlowdError, RequestError
    from flowd.runs import existing_run, json_lines, paths_of

    run_paths = existing_run(paths_of(args), args.job)
    file = run_paths.eval_samples if args.eval else run_paths.samples
    comes = (
        "evaluation, which [eval] asks for, unless [eval] record = 0"
        if args.eval
        else "step, unless [metrics] samples_per_step = 0"
    )
    missing = f'job "{args.job}" has no samples yet ({file}): they come with its first {comes}'
    try:
        began_at = {} if args.rolled_back else beginnings(run_paths.root)
    except LedgerError as error:
        raise FlowdError(
            f"{error}; --rolled-back shows all samples, which needs no ledger"
        ) from error
    chosen: list[dict[str, Any]] = []
    steps: list[int] = []
    hidden: set[int] = set()
    for sample in json_lines(file, missing):
        if was_rolled_back(sample, began_at):
            hidden.add(sample["step"])
            continue
        if not steps or steps[-1] != sample["step"]:
            steps.append(sample["step"])
            if args.step is None:
                chosen.clear()  # only the last step's are wanted, and this is a later one
        if args.step in (None, sample["step"]):
            chosen.append(sample)
    if not chosen and (args.step in hidden if args.step is not None else hidden):
        which = "all steps with samples were" if args.step is None else f"step {args.step} was"
        raise FlowdError(
            f'job "{args.job}": {which} rolled back and not taken again yet; --rolled-back shows them'
        )
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


def was_rolled_back(sample: Mapping[str, Any], began_at: Mapping[int, int]) -> bool:
    """Whether a later run attempt began at the sample's step or before. began_at: step by run attempt

    The policy after so many steps, which an evaluation is of, is that of an attempt which began there too.
    """
    first_lost = sample["step"] - ("problem" in sample)
    return any(
        attempt > sample["attempt"] and step <= first_lost for attempt, step in began_at.items()
    )


def sample_text(sample: dict[str, Any]) -> str:
    """One sample for reading."""
    from flowd.console import cell, number

    versions = sample.get("versions") or []
    logprobs = sample.get("logprobs") or []
    span = f"{min(versions)}..{max(versions)}" if versions else "-"
    if versions and min(versions) == max(versions):
        span = str(versions[0])
    attempt = f"  attempt {sample['attempt']}" if sample.get("attempt") else ""
    lines = [
        f"step {sample['step']}{attempt}  {_of(sample)}  sample {sample.get('sample')}  "
        f"reward {number(sample.get('reward'))}  version {span}  "
        + (
            f"value {number(sample.get('value'))}"
            if "chunk" in sample
            else f"tokens {len(sample.get('tokens') or [])}  finish {sample.get('finish')}"
        ),
    ]
    if "chunk" in sample:
        lines += [
            _indented("saw", cell(sample.get("observation"))),
            _indented("did", cell(sample["chunk"])),
        ]
    else:
        lines.append(_indented("prompt", str(sample.get("prompt", ""))))
        lines.append(_indented("text", str(sample.get("text", ""))))
    if logprobs:
        mean = sum(logprobs) / len(logprobs)
        lines.append(f"  logprobs  mean {mean:.3f}, least {min(logprobs):.3f}")
    if sample.get("info"):
        lines.append(f"  info      {cell(sample['info'])}")
    return "\n".join(lines)


def _of(sample: dict[str, Any]) -> str:
    if "problem" in sample:
        return f"problem {sample['problem']}  {sample['mode']}"
    return f"group {sample.get('group')}"


def _indented(label: str, text: str) -> str:
    first, *others = text.split("\n")
    return "\n".join([f"  {label:<8}  {first}", *(" " * 12 + line for line in others)])
