"""A program as launchers start it: the sum over the devices of all processes of a number that each process brings."""

import jax
import numpy as np
from absl import flags

from triqdef_jax import entry, processes, sharding


def main(argv):
    del argv
    with processes.started(processes.from_flags()):
        mesh = sharding.data_mesh()
        rank = np.full(jax.local_device_count(), 10 + jax.process_index(), np.int32)
        total = jax.jit(lambda x: x.sum(), out_shardings=sharding.replicated(mesh))(sharding.put_batch(rank, mesh))
        if sharding.is_lead():
            count = f"{jax.process_count()} processes, {jax.device_count()} devices"
            print(f"{int(total)} from {count}; note {flags.FLAGS.note!r}")


if __name__ == "__main__":
    processes.define_flags()
    flags.DEFINE_string("note", "", "Printed, to show that words survive launchers.")
    entry.run_program(main)
