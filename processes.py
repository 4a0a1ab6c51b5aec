"""Several processes, which torchrun starts: how they meet, wait for each other, and end. All or none come through.

Only rank 0 speaks. If one fails or is killed, torchrun ends the others, and the first to fail says why in one line.
"""
import os
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

import cli


def several():
    """Has torchrun started more than this process?"""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def meet(device):
    """Meet the other processes. Raises Fail if all are sent to one GPU."""
    if device.type == "cuda" and device.index != int(os.environ["LOCAL_RANK"]):
        raise cli.Fail(f"--device {device} is one GPU for all processes; leave the number out")
    with others_alive():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def others_alive():
    """Collectives fail if another process has ended. Raises Fail, in one line."""
    try:
        yield
    except RuntimeError as error:
        if cli.out_of_memory(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise cli.Fail(f"another process of this run has ended, or cannot be reached ({reason})") from None


def store():
    """torchrun's key-value store, which outlives the processes. -> it, with keys of this attempt alone"""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10))
    return dist.PrefixStore(f"chipmunk {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def one_a_machine_first(ranks):
    """The body runs in one process of each machine. When all machines are through, it runs in the others: what it
    downloads is there for them. No collective waits for a download, which may take hours. Raises Fail if one failed."""
    if ranks is None:
        yield
        return
    one = os.environ["LOCAL_RANK"] == "0"
    if one:
        yield
    with others_alive():
        shared, machines = store(), int(os.environ["GROUP_WORLD_SIZE"])
        if one:
            shared.set(os.environ["GROUP_RANK"], "ready")
        while not shared.check([str(machine) for machine in range(machines)]):
            if shared.check(["failed"]):
                raise RuntimeError("it said why")
            time.sleep(0.1)
    if not one:
        yield


def run(main):
    """cli.run(main). Of torchrun's processes rank 0 alone prints, but the first that fails says why; torchrun then ends
    the others."""
    if not several():
        return cli.run(main)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        return cli.run(main)
    except SystemExit as stop:
        if not stop.code:                                            # --help, --show-plan
            return
        said, status = (stop.code, 1) if isinstance(stop.code, str) else (None, stop.code)
    except Exception:
        said, status = traceback.format_exc(), 1
    try:
        first = store().add("failed", 1) == 1
    except dist.DistError:                                           # torchrun has ended: who is first?
        first = True
    if first and said and sys.__stderr__:
        print(said, file=sys.__stderr__, flush=True)
    os._exit(status)                                                 # whatever a library still waits for
