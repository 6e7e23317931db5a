"""Choices by hardware, on machines that files and patches pretend."""

import os

import psutil
import pytest
import torch

from deepseek_vl2.models.machine_limits import free_bytes
from deepseek_vl2.utils import hardware
from deepseek_vl2.utils.hardware import (
    available_bytes,
    choose_device,
    choose_dtype,
    choose_num_threads,
    cpu_quota,
    num_physical_cores,
    use_chosen_num_threads,
)

CPU = torch.device("cpu")
GB = 10**9


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def no_variables(monkeypatch):
    for name in hardware.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_device(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    choice = choose_device()
    assert choice.value == torch.device(chosen)
    assert {"cuda": "Some GPU", "mps": "Apple", "cpu": "neither"}[chosen] in choice.reason


@pytest.mark.parametrize(
    ("support", "num_bytes", "chosen", "reason"),
    [
        ("native", None, torch.bfloat16, "has instructions for bfloat16"),
        ("unknown", None, torch.bfloat16, "unknown"),
        ("none", None, torch.float32, "no fast bfloat16"),
        ("none", 7 * GB, torch.float32, "no fast bfloat16"),
        ("none", 9 * GB, torch.bfloat16, r"float32 would take 18.0 of 20.0 GB"),
    ],
)
def test_dtype_on_a_cpu(monkeypatch, support, num_bytes, chosen, reason):
    monkeypatch.setattr(hardware, "cpu_bfloat16_support", lambda: support)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 20 * GB)
    choice = choose_dtype(CPU, num_bytes)
    assert choice.value is chosen
    assert reason in choice.reason


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_dtype_beside_quantised_weights_is_that_of_their_kernels(monkeypatch, quantize):
    monkeypatch.setattr(hardware, "cpu_bfloat16_support", lambda: "none")
    choice = choose_dtype(CPU, 7 * GB, quantize)
    assert choice.value is torch.bfloat16 and quantize in choice.reason


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_dtype_on_cuda(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose_dtype(torch.device("cuda"))
    assert choice.value is chosen
    assert "compute capability {}.{}".format(*capability) in choice.reason


@pytest.mark.parametrize(("is_new", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_on_an_apple_gpu(monkeypatch, is_new, chosen):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: is_new)
    assert choose_dtype(torch.device("mps")).value is chosen


def test_two_threads_of_one_core_count_once(monkeypatch, tmp_path):
    pairs = {0: "0,4", 1: "1,5", 4: "0,4", 6: "2,6"}
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: list(pairs))
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {topology.format(cpu): siblings + "\n" for cpu, siblings in pairs.items()})
    assert num_physical_cores(tmp_path) == 3


def test_physical_cores_without_topology_files(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else 8)
    assert num_physical_cores(tmp_path) == 4
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else 2)
    assert num_physical_cores(tmp_path) == 2


V2 = {"proc/self/cgroup": "0::/box/job\n", "sys/fs/cgroup/box/job/x": ""}
V1 = {"proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (V2 | {"sys/fs/cgroup/box/job/cpu.max": "max 100000", "sys/fs/cgroup/box/cpu.max": "250000 100000"}, 2.5),
        (V2 | {"sys/fs/cgroup/box/job/cpu.max": "150000 100000", "sys/fs/cgroup/box/cpu.max": "250000 100000"}, 1.5),
        (V2 | {"sys/fs/cgroup/box/job/cpu.max": "max 100000"}, None),
        (
            V1
            | {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            V1 | {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            None,
        ),
        ({}, None),
    ],
)
def test_quota_of_a_container(tmp_path, files, quota):
    write(tmp_path, files)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 20 * GB),
        (V2 | {"sys/fs/cgroup/box/memory.max": "max", "sys/fs/cgroup/box/memory.current": "5"}, 20 * GB),
        (
            V2
            | {
                "sys/fs/cgroup/box/memory.max": str(8 * GB),
                "sys/fs/cgroup/box/memory.current": str(6 * GB),
                "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {GB}\nactive_file {2 * GB}\n",
            },
            5 * GB,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(8 * GB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(6 * GB),
            },
            2 * GB,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(8 * GB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(6 * GB),
                "sys/fs/cgroup/memory/job/memory.stat": (
                    f"inactive_file 0\nactive_file 5\ntotal_inactive_file {3 * GB}\ntotal_active_file {GB}\n"
                ),
            },
            6 * GB,
        ),
    ],
)
def test_memory_that_is_left_of_a_container(monkeypatch, tmp_path, files, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 20 * GB}))
    write(tmp_path, files)
    assert available_bytes(tmp_path) == free


@pytest.mark.parametrize(
    ("cores", "quota", "chosen", "reason"),
    [(8, None, 8, "physical cores"), (8, 2.5, 2, "2.5 of 8"), (8, 0.5, 1, "0.5 of 8"), (2, 4.0, 2, "physical cores")],
)
def test_threads(monkeypatch, no_variables, cores, quota, chosen, reason):
    monkeypatch.setattr(hardware, "num_physical_cores", lambda: cores)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    choice = choose_num_threads()
    assert choice.value == chosen
    assert reason in choice.reason


def test_scripts_use_the_chosen_number_of_threads(monkeypatch, no_variables):
    monkeypatch.setattr(hardware, "num_physical_cores", lambda: 2)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    assert use_chosen_num_threads() == torch.get_num_threads() == 2


def test_the_users_number_of_threads_wins(monkeypatch, no_variables):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(hardware, "num_physical_cores", lambda: 64)
    assert torch.get_num_threads() == 1
    assert use_chosen_num_threads() == torch.get_num_threads() == 1
    assert "OMP_NUM_THREADS=1" in choose_num_threads().reason


def test_this_machine_can_be_asked():
    assert 1 <= num_physical_cores() <= len(hardware.allowed_cpus()) <= (os.cpu_count() or 1)
    assert available_bytes() > 0


def test_free_memory_of_gpus_counts_what_torch_keeps_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GB)
    assert free_bytes(torch.device("cuda")) == 6 * GB
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * GB)
    for allocated, free in ((4 * GB, 12 * GB), (17 * GB, 0)):
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda allocated=allocated: allocated)
        assert free_bytes(torch.device("mps")) == free
