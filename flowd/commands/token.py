"""`flowd token`: what other nodes need to be members of this cluster."""

import argparse

NAME = "token"
HELP = "print the cluster's token, for `flowd up --token` on other nodes; whoever has it is in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from channels.security import Security
    from flowd.auth import cluster_key, token_of
    from flowd.console import print_json
    from flowd.runs import paths_of

    key = cluster_key(paths_of(args).cluster_key)
    if args.json:
        print_json({"token": token_of(key), "cluster": Security(key).cluster})
    else:
        print(token_of(key))
    return 0
