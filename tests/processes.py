"""Runs of train.py as processes of their own, forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def child(configs, rank, processes, port, kill_after):
    """Train each config in turn; SIGKILL after the log line of step `kill_after`, if given."""
    import torch

    import runs
    import train
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    logged = train.log

    def log(run, *rest):
        result = logged(run, *rest)
        if run.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    train.log = log
    device, dtype = runs.start_processes(configs[0].dtype, configs[0].cuda_graphs, trains=True)
    for config in configs:
        train.train(config, device, dtype)
    runs.end_processes()


def launch(configs, processes=1, kill_after=None):
    """Train the configs on `processes` processes together, and return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=child, args=(configs, rank, processes, port, kill_after))
                for rank in range(processes)]
    for process in children:
        process.start()
    for process in children:
        process.join(240)
    return [process.exitcode for process in children]
