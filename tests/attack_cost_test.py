"""What the universal attack costs stands beside the network's own passes."""

import json

import jax
import pytest
from benchmark_example import tiny

from triqdef_jax import attack_cost


def test_the_attack_is_compared_with_forward_and_backward_to_as_many_images():
    jax.config.update("jax_disable_most_optimizations", True)
    config = tiny("qat")
    config.model.name, config.loss.feature_layers = "tiny", ()
    config.data.image_size_px, config.patches.batch_images, config.patches.sizes_px = 8, 2, (3,)
    figures = json.loads(json.dumps(attack_cost.measure(config, rounds=2)))
    jax.config.update("jax_disable_most_optimizations", False)
    assert (figures["num_patches"], figures["batch_images"], figures["attacked_bits"]) == (10, 2, 8)
    assert figures["network_seconds"]["min"] > 0
    step = figures["attack_step_seconds"]["median"]
    assert figures["patch_steps_per_second"] == pytest.approx(10 / step)
    assert figures["overhead"]["min"] <= step / figures["network_seconds"]["median"] <= figures["overhead"]["max"]
    lines = attack_cost.text(figures).splitlines()
    assert lines[0].startswith("tiny, 8 px, 8 bits; universal attack on 10 targets at once, 2 images each; ")
    assert [line.split()[0] for line in lines[1:]] == ["attack", "network", "overhead", "patch"]


def test_an_attack_without_rounds_is_refused():
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        attack_cost.measure(tiny(), rounds=0)
