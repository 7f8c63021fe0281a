"""The micro flow: which replica runs on which devices, when a job starts and when it is scaled.

Pure decisions. A replica keeps its device set for life, so every change of the plan is a list of
replicas to start and to stop; the leases see to it that nobody computes on a device before its
holder let go. Placement, in both modes: idle devices only, the trainer first and its ranks on
distinct GPUs where possible (NCCL wants one rank a GPU), then rollout and inference, a replica a
device, where least else runs.

Disaggregated stages hold disjoint devices. Collocated, all of them share one set of as many devices
as the largest stage has, and take turns. Growing a collocated stage takes the devices that only
others use first, then idle ones, which join the shared set.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.job_config import JobConfig
from flowd.devices import Device, device_order, physical
from flowd.errors import RequestError

MODES = ("disaggregated", "collocated")
DEVICE_STAGES = ("rollout", "inference", "trainer")


class PlanError(RequestError):
    """Raised when a job or a change of it does not fit the devices that there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Processes that are leased, started and connected as one; `devices` stay the same for life.

    devices: ids in the global order; one per rank; empty for env actors, which need no device
    memory_bytes: what it needs on each of its devices while it computes; None is not known yet
    """

    id: str
    stage: str
    index: int
    devices: tuple[str, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The replicas of a job. `next_index` per stage: ids are never used twice in a job's life."""

    mode: str
    replicas: tuple[Replica, ...]
    next_index: dict[str, int] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in the order of their replicas."""
        return tuple(dict.fromkeys(replica.stage for replica in self.replicas))

    def stage(self, name: str) -> tuple[Replica, ...]:
        """The replicas of one stage, oldest first."""
        return tuple(replica for replica in self.replicas if replica.stage == name)

    def devices(self, stage: str | None = None) -> tuple[str, ...]:
        """Device ids of one stage, or of all, in the global order; a shared one is listed once."""
        held = (r.devices for r in self.replicas if stage is None or r.stage == stage)
        return tuple(sorted({device for devices in held for device in devices}, key=device_order))

    def size(self, stage: str) -> int:
        """What `scale` counts: devices of the stage, or actors where it needs no device."""
        return len(self.devices(stage)) if stage in DEVICE_STAGES else len(self.stage(stage))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """Replicas to start and ids of replicas to stop; `plan` is what holds once both are done.

    A trainer that is re-sharded appears in both: the old one stops at a step boundary and gives
    its devices back, then the new one computes on its own set. Both empty: nothing to change.
    """

    start: tuple[Replica, ...]
    stop: tuple[str, ...]
    plan: Plan


def plan(
    config: JobConfig, devices: Sequence[Device], occupied: Mapping[str, str] | None = None
) -> Plan:
    """Place a new job on the idle ones of `devices`.

    occupied: device id to who holds it (as in 'job "toy", trainer-0'); those are left alone.
    Raises PlanError for an unknown mode and when too few devices are idle.
    """
    mode = config.job.mode
    if mode not in MODES:
        raise PlanError(f"[job] mode = {mode!r} is not a mode: use {_nearest(mode, MODES)}")
    occupied = occupied or {}
    idle = [device.id for device in devices if device.id not in occupied]
    sizes = stage_devices(config)
    collocated = mode == "collocated"
    asked = max(sizes.values()) if collocated else sum(sizes.values())
    if asked > len(idle):
        raise PlanError(_too_few(config, asked, devices, idle, occupied))
    busy = Counter(physical(device) for device in occupied)
    placed: dict[str, list[str]] = {}
    if collocated:
        shared = _pick(idle, asked, busy)
        placed = {stage: shared[:size] for stage, size in sizes.items()}
    else:
        for stage in sorted(sizes, key=lambda stage: stage != "trainer"):
            placed[stage] = _pick(idle, sizes[stage], busy)
            idle = [device for device in idle if device not in placed[stage]]
            busy += Counter(map(physical, placed[stage]))
    builder = _Builder({})
    replicas = (
        *(builder.make("env", ()) for _ in range(config.env.actors)),
        *(
            builder.make(stage, (device,))
            for stage in sizes
            if stage != "trainer"
            for device in sorted(placed[stage], key=device_order)
        ),
        *([builder.make("trainer", placed["trainer"])] if "trainer" in placed else []),
    )
    return Plan(mode=mode, replicas=replicas, next_index=builder.next_index)


def stage_devices(config: JobConfig) -> dict[str, int]:
    """Devices by stage, of the stages that the job has; one of no steps only generates."""
    stages = DEVICE_STAGES if config.job.steps else ("rollout",)
    sizes = {stage: getattr(config, stage).devices for stage in stages}
    return {stage: size for stage, size in sizes.items() if size}


def plan_scale(
    current: Plan,
    stage: str,
    change: str,
    idle: Sequence[Device],
    *,
    from_stage: str | None = None,
) -> ScaleDecision:
    """Decide `flowctl scale STAGE=CHANGE [--from STAGE]`.

    change: "+2" or "-2" is relative, "3" or "=3" absolute; it counts devices, or actors of env
    idle: devices that nobody's plan uses; they are taken before `from_stage` is asked for any
    Raises PlanError, with nothing changed, when the request is not one or does not fit.
    """
    for name in (stage, from_stage):
        if name is not None and name not in current.stages:
            raise PlanError(f"no stage {name!r} in this job: use {_nearest(name, current.stages)}")
    have = current.size(stage)
    want = _target(stage, change, have)
    if stage not in DEVICE_STAGES:
        if from_stage is not None:
            raise PlanError(
                f"--from {from_stage}: {stage} counts actors and needs no devices; leave --from out"
            )
        return _scale_actors(current, stage, want)
    if from_stage is not None:
        _check_from(current, stage, from_stage)
    if want <= have:
        return _shrink(current, stage, want)
    return _grow(current, stage, want, [device.id for device in idle], from_stage)


class _Builder:
    """Makes replicas whose ids were never used before."""

    def __init__(self, next_index: Mapping[str, int]) -> None:
        self.next_index = dict(next_index)

    def make(self, stage: str, devices: Iterable[str]) -> Replica:
        index = self.next_index.get(stage, 0)
        self.next_index[stage] = index + 1
        ordered = tuple(sorted(devices, key=device_order))
        return Replica(id=f"{stage}-{index}", stage=stage, index=index, devices=ordered)


def _pick(candidates: Iterable[str], count: int, busy: Mapping[str, int]) -> list[str]:
    """Choose devices one by one: a GPU not chosen yet, then the one where least runs, then order.

    busy: physical device to the number of its slots that others use
    """
    left = sorted(candidates, key=device_order)
    chosen: list[str] = []
    own: Counter[str] = Counter()
    for _ in range(count):
        best = min(left, key=lambda device: (own[physical(device)], busy.get(physical(device), 0)))
        left.remove(best)
        chosen.append(best)
        own[physical(best)] += 1
    return chosen


def _target(stage: str, change: str, have: int) -> int:
    match = re.fullmatch(r"([+\-=]?)(\d+)", change.strip())
    if not match:
        raise PlanError(
            f"{stage}={change!r} is not a change: write {stage}=+N, {stage}=-N or {stage}=N"
        )
    number = int(match[2])
    want = {"+": have + number, "-": have - number}.get(match[1], number)
    if want < 1:
        unit = "device" if stage in DEVICE_STAGES else "actor"
        raise PlanError(
            f"{stage}={change} would leave {max(want, 0)} of {have} {unit}s, and a stage needs at "
            f"least 1: ask for {stage}=1, or `flowctl cancel` the job"
        )
    return want


def _check_from(current: Plan, stage: str, from_stage: str) -> None:
    if current.mode == "collocated":
        raise PlanError(
            f"--from {from_stage}: in collocated mode {stage} and {from_stage} share their "
            "devices, so none is taken away; leave --from out"
        )
    if from_stage == stage:
        raise PlanError(f"--from {from_stage} names the stage that grows: name another one")
    if from_stage not in DEVICE_STAGES:
        raise PlanError(
            f"--from {from_stage}: {from_stage} actors hold no devices; "
            f"use {_nearest(from_stage, [s for s in current.stages if s in DEVICE_STAGES and s != stage])}"
        )


def _scale_actors(current: Plan, stage: str, want: int) -> ScaleDecision:
    actors = current.stage(stage)
    builder = _Builder(current.next_index)
    start = [builder.make(stage, ()) for _ in range(want - len(actors))]
    return _decision(current, builder, start, actors[want:])


def _shrink(current: Plan, stage: str, want: int) -> ScaleDecision:
    builder = _Builder(current.next_index)
    replicas = current.stage(stage)
    if stage != "trainer":
        return _decision(current, builder, [], replicas[want:])  # the youngest leave
    keep = _pick(current.devices(stage), want, {})
    return _decision(current, builder, *_reshard(builder, replicas, keep))


def _grow(
    current: Plan, stage: str, want: int, idle: Sequence[str], from_stage: str | None
) -> ScaleDecision:
    held = current.devices(stage)
    missing = want - len(held)
    builder = _Builder(current.next_index)
    taken: list[str] = []
    if current.mode == "collocated":
        # Costs nobody anything: the others keep the device, and all take turns on it.
        others = [device for device in current.devices() if device not in held]
        taken += _pick(others, min(missing, len(others)), Counter(map(physical, held)))
    busy = Counter(physical(device) for device in current.devices())
    from_idle = min(missing - len(taken), len(idle))
    chosen = _pick(idle, from_idle, Counter(map(physical, held)) if stage == "trainer" else busy)
    taken += chosen
    short = missing - len(taken)
    start: list[Replica] = []
    stop: list[Replica] = []
    if short:
        given = current.devices(from_stage) if from_stage else ()
        if short > len(given) - 1:
            raise PlanError(_cannot_grow(current, stage, missing, len(taken), idle, from_stage))
        assert from_stage is not None
        start, stop, freed = _take(current, builder, from_stage, short, held)
        taken += freed
    if stage != "trainer":
        start += [builder.make(stage, (device,)) for device in sorted(taken, key=device_order)]
    else:
        more, old = _reshard(builder, current.stage(stage), [*held, *taken])
        start, stop = start + more, stop + old
    return _decision(current, builder, start, stop)


def _take(
    current: Plan, builder: _Builder, stage: str, count: int, for_devices: Sequence[str]
) -> tuple[list[Replica], list[Replica], list[str]]:
    """Free `count` devices of a stage: what starts there, what stops, and the devices."""
    replicas = current.stage(stage)
    if stage == "trainer":
        keep = _pick(current.devices(stage), len(current.devices(stage)) - count, {})
        freed = [device for device in current.devices(stage) if device not in keep]
        return *_reshard(builder, replicas, keep), freed
    freed = _pick(current.devices(stage), count, Counter(map(physical, for_devices)))
    return [], [replica for replica in replicas if set(replica.devices) & set(freed)], freed


def _reshard(
    builder: _Builder, replicas: Sequence[Replica], devices: Sequence[str]
) -> tuple[list[Replica], list[Replica]]:
    """A new trainer on `devices` in place of the old one; nothing if it holds just these."""
    if {device for replica in replicas for device in replica.devices} == set(devices):
        return [], []
    return [builder.make(replicas[0].stage, devices)], list(replicas)


def _decision(
    current: Plan, builder: _Builder, start: Sequence[Replica], stop: Sequence[Replica]
) -> ScaleDecision:
    stays = [replica for replica in current.replicas if replica not in stop]
    order = {name: position for position, name in enumerate(current.stages)}
    replicas = sorted([*stays, *start], key=lambda replica: (order[replica.stage], replica.index))
    after = replace(current, replicas=tuple(replicas), next_index=builder.next_index)
    return ScaleDecision(start=tuple(start), stop=tuple(r.id for r in stop), plan=after)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    others = " or ".join(repr(k) for k in known)
    return f"{near[0]!r}" if near else others


def _listed(ids: Sequence[str]) -> str:
    return f"{len(ids)} idle ({', '.join(ids)})" if ids else "0 idle"


def _too_few(
    config: JobConfig,
    asked: int,
    devices: Sequence[Device],
    idle: Sequence[str],
    occupied: Mapping[str, str],
) -> str:
    sizes = stage_devices(config)
    named = [f"[{stage}] devices = {size}" for stage, size in sizes.items()]
    if len(sizes) == 1:
        need, fits = named[0], f"set it to {len(idle)}"
    elif config.job.mode == "collocated":
        need = f"max({', '.join(named)}) = {asked}"
        fits = f"set {'both' if len(sizes) == 2 else 'each'} to at most {len(idle)}"
    else:
        need = f"{' + '.join(named)} = {asked}"
        shared = max(sizes.values())
        fits = f"set them to {len(idle)} together"
        if shared <= len(idle):
            fits += f', or [job] mode = "collocated" (needs {shared})'
    holders = Counter(occupied[device.id] for device in devices if device.id in occupied)
    held = "".join(f"; {who} holds {count}" for who, count in sorted(holders.items()))
    least = 1 if config.job.mode == "collocated" else len(sizes)
    out = fits if len(idle) >= least else "free some"
    return (
        f'job "{config.job.name}": {config.job.mode} needs {need} devices, and of '
        f"{len(devices)} present {_listed(idle)}{held}: {out}, "
        "or start flowd with more (--devices)"
    )


def _cannot_grow(
    current: Plan,
    stage: str,
    missing: int,
    found: int,
    idle: Sequence[str],
    from_stage: str | None,
) -> str:
    have = current.size(stage)
    holders = "".join(
        f"; {other} holds {len(current.devices(other))}"
        for other in current.stages
        if other != stage and current.devices(other)
    )
    say = f"{stage} has {have} and +{missing} was asked: {_listed(idle)}{holders}"
    if current.mode == "collocated":
        return f"{say}, of which {found} can be used: ask for at most {stage}=+{found}"
    others = [other for other in current.stages if other in DEVICE_STAGES and other != stage]
    giver = from_stage or max(others, key=current.size)
    spare = len(current.devices(giver)) - 1
    if from_stage is not None:
        return (
            f"{say}, of which {from_stage} can give {spare} and keep 1: "
            f"ask for at most {stage}=+{found + spare}"
        )
    at_most = f"ask for at most {stage}=+{found}" if found else "free a device"
    if spare >= missing - found:
        return f"{say}: {at_most}, or add --from {giver}"
    return f"{say}: {at_most}"
