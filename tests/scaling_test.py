"""The model of the step agrees with compiled programs on eight virtual devices; nothing but the batch is split, nothing is gathered."""

import json
import re
import subprocess
import sys

import jax
import pytest
from several_processes import ROOT

from triqdef_jax import scaling

NUM_DEVICES, IMAGES_PER_DEVICE = 8, 4

# A network of one block at 8 px under two bit-widths: 11 CPU seconds with penalties, 3 without patches. Then the pod's own step, lowered only.
MEASURE = """
import json, sys
sys.path[:0] = ["configs", "tests"]
import imagenet
import small_networks
from triqdef_jax import config as config_lib, loop, scaling
small_networks.register()
pod = imagenet.get_config("pod")
pod.quant.bits, pod.bact.starts = (2,), ()
scaling.use_virtual_devices(8)
lowered = scaling.lower(loop.make_run(pod, "", 1_281_167)).as_text()
found = {"pod": next(line for line in lowered.splitlines() if "func.func public @main" in line)}
for method, group in (("triqdef", 0), ("qat", 0), ("qat", 2)):
    config = config_lib.default()
    config.update_from_flattened_dict(json.loads(sys.argv[1]) | {"loss.method": method, "model.norm_group": group})
    config_lib.validate(config)
    found[f"{method}/{group}"] = figures = scaling.measure(config, num_devices=8)
    figures["text"] = scaling.text(figures)
print(json.dumps(found))
"""
CONFIG = {
    "model.name": "tiny",
    "model.width": 4,
    "data.image_size_px": 8,
    "quant.bits": (8, 2),
    "bact.starts": (0.5,),
    "loss.feature_layers": ("stage1",),
    "patches.sizes_px": (3,),
    "patches.unseen_sizes_px": (),
    "train.batch_size": NUM_DEVICES * IMAGES_PER_DEVICE,
}
STEPS = ("triqdef/0", "qat/0", "qat/2")


@pytest.fixture(scope="module")
def measured():
    """Figures by method and norm group, and the signature of the pod's step, from one process that sees eight devices."""
    command = [sys.executable, "-c", MEASURE, json.dumps(CONFIG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", STEPS)
def test_a_device_hands_in_the_bytes_of_the_model_and_gathers_nothing(measured, name):
    found, expected = measured[name]["collectives"], measured[name]["predicted"]["reduced_bytes"]
    assert found["all-reduce"]["bytes"] == expected["total"]
    assert set(found) <= {"all-reduce", "collective-permute"}


def test_norms_over_all_devices_wait_for_one_another_and_local_ones_do_not(measured):
    count, waits = ({name: get(measured[name]) for name in STEPS} for get in (_num_reduced, _num_waits))
    # XLA merges what does not depend on one another; two sums more or less are a matter of its order.
    assert abs(count["triqdef/0"] - waits["triqdef/0"]) <= 2 and abs(count["qat/0"] - waits["qat/0"]) <= 2
    assert waits["qat/2"] == 1
    # The gradients in one, and one more per norm, whose reported variance needs the mean over all devices.
    assert count["qat/2"] <= waits["qat/2"] + measured["qat/2"]["predicted"]["layers"]["norms"]


def test_only_the_chance_level_moves_images_one_place_and_inputs_stay_where_they_are(measured):
    for name in STEPS:
        assert measured[name]["input_collectives"] == {}
        assert name == "triqdef/0" or "collective-permute" not in measured[name]["collectives"]
    moved = measured["triqdef/0"]["collectives"]["collective-permute"]
    one_image = 4 * 2 * (8 * 8 + 3 * 3 * 36)  # float32, two bit-widths, edges and 3 x 3 blocks of 4 cells and 9 bins
    assert moved["bytes"] <= 2 * one_image + 4 * 2 * 8 * 8  # of two maps; XLA moves one map's edges twice


@pytest.mark.parametrize("name", STEPS)
def test_arguments_are_those_of_the_model_and_temporaries_within_a_factor_of_two(measured, name):
    memory, expected = measured[name]["memory"], measured[name]["predicted"]
    assert (
        0 <= memory["argument"] - expected["argument_bytes"] < 256
    )  # slots and specs of two bit-widths, a few bytes each
    assert expected["kept_bytes"] / 2 < memory["temp"] < 2 * expected["kept_bytes"]


def test_the_state_is_replicated_and_the_batch_split_by_rows(measured):
    for name in STEPS:
        assert measured[name]["shardings"] == {"state": ["P()"], "inputs": ["P('data',)"]}
        assert measured[name]["images_per_device"] == IMAGES_PER_DEVICE


def test_the_pod_at_full_size_splits_4096_images_over_eight_devices_and_nothing_else(measured):
    arguments = re.findall(r"%arg\d+: tensor<(\S+)> {(.*?)}(?=, %arg|\) ->)", measured["pod"])
    split = [shape for shape, attributes in arguments if '"data"' in attributes]
    assert sorted(split) == ["2048x224x224x3xf32", "2048xi32", "4096x224x224x3xf32", "4096xi32"]
    assert len(arguments) > 100 and '"data"' not in measured["pod"].split(") -> (")[1]


def test_the_figures_are_told_beside_the_model(measured):
    lines = measured["triqdef/0"]["text"].splitlines()
    assert lines[0].startswith(
        "tiny, 8 px, batch 32, bits 8/2, method triqdef, norms global; 8 virtual devices of 4 images"
    )
    assert [line.split()[0] for line in lines[2:5]] == ["all-reduce", "collective-permute", "all-reduce,"]
    assert [line.split(",")[0] for line in lines[-2:]] == ["v5e-256", "8xH100"]


def test_devices_that_have_started_cannot_be_replaced():
    assert jax.device_count() < 1000
    with pytest.raises(ValueError, match="1000 virtual devices need a process of their own"):
        scaling.use_virtual_devices(1000)
    with pytest.raises(ValueError, match="--devices must be at least 1, got 0"):
        scaling.use_virtual_devices(0)


def _num_reduced(figures):
    return figures["collectives"]["all-reduce"]["count"]


def _num_waits(figures):
    return figures["predicted"]["num_waits"]
