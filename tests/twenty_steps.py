"""Twenty steps of the full method with the smallest network on one batch, for the test that compares devices and processes.

The network has every kind of sum that devices share: moments of a norm, losses, gradients, means of descriptors.
"""

import functools

import jax
import numpy as np
import train_step_test as example

from triqdef_jax import sharding, train_step

BITS = (8, 2)


def run_twice(mesh):
    """Return the losses of two runs from the same arrays, which are the same on any mesh; each process brings its share of the images.

    In float64: gradients of the full method jump where slopes of a map change sign, and in float32 one rounding makes another run after
    about ten steps.
    """
    with jax.enable_x64(True):
        network = example.make_network("float64", BITS, blocks=())
        settings = example.make_settings(network, feature_layers=("stem",))
        weights, stats = jax.tree.map(np.float64, _arrays())
        slots, specs = [network.slot(b) for b in BITS], [example.make_spec(network, b, "float64") for b in BITS]
        rank, num = jax.process_index(), jax.process_count()
        share = lambda x: x[rank * len(x) // num : (rank + 1) * len(x) // num]
        batch = jax.tree.map(share, jax.device_get(example.make_inputs(dtype="float64", num=16)))
        batch = sharding.put_batch(batch, mesh)
        step = train_step.make_step(settings, plan="fused", mesh=mesh)
        runs = []
        for _ in range(2):
            state = train_step.TrainState(np.int32(0), weights, stats, settings.optimizer.init(weights))
            state, losses = sharding.replicate(state, mesh), []
            for _ in range(20):
                state, metrics = step(state, batch, BITS, slots, specs, np.float32(1))
                losses.append(metrics["loss"])
            assert len(losses[-1].sharding.device_set) == mesh.size
            runs.append([float(loss) for loss in losses])
        return runs


@functools.cache
def _arrays():
    with jax.enable_x64(False):
        return jax.device_get(example.make_arrays(example.make_network("float32", BITS, blocks=())))
