"""Reading result files: labels, kinds, what is missing, and refusals of damaged ones."""

import json

import pytest
import report_example as example

from triqdef_jax.report import records


@pytest.fixture
def workdir(tmp_path):
    return example.full_run(tmp_path / "digits")


def test_all_kinds_are_read_and_a_torn_line_of_metrics_is_dropped(workdir):
    (run,) = records.read_runs([str(workdir)])
    assert {record["kind"] for record in run.records.values()} == set(records.KINDS)
    assert [line["step"] for line in run.metrics] == [20 * i for i in range(1, 31)]
    assert records.missing((run,)) == [] and run.ignored == ()


def test_files_of_other_kinds_are_named_and_left_unread(workdir):
    (workdir / "results" / "clean.json").write_text('{"pools": {}}')
    (workdir / "results" / "list.json").write_text("[1]")
    (run,) = records.read_runs([str(workdir)])
    assert run.ignored == ("clean", "list")


def test_labels_are_unique(tmp_path):
    paths = [str(example.full_run(tmp_path / parent / "digits")) for parent in "ab"]
    runs = records.read_runs(paths)
    assert [run.label for run in runs] == paths
    (tmp_path / "a/digits/results/deployed.json").write_text(json.dumps(example.evaluation("digits")))
    runs = records.read_runs(paths)
    labels = [f"{paths[0]}: deployed", f"{paths[0]}: evaluation", paths[1]]
    assert list(records.of_kind(runs, "evaluation")) == labels


def test_a_kind_that_only_some_runs_lack_is_missing_there(workdir, tmp_path):
    bare = example.write_run(tmp_path / "bare", {"evaluation": example.evaluation("bare")})
    said = dict(records.missing(records.read_runs([str(workdir), str(bare)])))
    assert said["pictures: bare"] == f"python -m triqdef_jax.pictures --workdirs={bare}"
    assert not [what for what in said if what.startswith("paired")]  # one record between the two runs is enough


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{torn", "not readable as JSON"),
        ('{"kind": "evaluation", "name": "x"}', "needs targets, clean_accuracy, cells"),
        ('{"kind": "curves"}', "needs curves"),
    ],
)
def test_damaged_records_are_refused_by_name(workdir, content, said):
    (workdir / "results" / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{said}"):
        records.read_runs([str(workdir)])


def test_a_cell_without_its_fields_is_refused(workdir):
    broken = example.evaluation("digits")
    del broken["cells"][3]["access"]
    (workdir / "results" / "evaluation.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"needs cells\[\]\.access"):
        records.read_runs([str(workdir)])


def test_a_workdir_twice_is_refused(workdir):
    with pytest.raises(ValueError, match="different directories"):
        records.read_runs([str(workdir), f"{workdir}/."])


def test_pictures_come_from_the_results_alone(workdir):
    (run,) = records.read_runs([str(workdir)])
    assert records.read_picture(run, "pictures/patch.png") == records.read_picture(run, "patch.png") == example.png()
    assert records.read_picture(run, "gone.png") is None
    with pytest.raises(ValueError, match="expected pictures inside"):
        records.read_picture(run, "../../other/secret.png")
    (workdir / "results/pictures/text.png").write_text("no image")
    with pytest.raises(ValueError, match="expected a PNG file"):
        records.read_picture(run, "text.png")
