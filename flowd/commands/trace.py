"""`flowctl trace`: a timeline of a job."""

import argparse
import json
import os
from datetime import datetime
from pathlib import Path

NAME = "trace"
HELP = "write a timeline (Chrome trace format): what each actor did, who held each device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: JOB.trace.json, here")


def run(args: argparse.Namespace) -> int:
    from flowd.console import hint, print_json
    from flowd.errors import RequestError
    from flowd.runs import existing_run, paths_of
    from flowd.trace import chrome_trace, read_spans

    run_paths = existing_run(paths_of(args), args.job)
    missing = (
        f'job "{args.job}" has no spans yet ({run_paths.spans}): they come with its first step'
    )
    kept, complete_from = read_spans(run_paths, missing)
    trace = chrome_trace(kept, complete_from)
    output = Path(args.output or f"{args.job}.trace.json")
    # Whole or not at all: a viewer may be opening the file of the last call.
    partial = output.with_name(output.name + ".part")
    try:
        partial.write_text(json.dumps(trace))
        os.replace(partial, output)
    except OSError as error:
        raise RequestError(
            f"{output} cannot be written ({error.strerror}): name another file with --output"
        ) from None
    spans = sum(event["ph"] == "X" for event in trace["traceEvents"])
    if args.json:
        print_json({"file": str(output.resolve()), "spans": spans, "complete_from": complete_from})
    else:
        print(output)
        if complete_from is not None:
            moment = datetime.fromtimestamp(complete_from).astimezone()
            hint(f"older spans were dropped; all are there from {moment:%Y-%m-%d %H:%M:%S %Z} on")
        hint(f"{spans} spans; open it at https://ui.perfetto.dev or chrome://tracing")
    return 0
