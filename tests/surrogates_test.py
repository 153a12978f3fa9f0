"""Surrogates: names, what determines each, one training for all runs, and a fine-tuning whose activations switch while weights do not."""

import functools
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import data, files, loop, models, patch_pool, quantize, runs, sources, surrogates
from triqdef_jax.models.resnet import ResNet, ResNetPlan
from triqdef_jax.models.vit import DeiT, DeiTPlan
from triqdef_jax.patch_pool import PatchPool
from triqdef_jax.surrogates import SwitchedNetwork


def make_config(shared_dir="nowhere", **changes):
    config = config_lib.default()
    fields = {
        "data.image_size_px": 8,
        "data.train_images": 136,
        "model.name": "tiny",
        "model.width": 2,
        "quant.bits": (4, 2),
        "bact.starts": (0.5,),
        "loss.method": "patch_ce",
        "loss.feature_layers": (),
        "train.batch_size": 34,
        "train.epochs": 2,
        "patches.sizes_px": (2,),
        "patches.unseen_sizes_px": (3,),
        "patches.families": ("lavan",),
        "patches.pool_size": 4,
        "patches.steps": 2,
        "patches.source_epochs": 1,
        "patches.shared_dir": str(shared_dir),
    }
    config.update_from_flattened_dict(fields | changes)
    return config


@functools.cache
def loaded_data():
    return data.load(make_config().data)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A shared folder in which the start of QAA, qat:2, is trained."""
    folder = tmp_path_factory.mktemp("shared")
    surrogates.get(make_config(folder), "qat:2", loaded_data(), is_quiet=True)
    return folder


def get(folder, name, **changes):
    return surrogates.get(make_config(folder, **changes), name, loaded_data(), is_quiet=True)


def arrays(trained):
    return jax.device_get((trained.weights, trained.stats))


def times(folder):
    """When each file below was last written; lock files are touched by whoever looks."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_all_names_of_a_run_are_listed_and_understood():
    names = surrogates.names(make_config(**{"quant.bits": (32, 4, 2), "bact.starts": (0.3, 0.5)}))
    others = ("fp@deit_tiny_cifar", "fp@swin_tiny_cifar")
    assert names == ("fp", *others, "qat:4", "qat:2", "qaa", "retrained", "self:32", "self:4", "self:2", "self:all")
    families = ["fp", "fp", "fp", "qat", "qat", "qaa", "retrained", "self", "self", "self", "self"]
    assert [surrogates.parse(name) for name in names] == list(
        zip(families, [None, None, None, 4, 2, None, None, 32, 4, 2, "all"], strict=True)
    )
    assert "fp@swin_tiny_cifar" not in surrogates.names(make_config(**{"model.name": "swin_tiny_cifar"}))
    assert {surrogates.parse(name)[0] for name in names} == set(surrogates.FAMILIES)


@pytest.mark.parametrize(
    "name", ["", "fp:8", "qat", "qat:32", "qat:9", "qat:4x", "qaa:2", "self", "self:7:2", "QAT:4", "other"]
)
def test_an_unknown_name_is_refused_in_one_line_that_lists_the_known_ones(name):
    assert_refused(name)


@pytest.mark.parametrize(
    "name", ["fp@", "fp@vgg0", "qat@vgg11", "qaa@vgg11", "retrained@vgg11", "self:4@vgg11", "self:all@vgg11", "@vgg11"]
)
def test_other_architectures_are_known_ones_of_two_families(name):
    assert_refused(name, "; fp and qat:BITS may end in @MODEL")


def assert_refused(name, words=""):
    with pytest.raises(
        ValueError, match=rf"one of fp, qat:BITS \(BITS 2\.\.8\), qaa, retrained, self:BITS .*{words}.* got"
    ) as error:
        surrogates.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["self:4", "self:all"])
def test_the_defended_network_is_not_trained_again(name):
    config = make_config()
    calls = (
        lambda: get("nowhere", name),
        lambda: surrogates.attacker_seed(config, name),
        lambda: surrogates.identity(config, name, 136),
    )
    for function in calls:
        with pytest.raises(ValueError, match=f"{name} is the defended network"):
            function()


def test_no_two_networks_of_a_run_share_a_seed():
    config = make_config(seed=7)
    retrained = surrogates.retrained_config(config)
    names = ["fp", "qaa", "retrained", *(f"qat:{bits}" for bits in range(2, 9))]
    seeds = [surrogates.attacker_seed(config, name) for name in names]
    seeds += [config.seed, *(sources.source_config(c, index).seed for c in (config, retrained) for index in (0, 1))]
    names += [f"{name}@{model}" for name in ("fp", *(f"qat:{bits}" for bits in range(2, 9))) for model in models.MODELS]
    seeds += [surrogates.attacker_seed(config, name) for name in names[10:]]
    assert len(set(seeds)) == len(seeds) - 1  # fp is source network 1
    assert max(seeds) < 2**31
    assert surrogates.attacker_seed(config, "fp") == sources.source_config(config, 1).seed


def test_the_network_of_one_bit_width_has_the_runs_budget_and_number_formats():
    config = make_config(
        **{"quant.edge_bits": 0, "quant.round_bias": False, "train.epochs": 9, "loss.method": "triqdef"}
    )
    qat = surrogates.qat_config(config, 4)
    assert (qat.quant.bits, qat.loss.method, qat.train.epochs) == ((4,), "qat", 9)
    assert (qat.quant.edge_bits, qat.quant.round_bias) == (0, False)
    config_lib.validate(qat)


def test_a_surrogate_of_another_architecture_shares_data_and_budget_alone(shared):
    config = make_config(shared, **{"quant.edge_bits": 0, "data.image_size_px": 16})
    for name, bits, epochs in (("fp@deit_tiny_cifar", (32,), 1), ("qat:4@swin_tiny_cifar", (4,), 2)):
        other = surrogates.surrogate_config(config, name, 136)
        assert (other.model.name, other.model.width) == (name.split("@")[1], 0)
        assert (other.quant.bits, other.train.epochs, other.train.batch_size) == (bits, epochs, 34)
        assert (other.loss.method, other.optim.clip_norm, other.optim.lr) == ("qat", 1.0, config.optim.lr)
        config_lib.validate(other)
        plain = surrogates.identity(config, name.split("@")[0], 136)
        assert surrogates.identity(config, name, 136) not in (plain, surrogates.identity(config, "fp@tiny", 136))
    config.optim.clip_norm = 0.5
    assert surrogates.surrogate_config(config, "fp@deit_tiny_cifar", 136).optim.clip_norm == 0.5


@pytest.mark.parametrize("field, value", [("seed", 1), ("model.width", 4), ("train.epochs", 3), ("quant.edge_bits", 0)])
def test_what_trains_a_surrogate_determines_it(field, value):
    for make in (lambda c: surrogates.qat_config(c, 4), surrogates.retrained_config):
        assert files.config_hash(make(make_config())) != files.config_hash(make(make_config(**{field: value})))


@pytest.mark.parametrize(
    "field, value",
    [("data.dir", "/elsewhere"), ("eval.images", 9), ("patches.eval_pool_size", 5), ("patches.shared_dir", "x")],
)
def test_what_does_not_train_a_surrogate_leaves_it_as_it_is(field, value):
    for make in (
        lambda c: surrogates.qat_config(c, 4),
        lambda c: surrogates.qaa_config(c, 136),
        surrogates.retrained_config,
    ):
        assert files.config_hash(make(make_config())) == files.config_hash(make(make_config(**{field: value})))
    for name, other in [("loss.method", "pbat"), ("quant.norm_stats", "clean"), ("quant.bits", (8, 4, 2))]:
        changed = surrogates.qat_config(make_config(**{name: other}), 4)
        assert files.config_hash(changed) == files.config_hash(surrogates.qat_config(make_config(), 4))


@pytest.mark.parametrize("name", ["fp", "qat:4", "qat:2", "qaa", "retrained"])
def test_every_surrogate_has_a_folder_that_tells_it_from_the_others(name):
    config = make_config()
    others = {surrogates.identity(config, other, 136) for other in ("fp", "qat:4", "qat:2", "qaa", "retrained")} - {
        surrogates.identity(config, name, 136)
    }
    assert len(others) == 4
    assert surrogates.identity(make_config(seed=1), name, 136) not in {surrogates.identity(config, name, 136), *others}


def test_fine_tuning_from_another_start_is_another_surrogate():
    longer = make_config(**{"train.epochs": 3})  # trains qat:2 longer and fine-tunes it as before
    configs = [surrogates.qaa_config(config, 136) for config in (longer, make_config())]
    assert files.config_hash(configs[0]) == files.config_hash(configs[1])
    assert surrogates.identity(longer, "qaa", 136) != surrogates.identity(make_config(), "qaa", 136)


def test_fine_tuning_takes_one_epoch_or_as_many_as_fifty_steps_need():
    config = make_config()
    assert surrogates.qaa_config(config, 34 * 1000).train.epochs == 1
    assert surrogates.qaa_config(config, 136).train.epochs == 13  # of 4 steps


def test_a_second_call_and_another_method_train_nothing(shared):
    before = times(shared)
    first = get(shared, "qat:2")
    again = get(shared, "qat:2", **{"loss.method": "qat", "quant.bits": (2,), "bact.starts": ()})
    assert times(shared) == before and len(list(shared.glob("surrogate-*"))) == 1
    jax.tree.map(np.testing.assert_array_equal, arrays(first), arrays(again))
    assert (first.network.bits, first.step, first.config.seed) == ((2,), 8, 12000)


def test_the_full_precision_surrogate_is_the_second_source_network(shared):
    trained = get(shared, "fp")
    assert trained.network.bits == (32,)
    assert (shared / sources.source_name(make_config(), 1) / "metrics.jsonl").exists()


def test_the_retrained_defence_is_the_runs_own_config_on_patches_of_its_own(shared):
    config = make_config(shared)
    request = sources.request(surrogates.retrained_config(config), 0, (2,), 4)
    assert request.folder_name != sources.request(config, 0, (2,), 4).folder_name
    values = np.random.default_rng(0).random((4, 2, 2, 3), np.float32)
    pool = PatchPool(values, np.ones((4, 2, 2), np.float32), np.full(4, 2, np.int32), np.arange(4, dtype=np.int32), "")
    patch_pool.save(shared / request.folder_name, request, pool._replace(digest=patch_pool.digest(pool)), [])
    before = {path.name for path in shared.glob("source-*")}
    trained = get(shared, "retrained")
    assert (trained.network.bits, trained.config.loss.method, trained.config.seed) == ((4, 2), "patch_ce", 3000)
    assert trained.step == 8
    assert {path.name for path in shared.glob("source-*")} == before  # it met that pool, so it needed no source network


class InterruptedData:
    """Data that send SIGTERM to this process with the fourth batch."""

    def __getattr__(self, name):
        return getattr(loaded_data(), name)

    def train_batches(self, *, start_step, **settings):
        for step, batch in enumerate(loaded_data().train_batches(start_step=start_step, **settings), start_step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_fine_tuning_leaves_its_start_repeats_bit_for_bit_and_resumes_where_it_stopped(shared):
    start, tuned = get(shared, "qat:2"), get(shared, "qaa")
    assert (tuned.network.bits, tuned.step) == ((2,), 52)
    kernels = [np.asarray(t.weights.params["stem"]["conv"]["kernel"]) for t in (start, tuned)]
    change = np.abs(kernels[1] - kernels[0]).mean() / np.abs(kernels[0]).mean()
    assert 1e-3 < change < 0.5  # trained on, and from there: two random kernels differ by more than their size
    folder = next(path for path in shared.glob("surrogate-*") if runs.read_config(path).seed == tuned.config.seed)
    shutil.rmtree(folder)
    with pytest.raises(loop.PreemptedError, match=r"preempted: step 4 of 52 of surrogate qaa is saved in .*the same"):
        surrogates.get(make_config(shared), "qaa", InterruptedData(), is_quiet=True)
    jax.tree.map(np.testing.assert_array_equal, arrays(get(shared, "qaa")), arrays(tuned))


@pytest.fixture(scope="module")
def switched(shared):
    """The start of QAA under switched precision, its variables and images."""
    start = get(shared, "qat:2")
    images = loaded_data().test.images[:8].astype(np.float32) / 255
    return start.network, SwitchedNetwork(**vars(start.network)), start.variables(2), images


def test_with_activations_on_it_is_the_network_itself(switched):
    plain, network, variables, images = switched
    expected, _, _ = jax.jit(plain.train_forward)(variables, plain.spec(2, round_bias=True), images)
    logits, _, _ = jax.jit(network.train_forward)(variables, network.spec(2, round_bias=True), images)
    np.testing.assert_array_equal(logits, expected)


def test_with_activations_off_weights_are_quantized_and_nothing_else_is(switched):
    plain, network, variables, images = switched
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: quantized(path, x, variables, plain), variables["params"]
    )
    real = plain.spec(quantize.FLOAT_BITS)
    expected, _, moments = jax.jit(plain.train_forward)(variables | {"params": rounded}, real, images)
    logits, _, found = jax.jit(network.train_forward)(variables, network.spec(32, round_bias=True), images)
    # The same operations on the same kernels, compiled twice: float32 rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (found, logits), (moments, expected)
    )
    unrounded, _, _ = jax.jit(plain.train_forward)(variables, real, images)
    assert np.abs(np.asarray(unrounded) - np.asarray(logits)).max() > 1e-2


def quantized(path, kernel, variables, network):
    """Round one kernel in NumPy: 2 bits inside, 8 bits in the stem and the classifier."""
    names = [key.key for key in path]
    if names[-1] != "kernel":
        return kernel
    scale = functools.reduce(dict.__getitem__, names[:-1], variables["scales"])["weight_scale"]
    bound = 127 if names[0] in ("stem", "classifier") else 1
    assert network.edge_bits == 8
    return np.clip(np.rint(np.asarray(kernel) / np.asarray(scale)), -bound, bound) * np.asarray(scale)


def test_both_settings_share_one_slot():
    network = SwitchedNetwork(ResNet(ResNetPlan((1,), 2), 10, models.LayerOptions()), (2,))
    assert network.slot(32) == network.slot(2) == (0, 0, 0)
    on, off = network.spec(2, round_bias=True), network.spec(32, round_bias=True)
    assert off.is_float and not off.round_bias and on.round_bias and not on.is_float
    assert off.weight == on.weight == quantize.make_bit_spec(2).weight


def test_a_transformer_serves_as_a_surrogate_of_a_residual_network(shared, monkeypatch):
    build = lambda name, *, num_classes, width, options: DeiT(DeiTPlan(4, 2, (1,)), num_classes, options)
    monkeypatch.setitem(models.MODELS, "tiny_transformer", build)
    trained = get(shared, "fp@tiny_transformer")
    assert (trained.network.bits, trained.config.model.name, trained.step) == ((32,), "tiny_transformer", 4)
    images = loaded_data().test.images[:2].astype(np.float32) / 255
    gradient = jax.jit(jax.grad(lambda images: trained.logits_fn(32)(images)[:, 0].sum()))(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
