"""The environment of a job's ranks: torchrun's variables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from .._public import public

if TYPE_CHECKING:
    from collections.abc import Mapping


@public
class Job(NamedTuple):
    """What the ranks know about the job, by torchrun's names.

    Attributes:
        nprocs: Ranks on this machine.
        master_port: The TCP port on which rank 0 listens. 0: launch() finds a free one, for a job on one machine.
        master_addr: The host on which rank 0 listens.
        run_id: A name for the job.
        nnodes: How many machines there are.
        node_rank: The number of this machine, from 0.
        restart_count: The number of this start of the group, from 0.
        max_restarts: How many starts may follow the first.
        role: What its ranks are for, in one word.
    """

    nprocs: int
    master_port: int = 0
    master_addr: str = "127.0.0.1"
    run_id: str = "none"
    nnodes: int = 1
    node_rank: int = 0
    restart_count: int = 0
    max_restarts: int = 0
    role: str = "default"

    @property
    def first_rank(self) -> int:
        """The RANK of this machine's local rank 0."""
        return self.node_rank * self.nprocs

    @property
    def world_size(self) -> int:
        """How many ranks the job has on all machines."""
        return self.nprocs * self.nnodes

    def environment(self, env: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The variables of all ranks of this machine (torch.distributed.run has the names).

        Args:
            env: What the ranks inherit. Its TORCH_NCCL_ASYNC_ERROR_HANDLING is kept; without one it is 1.
        """
        local, world = str(self.nprocs), str(self.world_size)
        return {
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": local,
            "GROUP_RANK": str(self.node_rank),
            "GROUP_WORLD_SIZE": str(self.nnodes),
            "ROLE_NAME": self.role,
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.restart_count),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": self.run_id,
            # Rank 0 makes the store at MASTER_PORT itself: there is no agent that holds one.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": env.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }

    def numbers(self) -> dict[str, int]:
        """The variables of each rank whose values are numbers that grow with the rank: name -> local rank 0's value."""
        return {"RANK": self.first_rank, "LOCAL_RANK": 0, "ROLE_RANK": self.first_rank}
