"""`flowctl audit`: whether every group was trained once, discarded with a reason, or pends."""

import argparse

NAME = "audit"
HELP = "check a job's ledger: every group trained once, discarded with a reason, or pending"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")


def run(args: argparse.Namespace) -> int:
    from flowd.console import hint, print_json
    from flowd.errors import FlowdError
    from flowd.runs import existing_run, paths_of

    run_paths = existing_run(paths_of(args), args.job)
    if not run_paths.ledger.exists():
        raise FlowdError(
            f'job "{args.job}" has no ledger yet ({run_paths.ledger}): it comes with the first group'
        )
    from actors.conductor.ledger import audit

    report = audit(run_paths.root)
    return 0
