"""Verdicts: worst cells, worst images, masking, sanity and convergence flags; all on hand-made outcomes."""

import numpy as np
import pytest
from outcomes_example import LABELS, NUM, make_cell, make_outcomes, record_of
from scipy import stats

from triqdef_jax import results, verdicts
from triqdef_jax.results import Outcomes


def test_the_worst_cell_is_the_most_successful_one_that_is_no_control():
    cells = make_cell("weak", 4), make_cell("strong", 9, access="white-box"), make_cell("grey", 30, access="control")
    record = record_of(make_outcomes(*cells))
    assert (verdicts.worst(record)["4"]["cell"], verdicts.worst(record)["4"]["num"]) == ("strong", 9)
    assert verdicts.worst(record, access="transfer")["4"]["cell"] == "weak"
    nothing = verdicts.worst(record, access="query")["4"]
    assert nothing["cell"] is None and nothing["den"] == 0


def test_the_worst_case_per_image_counts_images_that_any_attack_fools():
    # 0-3 and 2-7 overlap: 8 images fall to one or the other; the control's do not count.
    cells = make_cell("a", 4), make_cell("b", 6, first=2), make_cell("grey", 30, access="control")
    rate = verdicts.robust_all(make_outcomes(*cells))["4"]
    assert (rate["num"], rate["den"]) == (NUM - 8, NUM)


def test_a_wrong_image_is_no_robust_one():
    outcomes = make_outcomes(make_cell("a", 4))
    clean = outcomes.clean.copy()
    clean[0, 10] = 1
    predictions = outcomes.cells[0].predictions.copy()  # the patch happens to repair it
    rate = verdicts.robust_all(outcomes._replace(clean=clean))["4"]
    assert rate["num"] == NUM - 5 and predictions[0, 0, 10] == 0


@pytest.mark.parametrize(("num_right", "is_flagged"), [(4, True), (12, True), (14, False), (40, False)])
def test_a_bit_width_that_is_hardly_right_without_a_patch_is_flagged(num_right, is_flagged):
    """One that says a single class has nothing that a patch could turn: success 0 of its right images."""
    assert (wilson(num_right, NUM)[1] < 0.5) == is_flagged  # half of the other bit-width, which is right everywhere
    clean = np.zeros((2, NUM), np.int32)
    clean[1, num_right:] = 1
    cell = make_cell("lavan", 0)
    cell = cell._replace(predictions=np.concatenate([cell.predictions, clean[1:, None]]))
    record = record_of(Outcomes(("32", "8"), LABELS, np.arange(NUM), clean, (cell,)))
    assert record["cells"][0]["success"]["8"]["asr_correct"]["rate"] == 0.0
    flags = verdicts.collapse_flags(record)
    assert [(flag["flag"], flag["target"]) for flag in flags] == [("hardly right without a patch", "8")] * is_flagged


def pgd_of(num_fooled, name="patch_pgd", **about):
    """The strongest attack with gradients on the bit-width itself."""
    about = {"access": "white-box", "surrogate": "self:4", "attack": "patch_pgd"} | about
    return make_cell(name, num_fooled, **about)


def test_a_weaker_attacker_who_fools_significantly_more_raises_a_flag():
    own = pgd_of(2)
    better = make_cell("lavan", 14, first=2)
    slightly = make_cell("gap", 5)
    flags = verdicts.masking_flags(make_outcomes(own, better, slightly))
    assert [(flag["flag"], flag["cell"], flag["target"]) for flag in flags] == [
        ("transfer beats white-box", "lavan", "4")
    ]
    assert "fools 14 images that patch_pgd on this bit-width does not, and misses 2, of 40" in flags[0]["detail"]


@pytest.mark.parametrize(
    ("about", "flag"),
    [
        ({"access": "transfer", "surrogate": "fp"}, "transfer beats white-box"),
        ({"access": "white-box", "surrogate": "self:32"}, "transfer beats white-box"),  # made on another bit-width
        ({"access": "query", "surrogate": "self:32"}, "transfer beats white-box"),
        ({"access": "query", "surrogate": "self:4"}, "black-box beats white-box"),
        ({"access": "white-box", "surrogate": "self:4"}, "white-box beats patch_pgd"),
        ({"access": "adaptive", "surrogate": "self:all"}, "adaptive beats patch_pgd"),
        ({"access": "control", "surrogate": ""}, None),
    ],
)
def test_every_attack_is_held_against_patch_pgd_under_a_name_that_says_what_it_knew(about, flag):
    flags = verdicts.masking_flags(make_outcomes(pgd_of(2), make_cell("other", 30, **about)))
    assert [found["flag"] for found in flags] == [flag] * (flag is not None)


def test_patch_pgd_itself_with_twice_the_steps_is_no_rival_and_without_it_nothing_is_asked():
    assert not verdicts.masking_flags(make_outcomes(pgd_of(2), pgd_of(30, "longer", doubles="patch_pgd")))
    assert not verdicts.masking_flags(make_outcomes(make_cell("lavan", 30)))
    assert verdicts.checks(make_outcomes(make_cell("lavan", 30)), []) == []


def test_patches_are_held_against_patch_pgd_of_their_own_size():
    small, large = pgd_of(2, "small", size_px=3), pgd_of(20, "large")
    cells = small, large, make_cell("lavan", 14, first=20), make_cell("gap", 14, first=20, size_px=3)
    flags = verdicts.masking_flags(make_outcomes(*cells))
    assert [flag["cell"] for flag in flags] == ["gap"]  # 14 : 20 against the large patch, 14 : 2 against the small one


def test_cells_meet_on_the_images_that_both_attacked():
    own, few = pgd_of(10), make_cell("sparse_rs", 8, access="query", surrogate="self:4")
    few = few._replace(predictions=few.predictions[:, :, :12], rows=np.arange(12))
    assert not verdicts.masking_flags(make_outcomes(own, few))
    shifted = few._replace(rows=np.arange(10, 22))  # its images 10 to 17 fell, of which patch_pgd fooled none
    assert (
        "fools 8 images that patch_pgd on this bit-width does not, and misses 0, of 12"
        in (verdicts.masking_flags(make_outcomes(own, shifted))[0]["detail"])
    )


def test_checks_say_what_was_asked_and_what_came_out():
    cells = (
        pgd_of(5),
        pgd_of(6, "longer", doubles="patch_pgd"),
        make_cell("lavan", 4),
        make_cell("grey", 9, access="control"),
    )
    quiet = make_outcomes(*cells)
    assert verdicts.checks(quiet, verdicts.masking_flags(quiet)) == [
        "no attack beats patch_pgd made on the attacked bit-width (1 pairs of attack and bit-width, the same images, McNemar, Holm)",
        "twice the steps of patch_pgd do not fool significantly more",
    ]
    loud = make_outcomes(cells[0], pgd_of(30, "longer", doubles="patch_pgd"), make_cell("lavan", 30))
    flags = [*verdicts.masking_flags(loud), *verdicts.convergence_flags(loud)]
    said = verdicts.checks(loud, flags)
    assert said[0].startswith("an attack beats patch_pgd in 1 cases") and said[1].endswith("fool significantly more")
    assert "not fool" not in said[1]


def test_many_harmless_patches_do_not_make_a_flag_by_chance():
    own = pgd_of(0)
    # One patch that fools 6 images more has p = 1/32; after 20 patches it says nothing.
    assert verdicts.masking_flags(make_outcomes(own, make_cell("lavan", 6)))
    many = make_cell("lavan", 0, patches=20)
    many.predictions[0, 7, :6] = 1
    assert not verdicts.masking_flags(make_outcomes(own, many))


def noise_of(num_fooled, **about):
    return make_cell("noise", num_fooled, access="control", surrogate="", **about)


def lavan_of(num_fooled, surrogate="self:4", **about):
    return make_cell("lavan", num_fooled, access="white-box", surrogate=surrogate, **about)


def wilson(num, den, z=1.959964):
    """Wilson's interval by its formula."""
    rate, part = num / den, z * z / den
    middle = (rate + part / 2) / (1 + part)
    half = z / (1 + part) * np.sqrt(rate * (1 - rate) / den + part / 4 / den)
    return middle - half, middle + half


def weak_cells(*cells):
    return [flag["cell"] for flag in verdicts.sanity_flags(make_outcomes(*cells))]


@pytest.mark.parametrize(("num_fooled", "is_above"), [(14, False), (15, True)])
def test_an_attack_beats_noise_when_its_interval_lies_above(num_fooled, is_above):
    assert (wilson(num_fooled, NUM)[0] > wilson(4, NUM)[1]) == is_above
    outcomes = make_outcomes(noise_of(4), lavan_of(num_fooled))
    flags = verdicts.sanity_flags(outcomes)
    assert [(flag["flag"], flag["target"], flag["cell"]) for flag in flags] == [
        ("no better than noise", "4", "lavan")
    ] * (not is_above)
    (line,) = verdicts.checks(outcomes, flags)
    assert line.startswith("beat noise" if is_above else "DO NOT beat noise") and "at 4 bits" in line
    low, high = (100 * end for end in wilson(num_fooled, NUM))
    assert f"lavan {num_fooled}/40 = {2.5 * num_fooled:.1f} % [{low:.1f}, {high:.1f}] against 4/40 = 10.0 % [" in line


def test_attacks_that_beat_noise_and_those_that_do_not_are_named_apart():
    outcomes = make_outcomes(
        noise_of(4), lavan_of(20), pgd_of(5), make_cell("mpa", 30, access="query", surrogate="self:4")
    )
    flags = verdicts.sanity_flags(outcomes)
    assert [flag["cell"] for flag in flags] == ["patch_pgd"]
    beat, weak = verdicts.checks(outcomes, flags)[1:]
    assert "lavan 20/40" in beat and "mpa 30/40" in beat and "patch_pgd" not in beat
    assert weak.startswith("DO NOT beat") and "patch_pgd 5/40" in weak and "lavan" not in weak


def test_the_best_patch_counts_and_its_interval_is_widened_for_the_choice():
    for patches, is_above in ((1, True), (2, True), (20, False)):  # as the best of twenty it may be luck
        z = stats.norm.ppf(1 - 0.025 / patches)
        assert (wilson(16, NUM, z)[0] > wilson(4, NUM)[1]) == is_above
        cell = lavan_of(0, patches=patches)
        cell.predictions[0, patches // 2, :16] = 1
        assert weak_cells(noise_of(4), cell) == ["lavan"] * (not is_above)


def test_noise_counts_with_all_its_patches():
    lucky, all_alike = noise_of(0, patches=10), noise_of(15, patches=10)
    lucky.predictions[0, 3, :15] = 1
    assert not weak_cells(lucky, lavan_of(15)) and weak_cells(all_alike, lavan_of(15)) == ["lavan"]
    outcomes = make_outcomes(lucky, lavan_of(15))
    (line,) = verdicts.checks(outcomes, [])
    low, high = (
        results.summarise(outcomes, seed=0)["cells"][0]["success"]["4"]["asr_correct"][end] for end in ("low", "high")
    )
    assert line.endswith(f"against 15/400 = 3.8 % [{100 * low:.1f}, {100 * high:.1f}]")


def test_noise_is_asked_on_the_images_that_the_attack_met_and_of_its_size():
    few = lavan_of(10)._replace(rows=np.arange(12))
    few = few._replace(predictions=few.predictions[:, :, :12])
    assert not weak_cells(noise_of(25, first=12), few)  # noise fools none of the twelve
    assert weak_cells(noise_of(8, first=0), few) == ["lavan"]
    assert not weak_cells(noise_of(40, size_px=9), few)
    noise = noise_of(0)
    noise = noise._replace(predictions=noise.predictions[:, :, :12], rows=np.arange(12))
    assert weak_cells(noise, lavan_of(28, first=12)) == ["lavan"]  # none of the twelve


def test_only_right_images_of_another_class_than_the_target_are_counted():
    outcomes = make_outcomes(noise_of(4), lavan_of(15))
    clean = outcomes.clean.copy()
    clean[0, :2] = 1  # wrong without a patch: two less of both
    (line,) = verdicts.checks(outcomes._replace(clean=clean), [])
    assert "lavan 13/38" in line and "against 2/38" in line
    labels = np.repeat([0, 1], NUM // 2)
    split = make_outcomes(noise_of(4), lavan_of(6)._replace(target=np.array([1])))._replace(labels=labels)
    (line,) = verdicts.checks(split._replace(clean=labels[None]), [])
    assert "lavan 6/20" in line and "against 4/20" in line  # noise too, on the images that count for the attack
    aimed = lavan_of(15)._replace(target=np.array([0]))  # the class of every image
    noise = noise_of(4, patches=2)
    assert verdicts.checks(make_outcomes(noise, aimed), []) == [] == weak_cells(noise, aimed)


def test_only_attacks_on_the_widest_bit_width_are_held_against_noise():
    def both_targets(cell, at_four):
        return cell._replace(predictions=np.concatenate([cell.predictions, at_four.predictions]))

    cells = (
        both_targets(noise_of(4), noise_of(30)),
        both_targets(lavan_of(20, "self:32"), lavan_of(0)),
        both_targets(pgd_of(0), pgd_of(0)),  # made on 4 bits
        both_targets(make_cell("adaptive", 6, access="adaptive", surrogate="self:all"), lavan_of(40)),
        both_targets(make_cell("gap", 0, surrogate="fp"), make_cell("gap", 0)),
    )
    outcomes = Outcomes(("4", "32"), LABELS, np.arange(NUM), np.zeros((2, NUM), np.int32), cells)
    reordered = [cell._replace(predictions=cell.predictions[::-1]) for cell in cells]
    flags = verdicts.sanity_flags(outcomes._replace(cells=tuple(reordered)))
    assert [(flag["target"], flag["cell"]) for flag in flags] == [("32", "adaptive")]


def test_without_noise_or_an_attack_on_the_network_nothing_is_said_of_noise():
    for cells in ((lavan_of(0),), (noise_of(4), make_cell("gap", 0, surrogate="fp")), (noise_of(4),)):
        outcomes = make_outcomes(*cells)
        assert verdicts.checks(outcomes, []) == [] == verdicts.sanity_flags(outcomes)


@pytest.mark.parametrize(("num_fooled", "said"), [(100, "at least"), (99, "at least"), (98, "LESS THAN")])
def test_a_patch_as_large_as_the_image_must_fool_99_percent(num_fooled, said):
    predictions = np.zeros((1, 1, 100), np.int32)
    predictions[0, 0, :num_fooled] = 1
    cell = pgd_of(0, "patch_pgd|self:4|whole image", size_px=16)._replace(predictions=predictions, rows=np.arange(100))
    outcomes = Outcomes(("4",), np.zeros(100, int), np.arange(100), np.zeros((1, 100), np.int32), (cell,))
    (line,) = verdicts.checks(outcomes, [])
    low, high = (100 * end for end in wilson(num_fooled, 100))
    figures = f"(16 px) fools {num_fooled}/100 = {num_fooled}.0 % [{low:.1f}, {high:.1f}] at 4 bits"
    assert figures in line and line.endswith(f"{said} 99 %")
    flags = verdicts.sanity_flags(outcomes)
    assert [(flag["flag"], flag["target"]) for flag in flags] == [("whole image resists", "4")] * (num_fooled < 99)


def test_a_whole_image_patch_is_neither_worst_case_nor_rival_of_noise_of_its_size():
    whole = pgd_of(NUM, "patch_pgd|self:4|whole image", size_px=16)
    outcomes = make_outcomes(lavan_of(3), whole, noise_of(NUM, size_px=16))
    record = record_of(outcomes)
    assert verdicts.worst(record)["4"]["cell"] == "lavan"
    assert verdicts.robust_all(outcomes)["4"]["num"] == NUM - 3
    assert verdicts.sanity_flags(outcomes) == [] == verdicts.masking_flags(outcomes)


def test_twice_the_steps_that_fool_more_are_not_converged():
    short = make_cell("pgd", 5, access="white-box", surrogate="self:4")
    long = make_cell("pgd twice", 20, access="white-box", surrogate="self:4", doubles="pgd")
    assert [flag["flag"] for flag in verdicts.convergence_flags(make_outcomes(short, long))] == ["not converged"]
    same = make_cell("pgd twice", 6, access="white-box", surrogate="self:4", doubles="pgd")
    assert not verdicts.convergence_flags(make_outcomes(short, same))
