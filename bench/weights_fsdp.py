"""How long do new weights take from the FSDP2 shards of two ranks into two rollout replicas, each on a GPU?

    python -m bench.weights --device cuda --json

Qwen2-shaped, bfloat16, rows divided over the ranks as `fully_shard` does. Ranks and receivers are processes of their
own: on four GPUs one each, on two GPUs a rank and a receiver share one. A round lasts from telling the ranks to publish
until both say that every receiver has acknowledged their last bucket. Beside each, in the same round, the bare copies:
each rank copies its shards into tensors on the receivers' GPUs (`Tensor.copy_`), both ranks at the same time; that is
the link's bandwidth. The bar is twice the time of the bare copies.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bench.peers import Peer, ready
from bench.qwen2 import copy, make_state, randomize
from bench.weights_device import WARM_UP, make_device
from channels.messages import decode, encode
from channels.weights.delta import checksum
from channels.weights.device import (
    BUCKET_BYTES,
    DevicePublisher,
    DeviceReceiver,
    WeightsBucket,
    WeightsBucketTaken,
)

RANKS = 2
RECEIVERS = 2
AT_MOST = 2.0  # times the bare copies


def settle(*names: str) -> None:
    """Wait for all that was given to these devices."""
    for name in names:
        if name.startswith("cuda"):
            torch.cuda.synchronize(name)


def receive(socket: str, device_name: str, size: str) -> None:
    """A receiver's process: takes buckets of both ranks; its stdin asks for the checksum of what it holds."""
    device = make_device(device_name)
    state = make_state(size, device_name)
    receiver = DeviceReceiver(device, state)
    with Listener(socket, backlog=RANKS) as listener:
        ready()
        ranks = [listener.accept() for _ in range(RANKS)]
    reading = threading.Thread(target=take_all, args=(ranks, receiver))
    reading.start()
    for _ in sys.stdin:
        print(json.dumps([receiver.held, checksum(state)]), flush=True)
    reading.join()
    receiver.close()


def take_all(ranks: list[Connection], receiver: DeviceReceiver) -> None:
    """Until the ranks have ended."""
    while ranks:
        for connection in wait(ranks):
            assert isinstance(connection, Connection)
            try:
                bucket = decode(connection.recv_bytes())
            except EOFError:
                ranks.remove(connection)
                continue
            assert isinstance(bucket, WeightsBucket)
            receiver.take(bucket)
            connection.send_bytes(encode(bucket.taken()))


class Rank:
    """A rank's process."""

    def __init__(self, rank: int, store: str, here: str, size: str, receivers: list[str]) -> None:
        self.device = make_device(here)
        self.here, self.size = here, size
        kind = torch.device(here).type
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=RANKS,
        )
        mesh = init_device_mesh(kind, (RANKS,))
        self.shards: dict[str, DTensor] = {
            name: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
            for name, tensor in make_state(size, here).items()
        }
        self.rank = rank
        self.connections = {socket: Client(socket) for socket in receivers}
        self.publisher = DevicePublisher(
            self.device,
            lambda name, bucket: self.connections[name].send_bytes(encode(bucket)),
            BUCKET_BYTES,
            rank=rank,
            num_ranks=RANKS,
        )
        for socket in receivers:
            self.publisher.add_receiver(socket)
            threading.Thread(target=self._listen, args=(socket,), daemon=True).start()
        self.near: list[dict[str, torch.Tensor]] = []  # of the bare copies, by receiver

    def _listen(self, socket: str) -> None:
        while True:
            try:
                message = decode(self.connections[socket].recv_bytes())
            except (EOFError, OSError):
                self.publisher.remove_receiver(socket)
                return
            assert isinstance(message, WeightsBucketTaken)
            self.publisher.taken(socket, message)

    def change(self, version: int) -> str:
        """New weights, the same on all ranks before they are divided; their checksum."""
        whole = make_state(self.size, self.here)
        randomize(whole, version)
        for name, tensor in whole.items():
            rows = tensor.chunk(RANKS)
            mine = rows[self.rank] if self.rank < len(rows) else tensor[:0]
            self.shards[name].to_local().copy_(mine)
        settle(self.here)
        return checksum(whole)

    def publish(self, version: int) -> bool:
        """Returns whether every receiver has them."""
        took = self.publisher.publish(0, version, self.shards.items())
        return len(took) == len(self.connections)

    def bare(self, targets: list[str]) -> int:
        """Copy the shards to these GPUs; the bytes."""
        mine = {name: shard.to_local() for name, shard in self.shards.items()}
        if not self.near:
            self.near = [
                {n: torch.empty_like(t, device=d) for n, t in mine.items()} for d in targets
            ]
        for near in self.near:
            copy(near, mine)
        settle(self.here, *targets)
        return sum(tensor.nbytes for tensor in mine.values()) * len(targets)


def run_rank(rank: str, store: str, here: str, size: str, sockets: str, targets: str) -> None:
    """Answers lines of stdin: "change V", "publish V", "bare V"."""
    one = Rank(int(rank), store, here, size, sockets.split(","))
    ready()
    for line in sys.stdin:
        what, version = line.split()
        if what == "change":
            answer: Any = one.change(int(version))
        elif what == "publish":
            answer = one.publish(int(version))
        else:
            answer = one.bare(targets.split(","))
        print(json.dumps(answer), flush=True)
    # The receivers unmap the pool when they see its end.
    for connection in one.connections.values():
        connection.close()
    dist.destroy_process_group()


def ask_all(ranks: list[Peer], what: str, version: int) -> tuple[list[Any], float]:
    """What all ranks answer, working at the same time, and the seconds until the last did."""
    began = time.perf_counter()
    for rank in ranks:
        rank.tell(what, version)
    answers = [json.loads(rank.line()) for rank in ranks]
    return answers, time.perf_counter() - began


def measure(size: str, rounds: int, trainers: list[str], rollouts: list[str]) -> dict[str, Any]:
    """Milliseconds and bytes, medians over rounds. Raises RuntimeError where a receiver has other bits."""
    module = "bench.weights_fsdp"
    with tempfile.TemporaryDirectory(prefix="flowd-bench-") as directory:
        store = Path(directory) / "store"
        sockets = [str(Path(directory) / f"receiver-{i}") for i in range(len(rollouts))]
        ranks: list[Peer] = []
        receivers = [
            Peer(module, "receive", socket, device, size)
            for socket, device in zip(sockets, rollouts, strict=True)
        ]
        try:
            # They wait for each other before they are ready.
            arguments = (size, ",".join(sockets), ",".join(rollouts))
            ranks = start_together(
                module, [(str(i), str(store), d, *arguments) for i, d in enumerate(trainers)]
            )
            updates, bare = [], []
            sent = 0
            for version in range(WARM_UP + rounds):
                sums, _ = ask_all(ranks, "change", version)
                took, seconds = ask_all(ranks, "publish", version)
                copied, seconds_bare = ask_all(ranks, "bare", version)
                if not all(took):
                    raise RuntimeError("a receiver ended; its error is above")
                sent = sum(copied)
                updates.append(seconds)
                bare.append(seconds_bare)
                for receiver in receivers:
                    held, found = receiver.ask("checksum")
                    if held != [0, version] or found not in sums:
                        raise RuntimeError("a receiver holds other bits than the ranks")
        finally:
            for peer in (*ranks, *receivers):
                peer.stop()
    update, plain = statistics.median(updates[WARM_UP:]), statistics.median(bare[WARM_UP:])
    return {
        "weights_ms": round(update * 1e3, 3),
        "bare_weights_ms": round(plain * 1e3, 3),
        "bytes_sent": sent,
        "weights_gb_per_s": round(sent / update / 1e9, 1),
        "link_gb_per_s": round(sent / plain / 1e9, 1),
        "weights_over_bare": round(update / plain, 3),
        "ranks": trainers,
        "receivers": rollouts,
        "bar_reached": update <= AT_MOST * plain,
    }


def start_together(module: str, arguments: list[tuple[str, ...]]) -> list[Peer]:
    """Peers that become ready only once all of them run."""
    found: dict[int, Peer] = {}
    failed: list[BaseException] = []

    def start(place: int, given: tuple[str, ...]) -> None:
        try:
            found[place] = Peer(module, "rank", *given)
        except (RuntimeError, OSError) as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=one) for one in enumerate(arguments)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        for peer in found.values():
            peer.stop()
        raise failed[0]
    return [found[place] for place in range(len(arguments))]


ROLES = {"receive": receive, "rank": run_rank}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    ROLES[args.role](*args.arguments)
