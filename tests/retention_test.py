"""What stays on the disk: the newest checkpoints and the best one, by scores that live and die with their steps."""

import jax.numpy as jnp
import pytest

from triqdef_jax import checkpoints, retention


def save(saver, scores):
    """Save one checkpoint per (step, score); a score of None is left out."""
    for step, score in scores:
        saver.save(step, {"w": jnp.full(3, float(step))}, {} if score is None else {retention.SCORE: score})
    saver.wait()


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_best_stays_beside_the_newest_and_gives_way_to_a_better_one(tmp_path):
    with checkpoints.Checkpointer(tmp_path, keep=2, keep_best=True) as saver:
        save(saver, [(1, None), (2, 0.5), (3, 0.25), (4, 0.25)])
        assert steps_in(tmp_path) == [2, 3, 4] and saver.best_step() == 2
    # Another process of the same run: what it keeps comes from the disk.
    with checkpoints.Checkpointer(tmp_path, keep=2, keep_best=True) as saver:
        saver.restore({"w": jnp.zeros(3)})
        save(saver, [(5, 0.0)])
        assert steps_in(tmp_path) == [2, 4, 5] and saver.best_step() == 2
        save(saver, [(6, 0.5), (7, None), (8, 0.1)])
        assert steps_in(tmp_path) == [6, 7, 8] and saver.best_step() == 6  # as good as step 2, trained longer
        assert saver.restore_raw(6)[0]["w"][0] == 6


def test_without_keep_best_scores_count_for_nothing(tmp_path):
    with checkpoints.Checkpointer(tmp_path, keep=2) as saver:
        save(saver, [(1, 0.9), (2, 0.5), (3, 0.1)])
    assert steps_in(tmp_path) == [2, 3]


def test_a_best_checkpoint_that_was_set_aside_is_the_best_no_more(tmp_path):
    with checkpoints.Checkpointer(tmp_path, keep=3, keep_best=True) as saver:
        save(saver, [(1, 0.2), (2, 0.1), (3, 0.9)])
        (tmp_path / "3" / "state" / "manifest.ocdbt").write_bytes(b"")
        assert saver.restore({"w": jnp.zeros(3)})[1]["step"] == 2
        assert saver.best_step() == 1
        save(saver, [(3, 0.15), (4, 0.1), (5, 0.1)])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["1", "3", "3.damaged", "4", "5"]


@pytest.mark.parametrize(
    "text", ["", "{torn", "[]", '{"user": 3}', '{"user": {"score": "high"}}', '{"user": {"score": NaN}}', "{}"]
)
def test_a_step_whose_entry_cannot_be_read_has_no_score(tmp_path, text):
    for step, content in ((1, '{"user": {"score": 0.5}}'), (2, text)):
        (tmp_path / f"{step}" / "meta").mkdir(parents=True)
        (tmp_path / f"{step}" / "meta" / "metadata").write_text(content)
    assert retention.read_scores(tmp_path, [1, 2, 3]) == {1: 0.5}


def test_there_is_no_best_of_none():
    assert retention.best_of({}) is None
    assert retention.best_of({3: 0.5, 7: 0.5, 9: 0.4}) == 7
