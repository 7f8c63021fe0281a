"""What `--devices` names."""

import pytest

from flowd.devices import Gpu, Probe, device_order, host_memory, inventory, physical, probe_gpus

GIB = 2**30


def two_gpus() -> Probe:
    return Probe(
        gpus=(
            Gpu(index=0, uuid="GPU-aaaa", memory_bytes=80 * GIB, name="H"),
            Gpu(index=1, uuid="GPU-bbbb", memory_bytes=81 * GIB, name="H"),
        )
    )


def no_gpus() -> Probe:
    return Probe(gpus=(), reason="NVML: Driver Not Loaded")


def test_auto_takes_every_gpu():
    """With a driver, auto is one device per GPU, whole."""
    devices = inventory("auto", probe=two_gpus, visible="0,1")
    assert [(d.id, d.kind, d.uuid, d.memory_bytes) for d in devices] == [
        ("cuda:0", "cuda", "GPU-aaaa", 80 * GIB),
        ("cuda:1", "cuda", "GPU-bbbb", 81 * GIB),
    ]


@pytest.mark.parametrize(("cores", "expected"), [(1, 4), (2, 4), (16, 16)])
def test_auto_without_gpus_is_one_virtual_device_per_core_at_least_four(cores, expected):
    """No driver: virtual devices, never an error."""
    devices = inventory("auto", probe=no_gpus, cores=cores, host_memory_bytes=100 * GIB)
    assert [d.id for d in devices] == [f"cpu:{i}" for i in range(expected)]
    assert all(d.memory_bytes == 60 * GIB // expected for d in devices)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        ("1", ["cuda:1"]),
        ("GPU-aa", ["cuda:0"]),
        ("1,0", ["cuda:0", "cuda:1"]),
        ("0,7,1", ["cuda:0"]),
        ("", ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]),
        ("-1", ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]),
    ],
)
def test_auto_honours_cuda_visible_devices(visible, ids):
    """Schedulers hand out GPUs with the variable; NVML does not look at it, so we do."""
    devices = inventory("auto", probe=two_gpus, visible=visible, cores=2, host_memory_bytes=GIB)
    assert [d.id for d in devices] == ids


def test_a_gpu_listed_twice_gives_two_slots_of_half_its_memory():
    """ "0,0,1": slots cuda:0.0 and cuda:0.1 share GPU 0; GPU 1 stays whole."""
    devices = inventory("0,0,1", probe=two_gpus, visible="0,1")
    assert [(d.id, d.slot, d.memory_bytes) for d in devices] == [
        ("cuda:0.0", 0, 40 * GIB),
        ("cuda:0.1", 1, 40 * GIB),
        ("cuda:1", 0, 81 * GIB),
    ]
    assert [physical(d.id) for d in devices] == ["cuda:0", "cuda:0", "cuda:1"]


def test_virtual_devices_take_a_memory_budget():
    """cpu:N@SIZE sets each device's budget; without it 60 % of the host is divided."""
    assert [d.memory_bytes for d in inventory("cpu:3@512MiB")] == [512 * 2**20] * 3
    assert inventory("cpu:1@1.5GiB")[0].memory_bytes == 3 * GIB // 2
    assert [d.memory_bytes for d in inventory("cpu:2", host_memory_bytes=10 * GIB)] == [3 * GIB] * 2


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("cpu:0", "between 1 and 1024"),
        ("cpu:4000", "4000 virtual devices"),
        ("cpu", "write auto, cpu:N"),
        ("cpu:-1", "write auto, cpu:N"),
        ("cpu:4@512", "'512' is not a memory size"),
        ("cpu:4@0MiB", "above zero"),
        ("gpus", "'gpus' is not a list of devices"),
        ("0;1", "write auto, cpu:N"),
        ("", "write auto, cpu:N"),
        ("0,2", "names GPU 2, and this node has 0,1"),
    ],
)
def test_bad_specs_say_value_rule_and_way_out(spec, says):
    """What the user wrote is quoted, with what would have been right."""
    with pytest.raises(ValueError, match=says) as caught:
        inventory(spec, probe=two_gpus, visible="0,1")
    assert spec in str(caught.value)


def test_a_gpu_that_is_not_there_or_hidden_is_told_apart():
    """No driver, and CUDA_VISIBLE_DEVICES, have different ways out."""
    with pytest.raises(
        ValueError, match=r"has none \(NVML: Driver Not Loaded\): use --devices cpu:N"
    ):
        inventory("0", probe=no_gpus)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1 hides"):
        inventory("0", probe=two_gpus, visible="1")
    with pytest.raises(ValueError, match="MIG slice MIG-1234"):
        inventory("auto", probe=two_gpus, visible="MIG-1234")


def test_ids_sort_by_number_not_by_letter():
    """The global order counts: cuda:2 comes before cuda:10, slot 2 before slot 10."""
    ids = ["cuda:10", "cuda:2.10", "cuda:2.2", "cpu:11", "cpu:9"]
    assert sorted(ids, key=device_order) == ["cpu:9", "cpu:11", "cuda:2.2", "cuda:2.10", "cuda:10"]


def test_this_machine_can_be_probed():
    """The real probe answers on any machine: GPUs with facts, or a reason for none."""
    probed = probe_gpus()
    assert probed.reason or all(g.uuid and g.memory_bytes > 0 for g in probed.gpus)
    assert host_memory() > 2**28
    assert inventory("auto")
