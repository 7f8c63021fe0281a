"""`flowctl trace`: a timeline of a job."""

import argparse
import json
import os
from pathlib import Path

NAME = "trace"
HELP = "write a timeline (Chrome trace format): what each actor did, who held each device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: JOB.trace.json, here")


def run(args: argparse.Namespace) -> int:
    from flowd.console import hint, print_json
    from flowd.errors import RequestError
    from flowd.runs import existing_run, json_lines, paths_of
    from flowd.trace import chrome_trace

    run_paths = existing_run(paths_of(args), args.job)
    missing = (
        f'job "{args.job}" has no spans yet ({run_paths.spans}): they come with its first step'
    )
    trace = chrome_trace(json_lines(run_paths.spans, missing))
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
        print_json({"file": str(output.resolve()), "spans": spans})
    else:
        print(output)
        hint(f"{spans} spans; open it at https://ui.perfetto.dev or chrome://tracing")
    return 0
