"""Who may compute where: cases by hand, then a machine that tries everything."""

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowd.leases import Grant, Kill, LeaseError, LeaseTable, Revoke, StaleLease

BUDGET = 100


def table(*devices: str) -> LeaseTable:
    return LeaseTable(dict.fromkeys(devices, BUDGET), revoke_deadline_s=10.0)


def two_on_one(memory: int | None = 60, kept: int | None = None) -> LeaseTable:
    """Rollout holds the device; the trainer lives beside it."""
    leases = table("cpu:0")
    leases.add("rollout-0", ["cpu:0"], memory_bytes=memory, kept_bytes=kept)
    leases.add("trainer-0", ["cpu:0"], memory_bytes=memory)
    assert leases.want("rollout-0", 0.0) == [
        Grant(replica="rollout-0", devices=("cpu:0",), epoch=1)
    ]
    return leases


def test_a_busy_holder_is_left_alone_until_it_is_idle():
    """Cooperative: the revoke comes with the idle report, the grant with the release."""
    leases = two_on_one()
    assert leases.want("trainer-0", 1.0) == []
    assert leases.idle("rollout-0", 2.0) == [
        Revoke(replica="rollout-0", epoch=1, offload=True, deadline=12.0)
    ]
    assert leases.admits("rollout-0", 1)
    assert leases.released("rollout-0", 1, 0, 3.0) == [
        Grant(replica="trainer-0", devices=("cpu:0",), epoch=2)
    ]
    assert not leases.admits("rollout-0", 1)
    assert leases.holder("cpu:0") == "trainer-0"


def test_an_idle_holder_is_revoked_only_when_somebody_waits():
    """Idle without a waiter keeps the lease; the waiter's arrival revokes at once."""
    leases = two_on_one()
    assert leases.idle("rollout-0", 1.0) == []
    assert leases.holder("cpu:0") == "rollout-0"
    [revoke] = leases.want("trainer-0", 2.0)
    assert isinstance(revoke, Revoke)


def test_an_idle_holder_that_is_busy_again_keeps_its_lease():
    """Busy takes idle back, if nobody came in between."""
    leases = two_on_one()
    leases.idle("rollout-0", 1.0)
    assert leases.busy("rollout-0", 2.0) == []
    assert leases.want("trainer-0", 3.0) == []


@pytest.mark.parametrize(("memory", "offload"), [(50, False), (51, True), (None, True)])
def test_offload_is_asked_only_when_both_do_not_fit(memory, offload):
    """Two of 50 share 100; two of 51 do not; of an unknown size nothing can be said."""
    leases = two_on_one(memory)
    leases.idle("rollout-0", 1.0)
    [revoke] = leases.want("trainer-0", 2.0)
    assert revoke == Revoke(replica="rollout-0", epoch=1, offload=offload, deadline=12.0)


def test_what_a_replica_keeps_decides_about_offload():
    """A replica that drops its cache by itself keeps 30 of 60 and need not offload."""
    leases = two_on_one(60, kept=30)
    leases.idle("rollout-0", 1.0)
    [revoke] = leases.want("trainer-0", 2.0)
    assert isinstance(revoke, Revoke)
    assert not revoke.offload
    [grant] = leases.released("rollout-0", 1, 30, 3.0)
    assert isinstance(grant, Grant)
    assert leases.memory_bytes("cpu:0") == 90


def test_a_release_that_keeps_too_much_is_asked_to_offload():
    """The real figure counts, not the estimate: a second revoke, then the grant."""
    leases = two_on_one(60, kept=30)
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    assert leases.released("rollout-0", 1, 45, 3.0) == [
        Revoke(replica="rollout-0", epoch=1, offload=True, deadline=13.0)
    ]
    assert not leases.admits("rollout-0", 1)
    [grant] = leases.released("rollout-0", 1, 5, 4.0)
    assert isinstance(grant, Grant)


def test_who_keeps_too_much_after_offloading_is_killed():
    """Nothing else makes room, and a waiter is never left waiting for nothing."""
    leases = two_on_one(60)
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    [kill] = leases.released("rollout-0", 1, 45, 3.0)
    assert kill == Kill(
        replica="rollout-0",
        reason="keeps 45 bytes a device after offloading, and trainer-0 needs 60 of 100",
    )
    assert [type(a) for a in leases.remove("rollout-0", 4.0)] == [Grant]


def test_of_unknown_size_takes_what_the_others_can_not_offload():
    """A CUDA context can not be offloaded; it kills nobody."""
    leases = two_on_one(None)
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    [grant] = leases.released("rollout-0", 1, 7, 3.0)
    assert isinstance(grant, Grant)
    assert leases.memory_bytes("cpu:0") == BUDGET


def test_a_parked_third_is_asked_before_the_one_that_comes_back_soon():
    """Those that wait for nothing offload first, and only as many as it takes."""
    leases = table("cpu:0")
    for name in "abc":
        leases.add(name, ["cpu:0"], memory_bytes=40)
    epochs = {}
    for name in "ab":
        [grant] = leases.want(name, 0.0)
        epochs[name] = grant.epoch
        leases.released(name, grant.epoch, 40, 0.0)
    leases.add("x", ["cpu:0"], memory_bytes=20)
    assert [type(a) for a in leases.want("x", 0.0)] == [Grant]
    leases.want("c", 1.0)
    leases.want("b", 1.0)
    asked = [a for a in leases.idle("x", 2.0) if a.replica != "x"]
    assert asked == [Revoke(replica="a", epoch=epochs["a"], offload=True, deadline=12.0)]


def test_sets_are_granted_whole_and_nobody_overtakes_a_larger_set():
    """A waiter for two devices reserves both: later waiters for one of them stand behind it."""
    leases = table("cpu:0", "cpu:1")
    leases.add("r0", ["cpu:0"], memory_bytes=10)
    leases.add("r1", ["cpu:1"], memory_bytes=10)
    leases.add("late", ["cpu:1"], memory_bytes=10)
    leases.add("t", ["cpu:1", "cpu:0"], memory_bytes=10)
    leases.want("r0", 0.0)
    [r1] = leases.want("r1", 0.0)
    assert leases.want("t", 1.0) == []
    assert leases.released("r1", r1.epoch, 0, 2.0) == []
    assert leases.want("late", 3.0) == []
    assert leases.want("r1", 3.0) == []
    assert leases.queue() == ["t", "late", "r1"]
    leases.idle("r0", 4.0)
    [grant] = leases.released("r0", 1, 0, 5.0)
    assert grant == Grant(replica="t", devices=("cpu:0", "cpu:1"), epoch=3)


def test_waiters_on_other_devices_do_not_wait():
    """Only overlapping sets stand in one queue."""
    leases = table("cpu:0", "cpu:1")
    leases.add("r0", ["cpu:0"])
    leases.add("t0", ["cpu:0"])
    leases.add("r1", ["cpu:1"])
    leases.want("r0", 0.0)
    leases.want("t0", 0.0)
    assert [a.replica for a in leases.want("r1", 0.0)] == ["r1"]


def test_wanting_again_before_the_answer_keeps_the_place():
    """The holder's new wish is as old as it is, not as old as its answer."""
    leases = two_on_one()
    leases.add("late", ["cpu:0"], memory_bytes=60)
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    assert leases.want("rollout-0", 3.0) == []
    leases.want("late", 4.0)
    leases.released("rollout-0", 1, 0, 5.0)
    assert leases.lease("rollout-0").state == "waiting"
    assert leases.queue() == ["rollout-0", "late"]


def test_a_waiter_with_nothing_to_compute_leaves_the_queue():
    """Idle takes a wish back, also one made while revoked."""
    leases = two_on_one()
    leases.want("trainer-0", 1.0)
    leases.idle("trainer-0", 2.0)
    assert leases.queue() == []
    assert leases.idle("rollout-0", 3.0) == []


def test_preempt_revokes_a_busy_holder_and_drain_grants_nothing_more():
    """Scale and drain do not wait for the holder to run out of work."""
    leases = two_on_one()
    assert leases.preempt("rollout-0", 1.0, drain=True) == [
        Revoke(replica="rollout-0", epoch=1, offload=False, deadline=11.0)
    ]
    assert leases.want("rollout-0", 2.0) == []
    assert leases.released("rollout-0", 1, 0, 3.0) == []
    assert leases.want("rollout-0", 4.0) == []
    assert leases.remove("rollout-0", 5.0) == []


def test_a_missed_deadline_kills_and_the_removal_frees():
    """Late by the clock that is passed in; work and answers of the killed are refused."""
    leases = two_on_one()
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    assert leases.next_deadline() == 12.0
    assert leases.expired(11.9) == []
    assert leases.expired(12.0) == [
        Kill(replica="rollout-0", reason="did not answer a revoke within 10 s")
    ]
    assert leases.expired(99.0) == []
    assert not leases.admits("rollout-0", 1)
    with pytest.raises(StaleLease, match="being killed"):
        leases.released("rollout-0", 1, 0, 13.0)
    [grant] = leases.remove("rollout-0", 14.0)
    assert grant.replica == "trainer-0"


def test_a_dead_replica_comes_back_under_a_larger_epoch():
    """Restart under the same name: epochs go on, old answers are refused."""
    leases = two_on_one()
    leases.remove("rollout-0", 1.0)
    leases.add("rollout-0", ["cpu:0"])
    [grant] = leases.want("rollout-0", 2.0)
    assert grant.epoch == 2
    with pytest.raises(StaleLease, match="released epoch 1, but is holding in epoch 2"):
        leases.released("rollout-0", 1, 0, 3.0)
    assert not leases.admits("rollout-0", 1)


def test_answers_twice_and_work_without_a_lease_are_refused():
    """Each lease is answered once; nobody computes unasked."""
    leases = two_on_one()
    with pytest.raises(StaleLease, match="computes while parked: it must want first"):
        leases.busy("trainer-0", 1.0)
    leases.released("rollout-0", 1, 0, 1.0)
    with pytest.raises(StaleLease, match="its lease ended before"):
        leases.released("rollout-0", 1, 0, 1.0)
    with pytest.raises(StaleLease, match="not known"):
        leases.want("rollout-9", 1.0)
    assert leases.remove("rollout-9", 1.0) == []
    assert leases.preempt("rollout-9", 1.0) == []


def test_what_can_never_be_granted_is_refused_at_once():
    """A set that does not exist, and a need that is larger than the device."""
    leases = table("cpu:0", "cpu:1")
    leases.add("a", ["cpu:0"])
    for devices in ([], ["cpu:7"], ["cpu:0", "cpu:0"]):
        with pytest.raises(LeaseError, match="names each of its devices once"):
            leases.add("b", devices)
    with pytest.raises(LeaseError, match="has a lease already"):
        leases.add("a", ["cpu:0"])
    with pytest.raises(LeaseError, match="needs 101 bytes on cpu:1, which has 100"):
        leases.add("b", ["cpu:1"], memory_bytes=101)
    with pytest.raises(LeaseError, match="needs 200 bytes"):
        leases.want("a", 0.0, memory_bytes=200)
    assert leases.queue() == []


def test_a_need_told_while_computing_counts_from_the_next_grant():
    """The first grant teaches a replica its size; then both fit side by side."""
    leases = two_on_one(None)
    leases.want("rollout-0", 1.0, memory_bytes=40)
    assert leases.memory_bytes("cpu:0") == BUDGET
    leases.want("trainer-0", 2.0, memory_bytes=60)
    leases.idle("rollout-0", 3.0)
    leases.released("rollout-0", 1, 0, 4.0)
    assert leases.lease("rollout-0").memory_bytes == 40


def test_a_snapshot_restores_leases_and_starts_deadlines_anew():
    """JSON there and back; what was asked can be sent again under the same epochs."""
    leases = two_on_one()
    leases.idle("rollout-0", 1.0)
    leases.want("trainer-0", 2.0)
    again = LeaseTable.restore(json.loads(json.dumps(leases.snapshot())), now=1000.0)
    assert again.outstanding() == [
        Grant(replica="rollout-0", devices=("cpu:0",), epoch=1),
        Revoke(replica="rollout-0", epoch=1, offload=True, deadline=1010.0),
    ]
    assert again.queue() == ["trainer-0"]
    [grant] = again.released("rollout-0", 1, 0, 1001.0)
    assert (grant.replica, grant.epoch) == ("trainer-0", 2)
    with pytest.raises(LeaseError, match="version 99"):
        LeaseTable.restore({**leases.snapshot(), "version": 99}, now=0.0)


class Client:
    """A replica as it is in truth: what it was told, and what it does to the devices."""

    def __init__(self, devices: tuple[str, ...], need: int | None, floor: int) -> None:
        self.devices = devices
        self.need = need
        self.floor = floor  # what it can not offload
        self.computing = False
        self.memory = 0
        self.epoch = 0
        self.revoke: Revoke | None = None
        self.wanted: int | None = None  # its place among all wishes
        self.draining = False
        self.killed = False
        self.granted = 0


DEVICES = ("cuda:0.0", "cuda:1", "cuda:2")
NAMES = ("a", "b", "c", "d", "e")
names = st.sampled_from(NAMES)


class Leases(RuleBasedStateMachine):
    """Replicas come, want, idle, answer late or never, die; the head restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table(*DEVICES)
        self.clients: dict[str, Client] = {}
        self.now = 0.0
        self.wishes = 0
        self.epochs: dict[str, int] = {}

    @initialize()
    def two_stages(self) -> None:
        """A trainer on two devices, rollout on each of them, so that every run has contention."""
        self.add("a", ["cuda:1", "cuda:2"], 80, 0)
        self.add("b", ["cuda:1"], 60, 30)
        self.add("c", ["cuda:2"], None, 5)
        for name in "abc":
            self.want(name)

    def act(self, actions):
        for action in actions:
            client = self.clients[action.replica]
            if isinstance(action, Grant):
                self.check_grant(action, client)
                client.computing, client.epoch = True, action.epoch
                client.wanted = None
                client.granted += 1
                client.memory = client.need if client.need is not None else self.rest(client)
            elif isinstance(action, Revoke):
                assert client.epoch == action.epoch
                assert client.revoke is None
                assert client.computing or action.offload
                assert action.deadline == self.now + 10.0
                client.revoke = action
            else:
                if action.reason.startswith("keeps"):
                    assert not client.draining
                    assert client.memory <= client.floor, "killed, and was never asked to offload"
                client.killed = True
                client.wanted = None

    def check_grant(self, grant, client):
        assert grant.devices == client.devices
        assert grant.epoch > self.epochs.get(grant.replica, 0)
        self.epochs[grant.replica] = grant.epoch
        assert client.wanted is not None
        assert not client.killed
        assert not client.draining
        for other in self.clients.values():
            overlap = set(other.devices) & set(client.devices)
            assert not (overlap and other.computing), "two would compute on a device"
            if overlap and other.wanted is not None:
                assert other.wanted >= client.wanted, "a later wish overtook an earlier one"

    def rest(self, client):
        """What one of unknown size may take: what is left on the fullest of its devices."""
        return min(
            BUDGET
            - sum(c.memory for c in self.clients.values() if c is not client and d in c.devices)
            for d in client.devices
        )

    def alive(self, name):
        client = self.clients.get(name)
        return client if client and not client.killed else None

    @rule(
        name=names,
        devices=st.lists(st.sampled_from(DEVICES), min_size=1, max_size=3, unique=True),
        need=st.sampled_from([None, 20, 40, 60, 80, BUDGET]),
        floor=st.sampled_from([0, 0, 5, 30]),
    )
    def add(self, name, devices, need, floor):
        if name in self.clients:
            return
        self.table.add(name, devices, memory_bytes=need)
        floor = floor if need is None else min(floor, need)
        self.clients[name] = Client(tuple(sorted(devices)), need, floor)

    @rule(name=names)
    def die(self, name):
        if self.clients.pop(name, None):
            self.act(self.table.remove(name, self.now))

    @rule(name=names)
    def want(self, name):
        if client := self.alive(name):
            waits = client.wanted is not None
            asked = client.computing and client.revoke is None
            if not (waits or asked or client.draining):
                self.wishes += 1
                client.wanted = self.wishes
            self.act(self.table.want(name, self.now))

    @rule(name=names)
    def idle(self, name):
        if client := self.alive(name):
            client.wanted = None
            self.act(self.table.idle(name, self.now))

    @rule(name=names)
    def busy(self, name):
        if client := self.alive(name):
            if client.computing and client.revoke is None:
                self.act(self.table.busy(name, self.now))
            elif not client.computing:
                with pytest.raises(StaleLease):
                    self.table.busy(name, self.now)

    @rule(name=names, drain=st.booleans())
    def preempt(self, name, drain):
        if client := self.alive(name):
            if drain:
                client.draining = True
                client.wanted = None
            self.act(self.table.preempt(name, self.now, drain=drain))

    @rule(name=names, keep=st.floats(0, 1))
    def answer(self, name, keep):
        client = self.alive(name)
        if not client or not (client.computing or client.revoke):
            return
        offload = client.revoke is not None and client.revoke.offload
        left = min(client.floor, client.memory) if offload else int(client.memory * keep)
        client.computing, client.memory, client.revoke = False, left, None
        self.act(self.table.released(name, client.epoch, left, self.now))

    @rule(name=names, back=st.integers(1, 3))
    def answer_under_an_old_epoch(self, name, back):
        client = self.alive(name)
        if client and client.epoch:
            with pytest.raises(StaleLease):
                self.table.released(name, client.epoch - back, 0, self.now)
            assert not self.table.admits(name, client.epoch - back)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def time_passes(self, seconds):
        self.now += seconds
        late = {
            name
            for name, c in self.clients.items()
            if c.revoke and not c.killed and c.revoke.deadline <= self.now
        }
        actions = self.table.expired(self.now)
        assert {action.replica for action in actions} == late
        self.act(actions)

    @precondition(lambda self: any(c.killed for c in self.clients.values()))
    @rule()
    def the_killed_are_gone(self):
        for name in [name for name, c in self.clients.items() if c.killed]:
            self.die(name)

    @rule()
    def head_restarts(self):
        self.table = LeaseTable.restore(json.loads(json.dumps(self.table.snapshot())), self.now)
        revokes = {a.replica: a for a in self.table.outstanding() if isinstance(a, Revoke)}
        pending = {name for name, c in self.clients.items() if c.revoke and not c.killed}
        assert set(revokes) == pending
        for name, revoke in revokes.items():
            self.clients[name].revoke = revoke

    @invariant()
    def one_computes_on_a_device_and_the_table_knows_who(self):
        for device in DEVICES:
            here = [n for n, c in self.clients.items() if c.computing and device in c.devices]
            assert len(here) <= 1
            assert self.table.holder(device) == (here[0] if here else None)

    @invariant()
    def memory_is_within_the_budget(self):
        for device in DEVICES:
            used = sum(c.memory for c in self.clients.values() if device in c.devices)
            assert used <= BUDGET
            assert used <= self.table.memory_bytes(device) <= BUDGET

    @invariant()
    def the_queue_is_who_waits(self):
        waiting = [n for n, c in self.clients.items() if c.wanted is not None and not c.computing]
        waiting.sort(key=lambda n: self.clients[n].wanted)
        assert self.table.queue() == waiting

    @invariant()
    def only_holders_under_their_epoch_are_admitted(self):
        for name, c in self.clients.items():
            assert self.table.admits(name, c.epoch) == (c.computing and not c.killed)

    def teardown(self):
        """No deadlock, no starvation: if holders idle and answer, every waiter gets its turn."""
        waiting = {n: c for n, c in self.clients.items() if c.wanted is not None}
        before = {name: c.granted for name, c in waiting.items()}
        for name in [n for n, c in self.clients.items() if c.draining]:
            self.die(name)
        for _ in range(4 * len(NAMES)):
            for name in list(self.clients):
                client = self.clients[name]
                if client.killed:
                    self.die(name)
                elif client.revoke:
                    self.answer(name, 1.0)
                elif client.computing:
                    self.idle(name)
        for name, client in waiting.items():
            assert client.granted > before[name] or client.killed, f"{name} waits for ever"


Leases.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLeases = Leases.TestCase
