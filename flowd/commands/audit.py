"""`flowctl audit`: whether every group was trained once, discarded with a reason, or pends."""

import argparse

NAME = "audit"
HELP = "check a job's ledger: every group trained once, discarded with a reason, or pending"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")


def run(args: argparse.Namespace) -> int:
    from flowd.console import hint, print_json
    from flowd.errors import FlowdError
    from flowd.runs import existing_run, last_state, paths_of

    paths = paths_of(args)
    run_paths = existing_run(paths, args.job)
    if not run_paths.ledger.exists():
        raise FlowdError(
            f'job "{args.job}" has no ledger yet ({run_paths.ledger}): it comes with the first group'
        )
    from actors.conductor.ledger import LedgerError, audit

    try:
        # Of a job that is done nothing may pend, and nothing be trained beyond the last commit.
        found = audit(run_paths.root, finished=last_state(run_paths) == "done")
    except LedgerError as error:
        raise FlowdError(f'job "{args.job}" cannot be audited: {error}') from error
    if args.json:
        print_json({"ok": found.ok, "problems": found.problems, "counts": found.counts})
    else:
        for problem in found.problems:
            print(problem)
        print("  ".join(f"{name}={count}" for name, count in found.counts.items()))
        hint("the ledger is sound" if found.ok else f"{len(found.problems)} problems")
    return 0 if found.ok else 1
