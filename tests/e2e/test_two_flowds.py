"""Two flowds of one cluster on one host: their actors reach each other over CURVE, and nobody else reaches them.

No flowd introduces actors of another one yet: the test does, as a member of the cluster.
"""

import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from flowd_process import Flowd, kill, wait_for

from channels.lifecycle import Forget, Heartbeat, Introduce
from channels.security import Security
from channels.socket_endpoint import SocketEndpoint
from flowd.auth import cluster_key

ENDLESS = 100_000


@pytest.fixture
def flowds(own_flowds: tuple[Flowd, Flowd]) -> tuple[Flowd, Flowd]:
    """One that made the key at 127.0.0.1, and one at 127.0.0.2 that joined by its token."""
    one, other = own_flowds
    one.up("--listen", free_address("127.0.0.1"), devices="cpu:2")
    token = one.command("flowd", "token").stdout
    words = ("--devices", "cpu:2", "--listen", free_address("127.0.0.2"), "--token", "-")
    done = other.command("flowd", "up", "--detach", *words, stdin=token)
    assert done.returncode == 0, done.stderr
    return one, other


def free_address(host: str) -> str:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def place(flowd: Flowd, job: str, actor: str) -> str:
    """Where an actor listens for other nodes."""
    (found,) = (a["remote_address"] for a in flowd.actors(job) if a["name"] == actor)
    return str(found)


def far_edge(flowd: Flowd, job: str) -> dict[str, Any] | None:
    """The row of `flowctl channels` about an actor of another flowd."""
    rows = [r for r in flowd.request("channels", job=job)["edges"] if "/" in r["consumer"]]
    return rows[0] if rows else None


async def tell(security: Security | None, name: str, *letters: tuple[str, Any]) -> None:
    """Send messages from an endpoint of our own, each to an address."""
    endpoint = SocketEndpoint(name, "tcp://127.0.0.1:*", security=security)
    for number, (address, message) in enumerate(letters):
        endpoint.connect(str(number), address)
        endpoint.send(str(number), message)
    endpoint.close()  # what was sent has half a second to leave, in a thread of ZeroMQ's


def test_actors_of_two_flowds(flowds: tuple[Flowd, Flowd]) -> None:
    """Items cross enciphered; outsiders are refused and told; a killed peer is forgotten, and both jobs go on."""
    one, other = flowds
    for flowd, job in ((one, "near"), (other, "far")):
        flowd.submit(job, f"job.steps={ENDLESS}", "rollout.devices=1")
        flowd.wait_step(job, 1)
    env, rollout = place(one, "near", "env-0"), place(other, "far", "rollout-0")
    assert env.startswith("tcp://127.0.0.1:")
    assert rollout.startswith("tcp://127.0.0.2:")

    def transports() -> set[str]:
        return {row["transport"] for row in one.request("channels", job="near")["edges"]}

    wait_for(transports, "a heartbeat that tells of channels")
    assert transports() == {"shared_memory"}

    member = Security(cluster_key(other.paths.cluster_key))
    introductions = (
        (env, Introduce(peer="far/rollout-0", kind="rollout", address=rollout, epoch=0)),
        (rollout, Introduce(peer="near/env-0", kind="env", address=env, epoch=0)),
    )
    asyncio.run(tell(member, "broker", *introductions))
    wait_for(
        lambda: (far_edge(one, "near") or {"items_per_s": 0})["items_per_s"] > 0,
        "requests to cross",
    )
    edge = far_edge(one, "near")
    assert edge is not None
    assert (edge["producer"], edge["consumer"]) == ("env-0", "far/rollout-0")
    assert edge["transport"] == "tcp (curve)"

    stranger = Security(bytes(32))
    for security, why in ((None, "none"), (stranger, "has not the key of this cluster")):
        heartbeat = Heartbeat(actor="rollout-0", job="far", epoch=0, report={})
        asyncio.run(tell(security, "far/rollout-0", (env, heartbeat)))
        log = one.run("near").actor_log("env-0")
        wait_for(lambda log=log, why=why: told(log, why), f"a refusal in {log}")
    assert log.read_text().count("has not the key") == 1

    kill(other.pid_of("far", "rollout-0"))
    wait_for(lambda: other.actors("far", "rollout")[0]["restarts"] == 1, "flowd to notice")
    gone = Forget(peer="far/rollout-0", kind="rollout", epoch=0, reason="killed")
    asyncio.run(tell(member, "broker", (env, gone)))
    wait_for(lambda: far_edge(one, "near") is None, "the dead peer to be forgotten")
    for flowd, job in ((one, "near"), (other, "far")):
        flowd.wait_step(job, flowd.status(job)["step"] + 2)
        assert flowd.ctl("cancel", job).returncode == 0


def told(log: Path, why: str) -> bool:
    return any("refused connection to" in line and why in line for line in lines(log))


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_an_address_that_is_taken(own_flowd: Flowd) -> None:
    """A sentence, and exit code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done: subprocess.CompletedProcess[str] = own_flowd.command(
            "flowd", "up", "--detach", "--devices", "cpu:1", "--listen", listen
        )
    assert done.returncode == 2
    assert f"cannot bind {listen}" in done.stderr
