"""The module writes the usual files for a model that is divided over processes.

    every process    its shards to host memory, then to .saving_*/sharded/ (DCP, safetensors)
    rank 0           joins them to model.safetensors and optimizer.safetensors, writes the rest,
                     renames the folder

So what reads a checkpoint need not know how it was written. The folder must be one that all
processes see.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hamner.checkpoint.format import Tensors
from hamner.checkpoint.writer import BackgroundSaver
from hamner.parallel.processes import MultipleProcesses
from hamner.parallel.tensors import is_sharded, local


class ShardedSaver(BackgroundSaver):
    """The saver is a `BackgroundSaver` of which every process has one, all with the same outcome.

    `mesh` is what the tensors are divided over; `settings` are those of `BackgroundSaver`.
    """

    def __init__(
        self, folder: Path, processes: MultipleProcesses, mesh: DeviceMesh, **settings
    ) -> None:
        super().__init__(folder, **settings)
        self.processes, self.is_main = processes, processes.rank.is_main
        # The threads of a save talk among themselves while the steps go on.
        self._group = dist.new_group(backend="gloo", timeout=processes.timeout)
        # Of the host's copies: DCP reads from it which part of a tensor a process has.
        self._host_mesh = init_device_mesh(
            "cpu", tuple(mesh.mesh.shape), mesh_dim_names=mesh.mesh_dim_names
        )

    def may_begin(self, is_healthy: bool) -> bool:
        """The method is `BackgroundSaver.may_begin` in every process at once; all must ask."""
        return self.processes.all(super().may_begin(is_healthy))

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """The method copies what this process has, and keeps how it is divided."""
        copy = super()._copy(key, local(tensor))
        if not is_sharded(tensor):
            return copy
        return DTensor.from_local(
            copy,
            self._host_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def write(self, path: Path, tensors: Tensors) -> None:
        """The method writes a file with all processes; if it fails in one, each has an OSError."""
        parts = path.with_name(f"{path.name}.parts")
        writer = dcp.HuggingFaceStorageWriter(
            str(parts), save_distributed=True, enable_consolidation=True
        )
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group)
        except dcp.CheckpointException as failures:
            raise _disk_error(failures) from failures

        def keep_joined() -> None:
            # What DCP calls the one file it joins shards to.
            (parts / "model-00001-of-00001.safetensors").rename(path)
            shutil.rmtree(parts)

        self.on_main(keep_joined)

    def on_main(self, function: Callable) -> Any:
        """The method gives every process what `function` returns in rank 0, or its OSError."""
        outcome: list = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except OSError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]


def _disk_error(failures: dcp.CheckpointException) -> OSError:
    """The function gives the first process's error as the OSError that a failed save is."""
    rank, (error, _) = min(failures.failures.items())
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, f"{os.strerror(error.errno)}, rank {rank}")
    return OSError(errno.EIO, f"{type(error).__name__} in rank {rank}: {error}")
