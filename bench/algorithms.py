"""How do the algorithms compare? Every job of configs/algorithms, from the same warmed-up model for each seed.

    python -m bench.algorithms --json

Runs go one after another through a flowd of its own. A finished run is kept in STATE_DIR/results.jsonl and not run
again, unless its job file changed; one that was interrupted is begun again. At the end, docs/algorithms.png is drawn
and the marked section of docs/algorithms.md rewritten, from all that has been measured. Delete the file after a change
of the code that should show. The machine should be idle.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import algorithm_report
from bench.algorithm_runs import (
    CONFIGS,
    Results,
    Run,
    cancel_leftovers,
    execute,
    planned,
)
from bench.local import Flowd

DEVICES = "cpu:4"  # as the demo


def carry_out(
    runs: Sequence[Run], results: Results, state_dir: Path, max_minutes: float | None
) -> tuple[int, int]:
    """Run what is missing until the time is up; a run that was begun is finished. Returns how many failed, and how many
    are missing."""
    missing = [run for run in runs if results.find(run) is None]
    if not missing or max_minutes == 0:
        return 0, len(missing)
    failed = 0
    began = time.monotonic()
    with Flowd(state_dir, DEVICES) as flowd:
        cancel_leftovers(flowd)
        for place, run in enumerate(missing):
            minutes = (time.monotonic() - began) / 60
            if max_minutes is not None and minutes >= max_minutes:
                print(f"{minutes:.0f} minutes are over", file=sys.stderr)
                break
            where = f"{len(runs) - len(missing) + place + 1}/{len(runs)}"
            try:
                record = execute(flowd, run)
            except RuntimeError as error:
                failed += 1
                print(f"{where} {run.label} seed {run.seed} failed: {error}", file=sys.stderr)
                continue
            results.add(record)
            print(
                f"{where} {run.label} seed {run.seed}: {len(record.steps)} steps, "
                f"reward {record.steps[-1]['reward_mean']:.3f}, {record.seconds:.0f} s",
                file=sys.stderr,
            )
    return failed, sum(results.find(run) is None for run in runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all runs are there, 1 when some are not."""
    names = sorted(path.stem for path in CONFIGS.glob("*.toml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--seeds", type=int, help="of each; default: 3 of some, 1 of the others")
    parser.add_argument(
        "--max-minutes", type=float, help="begin no run after this; 0 only writes the page"
    )
    parser.add_argument("--state-dir", type=Path, default=Path(".algorithms"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page lies")
    options = parser.parse_args(argv)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    state_dir = options.state_dir.resolve()
    results = Results(state_dir / "results.jsonl")
    runs = planned(options.only or names, options.seeds)
    failed, missing = carry_out(runs, results, state_dir, options.max_minutes)
    found = results.by_label()  # all that has been measured, whatever this call was asked to run
    algorithm_report.write(options.docs, names, found)
    if options.json:
        print(json.dumps(algorithm_report.figures(names, found), indent=1))
    print(f"{len(runs) - missing} of {len(runs)} runs are there, {failed} failed", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
