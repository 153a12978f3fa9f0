"""Start a Python script as several processes that find one another on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

from compiling import XLA_FLAGS

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Gloo, the library of the CPU's collectives, writes to the process's stdout, in pieces; what Python prints keeps a stream of its own.
OWN_STDOUT = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
"""

# Connects, then runs a `main` that gets its process number and the script's arguments.
# $HEARTBEAT_TIMEOUT_S: how long a silent process counts as alive.
CONNECTED = """
import json, os, pathlib, signal, sys, time
import jax, numpy as np
from triqdef_jax import entry, processes, sharding
heartbeat_timeout_s = int(os.environ.get("HEARTBEAT_TIMEOUT_S", "10"))
with processes.started(processes.complete(processes.Start("on", heartbeat_timeout_s=heartbeat_timeout_s))):
    sys.exit(main(jax.process_index(), *sys.argv[1:]))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_processes(script, *arguments, num=2, num_devices=1, timeout_s=300, **environment):
    """Run `python -c script *arguments` as `num` processes, with `num_devices` each; returns their (code, stdout, stderr) in order.

    Address, number and id are in the variables that `processes.complete` reads.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {XLA_FLAGS}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(num),
        **environment,
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", OWN_STDOUT + script, *map(str, arguments)],
            env=environment | {"JAX_PROCESS_ID": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(num)
    ]
    try:
        outputs = [child.communicate(timeout=timeout_s) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]
