"""Whole jobs whose weights go from GPU to GPU."""

import pytest
import torch
from flowd_process import Flowd

STEPS = 30
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
needs_three = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three NVIDIA GPUs")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("devices", "ranks", "bound"),
    [
        pytest.param("0,1", 1, 0, marks=needs_two),
        pytest.param("0,1", 1, 2, marks=needs_two),
        pytest.param("0,1,2", 2, 1, marks=needs_three),
    ],
)
def test_weights_of_a_job_go_from_gpu_to_gpu(
    own_flowd: Flowd, devices: str, ranks: int, bound: int
) -> None:
    """One trainer GPU or two, one rollout GPU: every step says so, nothing is lost, the policies agree."""
    own_flowd.up(devices=devices)
    own_flowd.submit(
        "device",
        f"job.steps={STEPS}",
        f"job.max_staleness={bound}",
        "rollout.devices=1",
        f"trainer.devices={ranks}",
    )
    own_flowd.wait_done("device")
    lines = own_flowd.check_done("device", steps=STEPS)
    assert {line["weights_variant"] for line in lines} == {"cuda_ipc"}
    # A sampler that held other weights than the trainer's would show here.
    assert max(line["kl_sampler"] for line in lines if line["staleness_max"] == 0) < 1e-3
    log = own_flowd.ctl("logs", "device", "--actor", "rollout-0").stdout
    assert "weights come by way of the host" not in log
