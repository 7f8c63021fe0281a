"""Who runs where, at the start of a job and when it is scaled."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.conductor.config import JobSection
from actors.env.config import EnvConfig
from actors.inference.config import InferenceConfig
from actors.job_config import JobConfig
from actors.rollout.config import RolloutConfig
from actors.trainer.config import TrainerConfig
from flowd.devices import Device, Gpu, Probe, inventory, physical
from flowd.planner import Plan, PlanError, plan, plan_scale


def job(rollout=2, trainer=1, mode="disaggregated", env=2) -> JobConfig:
    return JobConfig(
        job=JobSection(name="toy", steps=1, mode=mode),
        env=EnvConfig(task="arithmetic", actors=env),
        rollout=RolloutConfig(devices=rollout),
        trainer=TrainerConfig(devices=trainer),
    )


def with_inference(devices: int, **given) -> JobConfig:
    return msgspec.structs.replace(job(**given), inference=InferenceConfig(devices=devices))


def cpus(count: int) -> list[Device]:
    return inventory(f"cpu:{count}@64MiB")


def gpu_slots(spec: str) -> list[Device]:
    gpus = tuple(Gpu(index=i, uuid=f"GPU-{i}", memory_bytes=2**30, name="H") for i in range(4))
    return inventory(spec, probe=lambda: Probe(gpus=gpus), visible="0,1,2,3")


def idle_of(current: Plan, devices: list[Device]) -> list[Device]:
    return [device for device in devices if device.id not in current.devices()]


def test_disaggregated_stages_hold_disjoint_devices():
    """One-device rollout replicas, one trainer replica, env actors without devices."""
    made = plan(job(rollout=2, trainer=2), cpus(5))
    assert [(r.id, r.devices) for r in made.replicas] == [
        ("env-0", ()),
        ("env-1", ()),
        ("rollout-0", ("cpu:2",)),
        ("rollout-1", ("cpu:3",)),
        ("trainer-0", ("cpu:0", "cpu:1")),
    ]


@pytest.mark.parametrize(("rollout", "trainer"), [(3, 1), (1, 3), (2, 2)])
def test_collocated_stages_share_the_larger_of_the_two_sets(rollout, trainer):
    """max(rollout, trainer) devices are enough, and the smaller set lies within the larger."""
    made = plan(job(rollout, trainer, "collocated"), cpus(3))
    on_rollout, on_trainer = set(made.devices("rollout")), set(made.devices("trainer"))
    assert (len(on_rollout), len(on_trainer)) == (rollout, trainer)
    assert on_rollout <= on_trainer or on_trainer <= on_rollout
    assert len(made.stage("rollout")) == rollout
    assert len(made.stage("trainer")) == 1


def test_inference_is_a_replica_a_device_like_rollout():
    """Its own devices, or in turns with the others on those of the largest stage; without any it is no stage."""
    made = plan(with_inference(2, rollout=1, trainer=2), cpus(5))
    assert [(r.id, r.devices) for r in made.replicas if r.devices] == [
        ("rollout-0", ("cpu:2",)),
        ("inference-0", ("cpu:3",)),
        ("inference-1", ("cpu:4",)),
        ("trainer-0", ("cpu:0", "cpu:1")),
    ]
    made = plan(with_inference(3, rollout=1, trainer=2, mode="collocated"), cpus(4))
    assert made.devices() == made.devices("inference") == ("cpu:0", "cpu:1", "cpu:2")
    assert "inference" not in plan(job(), cpus(4)).stages
    with pytest.raises(
        PlanError, match=r"= 1 \+ \[inference\] devices = 1 \+ \[trainer\] .* = 3 dev"
    ):
        plan(with_inference(1, rollout=1), cpus(2))


def test_inference_grows_and_shrinks_by_replicas():
    """Onto idle devices, or from a stage that is named; the youngest leave."""
    current = plan(with_inference(1, rollout=3), cpus(6))
    decision = plan_scale(current, "inference", "+2", cpus(6)[5:], from_stage="rollout")
    assert [r.id for r in decision.start] == ["inference-1", "inference-2"]
    assert len(decision.stop) == 1
    assert decision.stop[0].startswith("rollout-")
    assert plan_scale(decision.plan, "inference", "1", []).stop == ("inference-1", "inference-2")
    with pytest.raises(PlanError, match="or add --from rollout"):
        plan_scale(current, "inference", "+1", [])
    with pytest.raises(PlanError, match="no stage 'inference' in this job"):
        plan_scale(plan(job(), cpus(4)), "inference", "+1", cpus(4)[3:])


def test_occupied_devices_are_left_alone():
    """Another job's devices are not idle."""
    made = plan(job(rollout=1, trainer=1), cpus(4), {"cpu:0": "job a", "cpu:2": "job a"})
    assert made.devices() == ("cpu:1", "cpu:3")


def test_ranks_of_a_trainer_go_to_distinct_gpus():
    """NCCL refuses two ranks on one GPU; slots are for stages that share one."""
    made = plan(job(rollout=2, trainer=2), gpu_slots("0,0,1,1"))
    assert [physical(device) for device in made.devices("trainer")] == ["cuda:0", "cuda:1"]
    assert [physical(device) for device in made.devices("rollout")] == ["cuda:0", "cuda:1"]


def test_rollout_goes_where_least_runs():
    """A slot beside the trainer or beside another job comes last."""
    made = plan(job(rollout=1, trainer=1), gpu_slots("0,0,1,1,2,2"), {"cuda:1.0": "job a"})
    assert made.devices("trainer") == ("cuda:0.0",)
    assert made.devices("rollout") == ("cuda:2.0",)


def test_too_few_devices_say_numbers_holders_and_what_to_set():
    """Asked, present, idle, who holds the others, what would fit."""
    with pytest.raises(PlanError) as caught:
        plan(job(rollout=2, trainer=1), cpus(4), {"cpu:0": 'job "a"', "cpu:1": 'job "a"'})
    assert str(caught.value) == (
        'job "toy": disaggregated needs [rollout] devices = 2 + [trainer] devices = 1 = 3 devices, '
        'and of 4 present 2 idle (cpu:2, cpu:3); job "a" holds 2: set them to 2 together, '
        'or [job] mode = "collocated" (needs 2), or start flowd with more (--devices)'
    )
    with pytest.raises(PlanError, match=r"max\(.* = 3 devices, .* set both to at most 2"):
        plan(job(rollout=3, trainer=1, mode="collocated"), cpus(2))
    with pytest.raises(PlanError, match="0 idle; someone holds 1: free some"):
        plan(job(), cpus(1), {"cpu:0": "someone"})


def test_unknown_mode_suggests_the_near_one():
    """A typing error is answered with the word that was meant."""
    with pytest.raises(PlanError, match="'colocated' is not a mode: use 'collocated'"):
        plan(job(mode="colocated"), cpus(4))


def test_a_plan_survives_the_trip_to_disk():
    """Plain data: JSON there and back."""
    made = plan(job(), cpus(4))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made


def test_rollout_grows_onto_idle_devices_first():
    """With --from, the other stage is asked only for what idle devices do not cover."""
    current = plan(job(rollout=2, trainer=3), cpus(6))
    decision = plan_scale(current, "rollout", "+1", idle_of(current, cpus(6)), from_stage="trainer")
    assert [(r.id, r.devices) for r in decision.start] == [("rollout-2", ("cpu:5",))]
    assert decision.stop == ()


def test_from_takes_the_rest_from_the_named_stage():
    """trainer 3 → 2: a new trainer replica on the smaller set, the old one stops."""
    current = plan(job(rollout=2, trainer=3), cpus(6))
    decision = plan_scale(current, "rollout", "+2", idle_of(current, cpus(6)), from_stage="trainer")
    assert [(r.id, r.devices) for r in decision.start] == [
        ("trainer-1", ("cpu:0", "cpu:1")),
        ("rollout-2", ("cpu:2",)),
        ("rollout-3", ("cpu:5",)),
    ]
    assert decision.stop == ("trainer-0",)
    assert decision.plan.size("rollout") == 4
    assert decision.plan.size("trainer") == 2


def test_trainer_takes_devices_from_rollout():
    """The rollout replica on the device leaves, and the trainer is re-sharded onto the new set."""
    current = plan(job(rollout=2, trainer=1), gpu_slots("0,1,2"))
    decision = plan_scale(current, "trainer", "2", [], from_stage="rollout")
    assert [(r.id, r.devices) for r in decision.start] == [("trainer-1", ("cuda:0", "cuda:1"))]
    assert set(decision.stop) == {"rollout-0", "trainer-0"}
    assert [r.id for r in decision.plan.stage("rollout")] == ["rollout-1"]


@pytest.mark.parametrize("change", ["-2", "1", "=1"])
def test_rollout_shrinks_youngest_first_and_ids_are_never_used_again(change):
    """Relative and absolute changes agree; a replica that comes later is a new one."""
    current = plan(job(rollout=3, trainer=1), cpus(4))
    decision = plan_scale(current, "rollout", change, [])
    assert decision.start == ()
    assert decision.stop == ("rollout-1", "rollout-2")
    again = plan_scale(decision.plan, "rollout", "+1", idle_of(decision.plan, cpus(4)))
    assert [r.id for r in again.start] == ["rollout-3"]


def test_trainer_shrinks_to_a_new_replica():
    """Fewer ranks are another sharding, so another replica."""
    current = plan(job(rollout=1, trainer=2), cpus(3))
    decision = plan_scale(current, "trainer", "-1", [])
    assert [(r.id, r.devices) for r in decision.start] == [("trainer-1", ("cpu:0",))]
    assert decision.stop == ("trainer-0",)


def test_what_is_so_already_changes_nothing():
    """rollout=2 with two: done, and the trainer is not restarted for trainer=1."""
    current = plan(job(), cpus(4))
    for stage, change in [("rollout", "2"), ("trainer", "1"), ("env", "+0")]:
        decision = plan_scale(current, stage, change, idle_of(current, cpus(4)))
        assert (decision.start, decision.stop, decision.plan) == ((), (), current)


def test_env_counts_actors():
    """env=+2 starts processes, and takes no device."""
    current = plan(job(), cpus(3))
    decision = plan_scale(current, "env", "+2", [])
    assert [(r.id, r.devices) for r in decision.start] == [("env-2", ()), ("env-3", ())]
    assert plan_scale(decision.plan, "env", "1", []).stop == ("env-1", "env-2", "env-3")


def test_collocated_growth_uses_the_other_stages_devices_then_idle_ones():
    """Sharing a device costs nobody one; idle devices join the shared set."""
    current = plan(job(rollout=1, trainer=2, mode="collocated"), cpus(4))
    decision = plan_scale(current, "rollout", "+2", idle_of(current, cpus(4)))
    assert [r.devices for r in decision.start] == [("cpu:1",), ("cpu:2",)]
    assert decision.stop == ()
    with pytest.raises(PlanError, match=r"of which 3 can be used: ask for at most rollout=\+3"):
        plan_scale(current, "rollout", "+4", idle_of(current, cpus(4)))


@pytest.mark.parametrize(
    ("stage", "change", "from_stage", "says"),
    [
        ("rolout", "+1", None, "no stage 'rolout' in this job: use 'rollout'"),
        ("rollout", "+1", "trainr", "no stage 'trainr' in this job: use 'trainer'"),
        ("rollout", "many", None, r"is not a change: write rollout=\+N"),
        ("rollout", "+-1", None, "is not a change"),
        ("rollout", "-2", None, "would leave 0 of 2 devices, and a stage needs at least 1"),
        ("rollout", "0", None, "ask for rollout=1"),
        ("env", "-5", None, "would leave 0 of 2 actors"),
        ("rollout", "+2", None, r"1 idle \(cpu:4\); trainer holds 2: .*rollout=\+1, or add --from"),
        ("rollout", "+9", "trainer", r"trainer can give 1 and keep 1: .*at most rollout=\+2"),
        ("rollout", "+9", None, r"rollout has 2 and \+9 was asked"),
        ("rollout", "+2", "rollout", "names the stage that grows"),
        ("rollout", "+2", "env", "env actors hold no devices; use 'trainer'"),
        ("env", "+2", "rollout", "counts actors and needs no devices; leave --from out"),
    ],
)
def test_requests_that_do_not_fit_say_why_and_what_would(stage, change, from_stage, says):
    """Value seen, rule, way out."""
    current = plan(job(rollout=2, trainer=2), cpus(5))
    with pytest.raises(PlanError, match=says):
        plan_scale(current, stage, change, idle_of(current, cpus(5)), from_stage=from_stage)


def test_from_is_refused_where_devices_are_shared():
    """Nothing is taken away in collocated mode."""
    current = plan(job(2, 2, "collocated"), cpus(3))
    with pytest.raises(PlanError, match="share their devices"):
        plan_scale(current, "rollout", "+1", [], from_stage="trainer")


changes = st.tuples(
    st.sampled_from(["rollout", "trainer", "env"]),
    st.sampled_from(["+1", "-1", "+2", "-2", "1", "=3"]),
    st.sampled_from([None, "rollout", "trainer"]),
)


@given(
    mode=st.sampled_from(["disaggregated", "collocated"]),
    rollout=st.integers(1, 3),
    trainer=st.integers(1, 3),
    requests=st.lists(changes, max_size=8),
)
def test_every_sequence_of_changes_keeps_the_plan_sound(mode, rollout, trainer, requests):
    """Sizes are what was asked, sets disjoint where they must be, ids never used twice."""
    devices = gpu_slots("0,0,1,1,2,3")
    current = plan(job(rollout, trainer, mode), devices)
    used = {replica.id for replica in current.replicas}
    for stage, change, from_stage in requests:
        idle = idle_of(current, devices)
        try:
            decision = plan_scale(current, stage, change, idle, from_stage=from_stage)
        except PlanError:
            continue
        after = decision.plan
        relative = current.size(stage) if change[0] in "+-" else 0
        assert after.size(stage) == relative + int(change.lstrip("="))
        assert not {replica.id for replica in decision.start} & used
        used |= {replica.id for replica in decision.start}
        stays = {replica.id for replica in current.replicas} - set(decision.stop)
        assert stays | {replica.id for replica in decision.start} == {r.id for r in after.replicas}
        assert set(after.devices()) <= {device.id for device in devices}
        assert len(after.stage("trainer")) == 1
        assert all(len(replica.devices) == 1 for replica in after.stage("rollout"))
        for name in ("rollout", "trainer"):
            assert sum(len(r.devices) for r in after.stage(name)) == after.size(name) >= 1
        if mode == "disaggregated":
            assert not set(after.devices("rollout")) & set(after.devices("trainer"))
        current = after
