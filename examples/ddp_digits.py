"""Data-parallel training with torch, on the handwritten digits that scikit-learn brings along. A few seconds on a CPU.

    rankspawn run --nproc-per-node 2 examples/ddp_digits.py

Nothing here knows of rankspawn: a script written for torchrun runs as it is.
"""

import argparse
import os
import sys
import time
from datetime import timedelta

try:
    import torch
    import torch.distributed as dist
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
except ModuleNotFoundError as error:
    sys.exit(f"ddp_digits.py needs torch and scikit-learn ({error}): python -m pip install torch scikit-learn")

TEST_IMAGES = 360  # of 1797
BATCH = 64  # over all ranks: how many there are does not change what is learned
WANTED_ACCURACY = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small model on scikit-learn's digits, by DDP over gloo.")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args()

    # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who we are and where rank 0 is.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        complaint = learn(options.epochs)
    finally:
        dist.destroy_process_group()
    if complaint:
        sys.exit(f"rank {os.environ['RANK']}: {complaint}")


def learn(epochs: int) -> str:
    """Train, test and report; return what is wrong with the result, or nothing.

    The model is gone when this returns, before the process group is destroyed. The other way round the model holds the
    group, and lets it go while it holds the interpreter's lock: the group waits for its thread then, which may wait for
    that lock (pytorch#56297). A short program hangs at its end by that, now and then.
    """
    began = time.perf_counter()
    model, loss = train(epochs)
    seconds = time.perf_counter() - began
    accuracy = test(model)
    if not identical_everywhere(model):
        return "the ranks ended with different parameters"
    if accuracy <= WANTED_ACCURACY:
        return f"test accuracy is {accuracy:.3f}, expected more than {WANTED_ACCURACY}"
    if dist.get_rank() == 0:
        print(f"ranks          {dist.get_world_size()}, {torch.get_num_threads()} threads each")
        print(f"training       {epochs} epochs in {seconds:.1f} s, loss {loss:.3f}")
        print(f"test accuracy  {accuracy:.3f} on {TEST_IMAGES} images that were not trained on")
        print("parameters     identical on every rank")
    return ""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 images of 8 x 8 pixels, as rows of 64 numbers from 0 to 1, and the digit that each one shows."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target)
    # The images come sorted by writer. Every rank shuffles with the same seed, so that all agree on the test set.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def train(epochs: int) -> tuple[DistributedDataParallel, float]:
    """The trained model and its last loss, here."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = (tensor[TEST_IMAGES:] for tensor in digits())

    # Each rank begins with other parameters, on purpose: DDP gives all of them those of rank 0.
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    shuffling = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        # The same shuffle on every rank, of which each takes its share of every batch. An incomplete last batch is
        # left out: all ranks must take the same number of steps, or one would wait for the others for ever.
        batches = torch.randperm(len(labels), generator=shuffling).split(BATCH)
        for batch in batches[: len(labels) // BATCH]:
            share = batch[rank::ranks]
            loss = nn.functional.cross_entropy(model(images[share]), labels[share])
            optimizer.zero_grad()
            loss.backward()  # DDP averages the gradients over the ranks while it computes them
            optimizer.step()
    return model, loss.item()


def test(model: DistributedDataParallel) -> float:
    """The share of the test images that the model reads rightly."""
    images, labels = (tensor[:TEST_IMAGES] for tensor in digits())
    with torch.no_grad():
        guesses = model.module(images).argmax(dim=1)
    return (guesses == labels).float().mean().item()


def identical_everywhere(model: DistributedDataParallel) -> bool:
    """Whether every rank has the parameters of rank 0, to the last bit."""
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    of_rank_0 = own.clone()
    dist.broadcast(of_rank_0, src=0)
    same = torch.tensor(int(torch.equal(own, of_rank_0)))
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same)


if __name__ == "__main__":
    main()
    # os._exit, because torch's gloo threads let go of tensors a moment after they are ready, and need the interpreter
    # for those of Python's. If the interpreter is ending by then, the process aborts (torch 2.13: 7 of 25 runs).
    sys.stdout.flush()
    os._exit(0)
