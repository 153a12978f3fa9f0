"""A run comes back from its newest sound checkpoint, bit for bit, or says why it cannot."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from several_processes import CONNECTED, run_processes

from triqdef_jax import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent

TX = optax.sgd(0.1, momentum=0.9)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(step=1, width=64):
    weights = jax.random.normal(jax.random.key(step), (40, width))
    conv = {"kernel": weights, "bias": jnp.ones(3, jnp.bfloat16)}
    params = {"conv": conv, "scales": [jnp.float32(0.1), jnp.zeros(2)]}
    return State(step=jnp.int32(step), params=params, opt_state=TX.init(params), key=jax.random.key(step))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert checkpoints.tree_digest(a) == checkpoints.tree_digest(b)


@pytest.fixture
def run(tmp_path):
    """A directory with the sound steps 10, 20 and 30, and what reads it."""
    with checkpoints.Checkpointer(tmp_path / "ck") as saver:
        for step in (10, 20, 30):
            saver.save(step, make_state(step), {"stage": step // 10})
    with checkpoints.Checkpointer(tmp_path / "ck") as reader:
        yield tmp_path / "ck", reader


def flip_a_byte(step_folder):
    path = max(step_folder.glob("state/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(step_folder):
    path = max(step_folder.glob("state/d/*"), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def delete_half(step_folder):
    shutil.rmtree(step_folder / "state" / "d")


def swap_in_another_state(step_folder):
    shutil.rmtree(step_folder / "state")
    shutil.copytree(step_folder.with_name("10") / "state", step_folder / "state")


def change_meta(step_folder):
    path = step_folder / "meta" / "metadata"
    text = path.read_text()
    assert '"stage": 3' in text or '"stage":3' in text
    path.write_text(text.replace('"stage": 3', '"stage": 4').replace('"stage":3', '"stage":4'))


DAMAGES = [flip_a_byte, truncate, empty, delete_half, swap_in_another_state, change_meta]


def test_a_state_comes_back_bit_for_bit_with_its_types_and_meta(run):
    _, reader = run
    state, meta = reader.restore(jax.eval_shape(make_state))
    assert_same(state, make_state(30))
    assert meta == {"stage": 3, "step": 30}
    assert jax.random.uniform(state.key) == jax.random.uniform(make_state(30).key)
    assert state.params["conv"]["bias"].dtype == jnp.bfloat16


def test_without_checkpoints_restore_is_none_and_nothing_is_made(tmp_path):
    reader = checkpoints.Checkpointer(tmp_path / "ck")
    assert reader.restore(make_state()) is None
    assert reader.latest_step() is None
    assert not (tmp_path / "ck").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*train first"):
        reader.restore_raw()


def test_only_the_newest_are_kept(tmp_path):
    with checkpoints.Checkpointer(tmp_path, keep=2) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, {"w": jnp.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        checkpoints.Checkpointer(tmp_path, keep=0)


def test_the_state_may_be_donated_right_after_save(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros(300_000)}
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
        for _ in range(3):
            state = advance(state)
    assert not checkpoints.Checkpointer(tmp_path).restore_raw()[0]["w"].any()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, caplog, capfd, damage):
    folder, reader = run
    damage(folder / "30")
    state, meta = reader.restore(make_state())
    assert_same(state, make_state(20))
    assert meta == {"stage": 2, "step": 20}
    (warning,) = caplog.messages
    assert warning.startswith("checkpoint 30 in ") and "is damaged: " in warning and "\n" not in warning
    assert "Traceback" not in capfd.readouterr().err
    # Training goes on from 20 and reaches 30 again: the damaged one must not stand in the way.
    assert reader.save(30, make_state(30), {"stage": 3})
    reader.wait()
    assert_same(reader.restore(make_state())[0], make_state(30))
    assert (folder / "30.damaged").is_dir()


def test_an_old_checkpoint_that_a_kill_left_half_deleted_disturbs_nothing_and_goes_with_the_next_save(run, caplog):
    folder, reader = run
    delete_half(folder / "10")
    assert reader.restore(make_state())[1]["step"] == 30 and reader.restore_raw(20)[1]["step"] == 20
    assert reader.save(40, make_state(40), {})
    reader.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["20", "30", "40"] and caplog.messages == []


def test_one_object_may_save_restore_past_damage_and_save_again(tmp_path):
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(1, make_state(1), {})
        saver.save(2, make_state(2), {})
        assert saver.restore_raw()[1]["step"] == 2  # both reading calls wait for the save in progress
        empty(tmp_path / "2")
        assert saver.restore(make_state())[1]["step"] == 1
        assert saver.save(2, make_state(2), {})
        assert_same(saver.restore(make_state())[0], make_state(2))


def test_another_state_under_the_right_name_is_told_by_its_digest(run, caplog):
    folder, reader = run
    swap_in_another_state(folder / "30")
    assert reader.restore(make_state())[1]["step"] == 20
    assert "its content does not match its digest" in caplog.text


def test_when_all_are_damaged_there_is_no_fresh_start_and_nothing_is_moved(run):
    folder, reader = run
    for step, damage in ((10, truncate), (20, empty), (30, flip_a_byte)):
        damage(folder / str(step))
    with pytest.raises(checkpoints.CheckpointError, match=r"no sound checkpoint in .*\[30, 20, 10\]"):
        reader.restore(make_state())
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


def test_a_checkpoint_of_another_network_is_refused_by_leaf_and_not_called_damaged(run, caplog):
    folder, reader = run
    leaf = "opt_state/0/trace/conv/kernel"
    said = rf"checkpoint 30 .* another config: {leaf} is float32\[40, 64\] there and float32\[40, 65\] here"
    with pytest.raises(checkpoints.CheckpointError, match=said):
        reader.restore(make_state(width=65))
    assert caplog.messages == []
    assert (folder / "30").is_dir()


def test_raw_restoring_gives_numpy_under_the_stored_names_and_changes_nothing(run, caplog):
    folder, reader = run
    flip_a_byte(folder / "30")
    state, meta = reader.restore_raw()
    assert meta == {"stage": 2, "step": 20}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(state["params"]["conv"]["kernel"], make_state(20).params["conv"]["kernel"])
    np.testing.assert_array_equal(state["key"], jax.random.key_data(make_state(20).key))
    assert "checkpoint 30" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]
    assert reader.restore_raw(10)[1]["step"] == 10
    with pytest.raises(checkpoints.CheckpointError, match="damaged are"):
        reader.restore_raw(30)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 25 .*\[30, 20, 10\]"):
        reader.restore_raw(25)


def test_saving_the_same_state_again_is_no_error_but_another_one_or_an_older_step_is(run):
    _, saver = run
    state, _ = saver.restore(make_state())
    assert saver.save(30, state, {"stage": 3}) is False
    with pytest.raises(ValueError, match=r"cannot save step 30: .* already holds step 30"):
        saver.save(30, make_state(31), {})
    with pytest.raises(ValueError, match="already holds step 30"):
        saver.save(25, state, {})


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    saver = checkpoints.Checkpointer(tmp_path / "ck")
    with pytest.raises(ValueError, match=r"size zero.*got empty/x"):
        saver.save(1, {"empty": {"x": jnp.zeros((0, 3))}}, {})
    with pytest.raises(ValueError, match="must not have an entry 'step'"):
        saver.save(1, {"w": jnp.ones(1)}, {"step": 2})
    with pytest.raises(ValueError, match="cannot write a set as JSON"):
        saver.save(1, {"w": jnp.ones(1)}, {"bits": {8, 4}})
    assert not (tmp_path / "ck").exists()


def test_a_place_that_cannot_be_a_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    saver = checkpoints.Checkpointer(tmp_path / "file" / "ck")
    with pytest.raises(checkpoints.CheckpointError, match=r"cannot write checkpoints to .*: Not a directory"):
        saver.save(1, {"w": jnp.ones(1)}, {})


def test_the_digest_sees_one_bit_and_a_swap_but_not_the_kind_of_container():
    tree = {"a": np.arange(4.0), "b": np.ones(4)}
    flipped = {**tree, "a": np.array([0.0, 1.0, 2.0, np.nextafter(3.0, 4.0)])}
    swapped = {"a": tree["b"], "b": tree["a"]}
    assert len({checkpoints.tree_digest(t) for t in (tree, flipped, swapped)}) == 3
    assert checkpoints.tree_digest([tree["a"], tree["b"]]) == checkpoints.tree_digest({"0": tree["a"], "1": tree["b"]})


KILLED_RUN = """
import sys
import jax, jax.numpy as jnp
from triqdef_jax import checkpoints
saver = checkpoints.Checkpointer(sys.argv[1])
advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
state = advance({"w": jnp.full(500_000, -1.0)})
start = 0
restored = saver.restore(state)
if restored:
    state, start = restored[0], restored[1]["step"]
for step in range(start + 1, start + 1000):
    state = advance(state)
    saver.save(step, state, {})
    print(step, flush=True)
"""


def test_a_run_killed_while_it_saves_resumes_from_a_whole_checkpoint(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path)]
    reached = 0
    for _ in range(2):
        with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as child:
            first = last = int(child.stdout.readline())
            assert first == reached + 1
            while last < first + 5:
                last = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)  # save `last` was just started: it is being written
        state, meta = checkpoints.Checkpointer(tmp_path).restore_raw()
        reached = meta["step"]
        assert reached >= last - 1  # save `last` began only when the one before was on the disk
        assert np.all(state["w"] == reached)


TWO_PROCESSES = """
def main(rank, folder):
    import shutil, jax.numpy as jnp
    from jax.experimental import multihost_utils
    from triqdef_jax import checkpoints
    everywhere = sharding.replicated(sharding.data_mesh())
    def make(step):
        return {"w": jax.make_array_from_callback((100,), everywhere, lambda i: np.full(100, step, np.float32)[i]),
                "key": jax.jit(lambda: jax.random.key(5), out_shardings=everywhere)()}
    with checkpoints.Checkpointer(folder) as saver:
        for step in (1, 2):
            saver.save(step, make(step), {})
    multihost_utils.sync_global_devices("saved")
    if rank == 0:
        shutil.rmtree(f"{folder}/2/state/d")
    multihost_utils.sync_global_devices("damaged")
    with checkpoints.Checkpointer(folder) as reader:
        state, meta = reader.restore(make(0))
        assert meta["step"] == 1 and checkpoints.tree_digest(state) == checkpoints.tree_digest(make(1))
        assert state["w"].sharding == everywhere
        assert reader.save(2, make(2), {})
"""


def test_two_processes_save_agree_on_damage_and_leave_what_one_process_can_read(tmp_path):
    ended = run_processes(TWO_PROCESSES + CONNECTED, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "checkpoint 2" in ended[0][2] and "checkpoint 2" not in ended[1][2]
    raw, meta = checkpoints.Checkpointer(tmp_path).restore_raw()
    assert meta["step"] == 2 and np.all(raw["w"] == 2) and raw["key"].dtype == np.uint32
    state, meta = checkpoints.Checkpointer(tmp_path).restore({"w": jnp.zeros(100), "key": jax.random.key(0)})
    assert meta["step"] == 2 and np.all(state["w"] == 2)
    assert jax.random.uniform(state["key"]) == jax.random.uniform(jax.random.key(5))
