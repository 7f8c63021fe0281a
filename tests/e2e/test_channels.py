"""`flowctl channels` on a job that runs."""

from typing import Any

from flowd_process import Flowd

ENDLESS = 100_000


def test_channels_of_a_running_job(flowd: Flowd) -> None:
    """Every edge with its transport and reason; items flow on those that a step needs; after the end, a sentence."""
    name = "channels"
    flowd.submit(name, f"job.steps={ENDLESS}", "env.actors=2", "rollout.devices=2")
    flowd.wait_step(name, 3)

    def edges() -> dict[tuple[str, str, str], dict[str, Any]]:
        rows = flowd.request("channels", job=name)["edges"]
        return {(row["channel"], row["producer"], row["consumer"]): row for row in rows}

    # A heartbeat a second tells it: the steps in between take less.
    seen = edges()
    busiest: dict[str, float] = {}
    for _ in range(40):
        for (channel, _, _), row in seen.items():
            busiest[channel] = max(busiest.get(channel, 0.0), row["items_per_s"])
        if len(seen) == 8 and len(busiest) == 3 and min(busiest.values()) > 0:
            break
        flowd.wait_step(name, flowd.status(name)["step"] + 1)
        seen = edges()
    assert set(seen) == {
        *(("tickets", "conductor", f"env-{e}") for e in range(2)),
        *(("requests", f"env-{e}", f"rollout-{r}") for e in range(2) for r in range(2)),
        *(("groups", f"env-{e}", "trainer-0") for e in range(2)),
    }
    assert min(busiest.values()) > 0, busiest
    for row in seen.values():
        assert row["transport"] == "shared_memory"
        assert row["why"].startswith("same node")
        assert row["producer_waits"] in ("", "credit", "bound")
        assert row["consumer_waits"] in ("", "items")
    printed = flowd.ctl_json("channels", name)
    assert [row.keys() for row in printed] == [row.keys() for row in seen.values()]
    assert "shared_memory: same node" in flowd.ctl("channels", name).stdout
    assert flowd.ctl("cancel", name).returncode == 0
    after = flowd.ctl("channels", name)
    assert after.returncode == 2
    assert f'job "{name}" is cancelled: channels are there while a job runs' in after.stderr
