"""Whether the GPUs of this machine are used: one that is lost leaves a CPU that trains for weeks, and nothing fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from fedlora.doctor.findings import Found
from fedlora.site.site_file import SiteFile

_DRIVERS = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg")
"""What the NVIDIA driver leaves where it runs; the last one under Windows' Linux."""

_CONTAINERS = (".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io")

_SHARED_BYTES = 1 << 30
"""GPUs of one site add up their gradients through /dev/shm where they do not reach each other; a container has 64 MB of it."""


def gpus(file: SiteFile, *, machine: Path = Path("/")) -> Iterator[Found]:
    """Says nothing where there is no driver: that machine trains on its CPU, as it should.

    Args:
        machine: the root of its files.
    """
    if file.device == "cpu" or not any((machine / mark).exists() for mark in _DRIVERS):
        return
    try:
        seen, built = _seen()
    except ImportError:
        return  # without torch nothing is trained, which another finding says
    if seen:
        yield Found.right("gpu", f"{seen} GPU{'s' * (seen > 1)} to train on", gpus=seen)
        if (file.gpus or seen) > 1 and (small := _shared_bytes(machine)) < _SHARED_BYTES:
            why = f"{small >> 20} MiB of shared memory (/dev/shm), and {file.gpus or seen} GPUs that train together may need more"
            yield Found("gpu", "small-shm", "note", why, "start the container with --shm-size=1g, or set gpus = 1")
        return
    contained = any((machine / mark).exists() for mark in _CONTAINERS)
    why = "this machine has an NVIDIA driver, but torch finds no GPU, so that this site trains on its CPU"
    if not built:
        why += ": the torch that is installed is built for CPUs"
        fix = 'install torch\'s build for CUDA, or set device = "cpu" in the site file if that is meant'
    elif contained:
        fix = (
            "start the container anew, with the GPU (--gpus all, or its device); one that had it loses it at `systemctl "
            "daemon-reload` on the host, until the container runtime's cgroup driver is cgroupfs, or its devices are of CDI"
        )
    else:
        fix = "`nvidia-smi` says what is wrong; after an update of the driver, restart this machine"
    yield Found("gpu", "gpu-unused", "note" if file.device == "auto" else "wrong", why, fix, "resources")


def _seen() -> tuple[int, bool]:
    """How many GPUs torch finds, and whether it could find any."""
    from fedlora.learn.base import built_for_cuda, cuda_devices

    return len(cuda_devices()), built_for_cuda()


def _shared_bytes(machine: Path) -> int:
    try:
        return shutil.disk_usage(machine / "dev" / "shm").total
    except OSError:
        return 0
