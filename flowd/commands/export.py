"""`flowctl export`: a commit's policy as a folder, that of a language model as a Hugging Face one."""

import argparse
from pathlib import Path

NAME = "export"
HELP = "write the policy of a commit as a folder; a language model's is a Hugging Face one"
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job, or the path of a run directory")
    parser.add_argument("folder", metavar="DIR", help="the folder to write: new, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the commit; default: the newest")
    which.add_argument("--best", action="store_true", help="the commit that scored best")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--adapter",
        dest="part",
        action="store_const",
        const="adapter",
        help="of a job with [model.lora]: the adapter alone, as a folder that peft loads",
    )
    part.add_argument(
        "--base",
        dest="part",
        action="store_const",
        const="base",
        help="of a job with [model.lora]: the model that the adapter goes on top of",
    )
    parser.set_defaults(part="policy")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are trained"
    )


def run(args: argparse.Namespace) -> int:
    from flowd.commits import chosen_commit, write_policy
    from flowd.console import hint, print_json
    from flowd.errors import RequestError
    from flowd.job import parse_resolved
    from flowd.runs import paths_of, run_named

    run_paths = run_named(paths_of(args), args.job)
    name = run_paths.root.name
    step = chosen_commit(run_paths, args.step, best=args.best)
    folder = Path(args.folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is there and not empty: name a folder that is new or empty")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise RequestError(f"{above} is a file: a folder cannot be made in it; name another one")
    config = parse_resolved(run_paths.job_toml.read_text(), str(run_paths.job_toml))
    if args.part != "policy" and config.model.lora is None:
        raise RequestError(
            f'job "{name}" has no [model.lora], so there is no {args.part}: leave --{args.part} out for the model '
            "that it trained"
        )
    exported = write_policy(
        run_paths, config, step, folder, args.dtype, part=args.part, load_torch=True
    )
    if args.json:
        print_json({"job": name, **exported})
    else:
        print(exported["folder"])
        section = "model" if config.policy is None else "policy"
        use = f"`--set {section}.path={exported['folder']}` starts a job from it"
        if args.part == "adapter":
            use = "peft.PeftModel.from_pretrained(base, DIR) loads it; --base writes what it goes on top of"
        hint(
            f'{args.part} of step {step} of job "{name}", {exported["parameters"]} parameters in '
            f"{exported['dtype']}; {use}"
        )
    return 0
