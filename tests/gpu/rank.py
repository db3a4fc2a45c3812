"""What a rank of test_warm.py does: on its GPU where torch finds one, and on the CPU elsewhere.

    rank.py compute FOLDER     calculates, and ends when FOLDER/go is there
    rank.py step FOLDER        takes a step of DDP, and stands until it is killed
    rank.py load FOLDER        takes a step of DDP, and takes more until it is killed

It writes what it has found to FOLDER/ATTEMPT.RANK.json. The backend is NCCL where each rank has a GPU of its own, and
else gloo, with a group of NCCL's for each rank alone, because the start of NCCL is a part of a job's.
"""

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    found: dict[str, Any] = {"device": device.type, **computed(device)}
    if what == "compute":
        report(folder, found)
        while not (folder / "go").exists():
            time.sleep(0.01)
        return
    found["backend"], group = begun(device)
    model, found["trained"] = trained(device)
    report(folder, found)
    while what == "load":
        torch.randn(2048, 2048, device=device).matmul(torch.randn(2048, 2048, device=device))
        model(torch.randn(64, 16, dtype=torch.float64, device=device)).sum().backward()
    time.sleep(600)
    assert group


def computed(device: torch.device) -> dict[str, bool]:
    """Whether the device finds what the CPU finds."""
    numbers = torch.randn(512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(RANK))
    there = numbers.to(device)
    return {
        "product": torch.allclose((there @ there).cpu(), numbers @ numbers),
        "sorted": torch.equal(there.sort().values.cpu(), numbers.sort().values),
    }


def begun(device: torch.device) -> tuple[str, Any]:
    """The backend of all ranks, and the group of this rank alone, if there is one."""
    cuda = device.type == "cuda"
    backend = "nccl" if cuda and RANKS <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend)
    if not cuda or backend == "nccl" or not dist.is_nccl_available():
        return backend, None
    alone = dist.new_group([RANK], backend="nccl", use_local_synchronization=True)
    ones = torch.ones(8, device=device)
    dist.all_reduce(ones, group=alone)
    assert ones.sum().item() == 8
    return "gloo, nccl alone", alone


def trained(device: torch.device) -> tuple[nn.Module, bool]:
    """A model after one step of DDP; and whether one process, on its CPU, gets the same from all ranks' images."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    images = torch.randn(4 * RANKS, 16, dtype=torch.float64)
    model = DistributedDataParallel(copy.deepcopy(reference).to(device))
    step(model, images[RANK::RANKS].to(device))
    step(reference, images)
    pairs = zip(model.module.parameters(), reference.parameters(), strict=True)
    return model, all(torch.allclose(one.cpu(), other) for one, other in pairs)


def step(model: nn.Module, images: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()


def report(folder: Path, found: dict[str, Any]) -> None:
    """Write it as a whole, or not at all: the test reads as soon as the file is there."""
    name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{RANK}.json"
    if found["device"] == "cuda":
        torch.cuda.synchronize()
    text = json.dumps({**found, "ended": time.monotonic()})
    (folder / f".{name}").write_text(text)
    (folder / f".{name}").rename(folder / name)


if __name__ == "__main__":
    main()
