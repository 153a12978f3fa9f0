"""Presets: which cells and rows an evaluation has, and what each leaves out."""

import itertools

import pytest

from triqdef_jax import attacks, presets, surrogates, verdicts
from triqdef_jax import config as config_lib


def names(preset, config=None):
    return [plan.name for plan in presets.plans(preset, config or config_lib.default())]


@pytest.mark.parametrize("preset", (*presets.PRESETS, "sanity"))
def test_every_cell_names_a_known_attack_and_surrogate_and_no_two_are_alike(preset):
    plans = presets.plans(preset, config_lib.default())
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        kind = attacks.get(plan.attack).access
        assert (plan.surrogate == "") == (kind == "none")
        if plan.surrogate:
            surrogates.parse(plan.surrogate)
        settings = dict(plan.fields)
        if attacks.get(plan.attack).kind == "per_image":
            attacks.get(plan.attack).settings(size_px=plan.size_px, **settings)  # accepted


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_trained_bit_width_meets_its_own_white_box_attack(preset):
    for bits in config_lib.default().quant.bits:
        assert f"patch_pgd|self:{bits}" in names(preset)


def test_every_kind_of_attacker_is_in_the_smallest_preset():
    found = {plan.attack for plan in presets.plans("quick", config_lib.default())}
    assert found == set(attacks.ATTACKS)


def test_full_names_every_surrogate_of_the_run():
    used = {plan.surrogate for plan in presets.plans("full", config_lib.default())}
    assert used - {""} == set(surrogates.names(config_lib.default()))


def test_the_doubled_cell_is_there_and_has_twice_the_steps():
    plans = {plan.name: plan for plan in presets.plans("standard", config_lib.default())}
    (doubled,) = [plan for plan in plans.values() if plan.doubles]
    assert dict(doubled.fields)["num_steps"] == 2 * dict(plans[doubled.doubles].fields)["num_steps"]


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_smaller_patch_ranks_the_per_image_attacks_at_both_ends(preset):
    config = config_lib.default()
    plans = [plan for plan in presets.plans(preset, config) if plan.size_px != config.patches.sizes_px[0]]
    assert {plan.size_px for plan in plans} == {3} and presets.small_px(1) == 1
    assert {plan.attack for plan in plans} == {"noise", "patch_pgd", "adaptive", "sparse_rs", "patchattack"}
    for attack in ("patch_pgd", "sparse_rs", "patchattack"):
        assert {"self:32", "self:2"} <= {plan.surrogate for plan in plans if plan.attack == attack}
    assert all("3 px" in plan.name for plan in plans)
    config.patches.sizes_px = (1,)
    assert {plan.size_px for plan in presets.plans(preset, config)} == {1}


def test_adaptive_cells_differ_in_realignment_alone():
    plans = [plan for plan in presets.plans("quick", config_lib.default()) if plan.attack == "adaptive"]
    plain, aligned = (plan for plan in plans if plan.size_px == 3)
    assert set(aligned.fields) - set(plain.fields) == {("realign_weight", 1.0), ("realign_gradients", False)}
    assert (plain.surrogate, plain.num_images) == (aligned.surrogate, aligned.num_images)


def test_sanity_holds_every_attack_on_the_widest_bit_width_against_noise_of_its_size():
    config = config_lib.default()
    plans = presets.plans("sanity", config)
    (whole,) = [plan for plan in plans if plan.size_px != 5]
    assert (whole.attack, whole.size_px) == ("patch_pgd", 16) and whole.name.endswith(verdicts.WHOLE_IMAGE)
    rivals = [plan for plan in plans if plan is not whole]
    assert sorted(plan.attack for plan in rivals) == sorted(set(attacks.ATTACKS) - {"grey", "crop"})
    assert {plan.surrogate for plan in plans if plan.attack != "noise"} == {"self:32"}
    # As many noise patches to choose the best from as any attack has.
    assert {plan.num_patches for plan in rivals if plan.attack in ("noise", "lavan", "gap")} == {10}
    (pgd,) = [plan for plan in rivals if plan.attack == "patch_pgd"]
    assert dict(pgd.fields)["num_restarts"] == len(attacks.AdaptiveSettings(size_px=5).estimators)
    assert presets.target_names("sanity", config) == ("32",) and presets.not_run("sanity")
    config.quant.bits = (4, 8)
    assert presets.target_names("sanity", config) == ("8",)
    assert {plan.surrogate for plan in presets.plans("sanity", config)} == {"", "self:8"}
    config.data.image_size_px = 12
    assert max(plan.size_px for plan in presets.plans("sanity", config)) == 12


def test_sanity_needs_no_pool_and_attacks_a_defence_through_it():
    assert not presets.meets_pools("sanity") and all(map(presets.meets_pools, ("pools", *presets.PRESETS)))
    config = config_lib.default()
    rows = presets.target_names("sanity", config, defenses=("median",))
    through = [plan.name for plan in presets.plans("sanity", config, rows[1:]) if "median" in plan.surrogate]
    assert rows == ("32", "median:32") and through == ["patch_pgd|self:median:32", "sparse_rs|self:median:32"]


def test_rows_are_trained_then_untrained_then_requantized_ones():
    config = config_lib.default()
    rows = presets.target_names("quick", config, (7, 4))
    assert rows[:8] == ("32", "8", "5", "4", "2", "7", "3", "6")
    assert all(row.startswith("ptq:") for row in rows[8:])
    assert presets.target_names("pools", config) == ("32", "8", "5", "4", "2")
    config.quant.scale = "observed"
    assert presets.target_names("quick", config)[-2:] == ("ptq:minmax:8", "ptq:minmax:4")
    config.quant.bits = (8, 4)  # nothing in float to re-quantize
    assert presets.target_names("quick", config) == ("8", "4", "3", "6")


def test_a_network_that_predicts_at_random_bit_widths_is_measured_and_attacked_so():
    config = config_lib.default()
    assert "random" not in presets.target_names("quick", config)
    config.loss.method = "dwq"
    assert presets.target_names("pools", config)[-1] == "random"
    assert {"patch_pgd|self:random", "sparse_rs|self:random"} <= {*names("quick", config)}
    assert "random" not in presets.target_names("sanity", config)
    config.quant.bits = (4,)
    assert "random" not in presets.target_names("quick", config)


def test_a_network_of_one_bit_width_has_no_attack_on_all_of_them():
    config = config_lib.default()
    config.quant.bits = (4,)
    assert not [name for name in names("quick", config) if "self:all" in name]


def test_curves_reach_the_whole_image_and_double_their_steps():
    curves = presets.curve_plans(config_lib.default(), 16)
    sizes = [x for x, _ in curves["patch side (px)"]]
    assert sizes == sorted(sizes) and sizes[-1] == 16 and 5 in sizes
    steps = [x for x, _ in curves["steps"]]
    assert [b / a for a, b in itertools.pairwise(steps)] == [2] * (len(steps) - 1)


def test_what_a_preset_leaves_out_is_written_down():
    assert "surrogate qaa" in [entry["attack"] for entry in presets.not_run("quick")]
    assert not presets.not_run("full") and not presets.not_run("pools")


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="--preset must be one of pools, smoke, quick, standard, full, sanity, curves, got 'huge'"
    ):
        presets.check("huge")


def test_surrogates_of_other_architectures_join_a_preset_with_universal_and_per_image_patches():
    config = config_lib.default()
    usual = presets.plans("quick", config)
    added = [plan for plan in presets.plans("quick", config, (), ("fp@deit_tiny_cifar", "fp")) if plan not in usual]
    assert {plan.surrogate for plan in added} == {"fp@deit_tiny_cifar"}
    assert [plan.attack for plan in added] == ["lavan", "gap", "patch_pgd"]


@pytest.mark.parametrize(
    "preset, surrogate, said",
    [
        ("pools", "qat:4", "preset pools has no surrogates; ask for qat:4 under smoke, quick"),
        ("quick", "self:4", "self:4 is the network itself"),
        ("quick", "fp@alexnet", "a surrogate is one of fp, qat:BITS"),
    ],
)
def test_surrogates_that_cannot_join_are_refused_in_one_line(preset, surrogate, said):
    with pytest.raises(ValueError, match=said):
        presets.plans(preset, config_lib.default(), (), (surrogate,))
