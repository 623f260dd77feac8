"""Two processes on the CPU, under Lightning's strategy for sharded models and under plain PyTorch."""

import os
import socket
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, multiprocessing

from tests.helpers import quiet_trainer


def on_two_processes(work: Callable[..., None], *args: Any) -> None:
    """Call ``work`` in two forked processes, which find each other; an error in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_process, (work, port, args), nprocs=2, start_method="fork")


def _process(rank: int, work: Callable[..., None], port: int, args: tuple[Any, ...]) -> None:
    places = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        work(*args)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def sharding_trainer(save_distributed_checkpoint: bool = True, **options: Any) -> pl.Trainer:
    """A trainer for one of two processes that shard a model."""
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=save_distributed_checkpoint)
    return quiet_trainer(devices=2, strategy=strategy, **options)
