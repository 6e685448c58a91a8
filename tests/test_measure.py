"""What is measured: the kernel of attention by name, phases by the clock."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from progtuning.step.measure import Clock, attention_backends, free_memory
from tests.models import TINY, tiny_batch, tiny_model

CPU = torch.device("cpu")
KERNELS = {
    "math": "aten::_scaled_dot_product_attention_math",
    "flash_attention": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout_prob", [0.0, 0.1])
def test_the_backends_named_are_the_kernels_that_ran(dropout_prob, precision):
    config = replace(TINY, attention_probs_dropout_prob=dropout_prob)
    named = attention_backends(config, CPU, precision)
    model = tiny_model(attention_probs_dropout_prob=dropout_prob)
    batch = tiny_batch(config)
    for mode, backends in named.items():
        model.train(mode == "training")
        for padding, backend in backends.items():
            inputs = batch if padding == "padded" else batch | {"attention_mask": None}
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
            with profile(activities=[ProfilerActivity.CPU]) as profiler, autocast:
                with torch.set_grad_enabled(mode == "training"):
                    model(**inputs)
            ran = {event.key for event in profiler.key_averages()} & set(KERNELS.values())
            assert ran == {KERNELS[backend]}, (mode, padding)
    if dropout_prob == 0:
        assert named["training"]["padded"] == "flash_attention"  # a mask alone does not block the fused kernel


def test_the_clock_adds_up_each_phase():
    clock = Clock(CPU)
    for seconds in (0.01, 0.02):
        with clock.phase("a"):
            time.sleep(seconds)
    with clock.phase("b"):
        pass
    seconds = clock.seconds()
    assert set(seconds) == {"a", "b"} and 0.03 <= seconds["a"] < 0.5 and seconds["b"] < 0.01


GB = 1 << 30
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
SLURM = "/system.slice/slurmstepd.scope/job_7"


def v2(limit: object, used: int = GB // 2, cached: int = 0, high: object = "max") -> dict[str, str]:
    statistics = f"anon 5\ninactive_file {cached}\nactive_file 7\n"
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{used}\n",
        "memory.stat": statistics,
    }


def v1(limit: int, used: int = GB // 2, cached: int = 0, above: int = (1 << 63) - 4096) -> dict[str, str]:
    statistics = f"inactive_file 9\nhierarchical_memory_limit {above}\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": statistics}


UNLIMITED = (1 << 63) - 4096  # as version 1 writes that there is no limit
# What stands in /proc/self/cgroup, the folders of the groups, and the GB that are left of 480 available.
GROUPS = {
    "none": ("", {}, 480),
    "v2, no limit": ("0::/", {V2: v2("max")}, 480),
    "v2, a container that is the root to itself": ("0::/", {V2: v2(2 * GB)}, 1.5),
    "v2, cached files make room": ("0::/", {V2: v2(2 * GB, cached=GB // 4)}, 1.75),
    "v2, more used than allowed": ("0::/", {V2: v2(2 * GB, used=3 * GB)}, 0),
    "v2, throttled above a lower mark": ("0::/", {V2: v2(4 * GB, high=2 * GB)}, 1.5),
    "v2, a scope of systemd": ("0::/user.slice/a\\x2db.scope", {V2 + "/user.slice/a\\x2db.scope": v2(2 * GB)}, 1.5),
    "v2, the whole path in a container": ("0::/kubepods/pod1/ab", {V2: v2(2 * GB)}, 1.5),
    "v2, outside of its namespace": ("0::/../other", {V2: v2(2 * GB)}, 1.5),
    "v2, a step of SLURM": (f"0::{SLURM}/step_0", {V2 + SLURM + "/step_0": v2(2 * GB)}, 1.5),
    "v2, a job of SLURM above the step": (
        f"0::{SLURM}/step_0/user/task_0",
        {V2 + SLURM + "/step_0/user/task_0": v2("max"), V2 + SLURM + "/step_0": v2("max"), V2 + SLURM: v2(2 * GB)},
        1.5,
    ),
    "v2, the least of several": (
        "0::/a/b/c",
        {V2 + "/a/b/c": v2(8 * GB, used=GB), V2 + "/a/b": v2(9 * GB, used=6 * GB), V2 + "/a": v2(64 * GB)},
        3,
    ),
    "v2, no statistics": ("0::/", {V2: {**v2(2 * GB), "memory.stat": ""}}, 1.5),
    "v1, no limit": ("9:memory:/", {V1: v1(UNLIMITED)}, 480),
    "v1, a container": ("9:memory:/docker/ab", {V1: v1(2 * GB)}, 1.5),
    "v1, a job of SLURM above the step": (
        "4:memory:/slurm/uid_1/job_7/step_0",
        {V1 + "/slurm/uid_1/job_7/step_0": v1(UNLIMITED), V1 + "/slurm/uid_1/job_7": v1(2 * GB)},
        1.5,
    ),
    "v1, a limit above that is hidden": ("4:memory:/docker/ab", {V1: v1(UNLIMITED, above=2 * GB)}, 1.5),
    "v1, cached files make room": ("4:memory:/", {V1: v1(2 * GB, cached=GB // 4)}, 1.75),
    "v1 beside v2": (
        "12:cpu,cpuacct:/x\n9:name=systemd:/memory\n4:hugetlb,memory:/a:b\n0::/",
        {V1 + "/a:b": v1(2 * GB), V2 + "/x": v2(GB)},
        1.5,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_memory_is_what_the_processes_control_groups_leave(name, monkeypatch):
    own, groups, expected = GROUPS[name]
    files = {"/proc/meminfo": f"MemTotal: {512 * GB // 1024} kB\nMemAvailable: {480 * GB // 1024} kB\n"}
    files |= {"/proc/self/cgroup": own + "\n"} if own else {}
    files |= {f"{folder}/{file}": text for folder, texts in groups.items() for file, text in texts.items()}

    def read(path, *args, **kwargs):
        try:
            return files[os.path.normpath(path)]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", str(path)) from None

    monkeypatch.setattr(Path, "read_text", read)
    assert free_memory() == expected * GB
