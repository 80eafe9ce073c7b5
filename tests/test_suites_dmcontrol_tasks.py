"""Rewards of the eleven tasks of our own, by hand from set states; their models and initial states."""

import math

import numpy as np
import pytest

pytest.importorskip("dm_control")

from sb3_mbdpo.suites.dmcontrol_tasks import TASKS


def gaussian(distance: float, margin: float) -> float:
    """The suite's default: 0.1 at the margin."""
    return 0.1 ** ((distance / margin) ** 2)


class State:
    """A task whose simulation can be set: angles and speeds by the names of joints, zero where not given."""

    def __init__(self, domain: str, task: str):
        self.env = TASKS[domain, task]()
        self.env.reset()
        self.physics, self.task = self.env.physics, self.env.task

    def reward(self, positions: dict[str, float], velocities: dict[str, float] | None = None) -> float:
        self.physics.data.qpos[:], self.physics.data.qvel[:] = 0, 0
        for name, value in positions.items():
            self.physics.named.data.qpos[name] = value
        for name, value in (velocities or {}).items():
            self.physics.named.data.qvel[name] = value
        self.physics.forward()
        return float(self.task.get_reward(self.physics))


@pytest.mark.parametrize(("task", "speed"), [("walk_backwards", 1), ("run_backwards", 8)])
def test_backwards_walker(task: str, speed: int):
    state = State("walker", task)
    # The torso stands 1.3 above the floor when all joints are at zero
    assert state.reward({}, {"rootx": -speed}) == pytest.approx(1)
    assert state.reward({}, {"rootx": -2 * speed}) == pytest.approx(1)
    assert state.reward({}, {"rootx": -speed / 2}) == pytest.approx((5 * 0.5 + 1) / 6)
    assert state.reward({}, {"rootx": speed}) == pytest.approx(1 / 6)
    # 0.9 high and leaning by 60 degrees
    stand = (3 * gaussian(0.3, 0.6) + (1 + math.cos(math.pi / 3)) / 2) / 4
    assert state.reward({"rootz": -0.4, "rooty": math.pi / 3}, {"rootx": -speed}) == pytest.approx(stand)


def test_backwards_cheetah():
    state = State("cheetah", "run_backwards")
    assert state.reward({}, {"rootx": -8}) == pytest.approx(1)
    assert state.reward({}, {"rootx": -2}) == pytest.approx(0.25)
    assert state.reward({}, {"rootx": 8}) == 0


@pytest.mark.parametrize(("task", "foot_height"), [("run_front", 0.31), ("run_back", 0.28)])
def test_cheetah_on_one_foot(task: str, foot_height: float):
    state = State("cheetah", task)
    # With straight joints the torso is 0.7 above the ground, the hind foot 0.31, the fore foot 0.28
    up = (3 * gaussian(1.2 - foot_height, 0.6) + 2 * gaussian(0.5, 0.6)) / 5
    assert state.reward({}, {"rootx": 6}) == pytest.approx(up)
    assert state.reward({}, {"rootx": 3}) == pytest.approx(up * (5 * 0.5 + 1) / 6)
    assert state.reward({"rootz": 1}, {"rootx": -1}) == pytest.approx(1 / 6)


def test_cheetah_jump():
    state = State("cheetah", "jump")
    heights = [(0.7 + 0.31) / 2, (0.7 + 0.28) / 2]
    low = np.mean([5 * gaussian(1.2 - height, 0.6) for height in heights])
    assert state.reward({}, {"rootx": 0.5}) == pytest.approx((low + 1) / 6)
    assert state.reward({}, {"rootx": -0.75}) == pytest.approx((low + 0.5) / 6)
    assert state.reward({"rootz": 1}) == pytest.approx(1)


def test_backwards_hopper():
    state = State("hopper", "hop_backwards")
    state.reward({})
    assert 0.6 <= state.physics.height() <= 2
    assert state.reward({}, {"rootx": -1}) == pytest.approx(1)
    assert state.reward({}, {"rootx": -0.5}) == pytest.approx(0.5)
    assert state.reward({}, {"rootx": 1}) == 0
    # On its side, torso beside the foot
    assert state.reward({"rooty": math.pi / 2}, {"rootx": -1}) == 0


@pytest.mark.parametrize(("task", "size"), [("three_easy", 0.05), ("three_hard", 0.015)])
def test_reacher_of_three_links(task: str, size: float):
    state = State("reacher", task)
    place = state.physics.named.model.geom_pos
    for distance, reward in ((size + 0.009, 1), (size + 0.011, 0)):
        # Straight, the finger is three links of 0.09 away from the shoulder
        place["target", "x"], place["target", "y"] = 0.27 + distance, 0
        assert state.reward({}) == reward
        # Bent at a right angle by the elbow: one link along x, two along y
        place["target", "x"], place["target", "y"] = 0.09, 0.18 + distance
        assert state.reward({"elbow": math.pi / 2}) == reward
    assert list(state.env.action_spec().shape) == [3]
    limits = state.physics.named.model.jnt_range
    for joint in ("elbow", "wrist"):
        np.testing.assert_allclose(limits[joint], np.deg2rad([-80, 80]))
    assert state.physics.named.model.jnt_limited["shoulder"] == 0
    assert state.env.reset().observation["to_target"].shape == (2,)


def test_spinning_cup():
    state = State("ball_in_cup", "spin")
    # Ball and target are 0.2 + ball_z and 0.55 above the ground; the ball half a metre below, at its full speed
    assert state.reward({"ball_z": -0.15}, {"ball_x": 6}) == pytest.approx(1)
    assert state.reward({"ball_z": -0.15}, {"ball_x": 1.8, "ball_z": -2.4}) == pytest.approx((1 + 2 * 0.5) / 3)
    assert state.reward({"ball_z": 0.1}, {"ball_x": 6}) == pytest.approx((0.5 + 2) / 3)
    assert state.reward({"ball_z": 0.35}, {"ball_x": 6}) == 0


def test_the_cup_begins_with_its_ball_nearly_always():
    state = State("ball_in_cup", "spin")
    state.task.random.seed(0)
    inside = []
    for _ in range(100):
        state.env.reset()
        assert state.physics.data.ncon == 0
        inside.append(state.physics.in_target())
    assert 80 <= sum(inside) <= 98


def test_spinning_pendulum():
    state = State("pendulum", "spin")
    for sign in (-1, 1):
        assert state.reward({"hinge": 1}, {"hinge": 9 * sign}) == pytest.approx(1)
        assert state.reward({"hinge": 1}, {"hinge": 6.75 * sign}) == pytest.approx(0.75)
    assert state.reward({}) == 0


@pytest.mark.parametrize(
    ("domain", "task", "floor"), [("walker", "walk_backwards", "floor"), ("cheetah", "jump", "ground")]
)
def test_floors_are_twice_as_long(domain: str, task: str, floor: str):
    from dm_control import suite

    usual = suite.load(domain, "run").physics.named.model.geom_size[floor]
    longer = TASKS[domain, task]().physics.named.model.geom_size[floor]
    np.testing.assert_allclose(longer, usual * [2, 1, 1])


@pytest.mark.parametrize("key", TASKS)
def test_episodes_last_as_long_as_the_suites(key: tuple[str, str]):
    from dm_control import suite

    ours, usual = TASKS[key](), suite.load(key[0], dict(suite.BENCHMARKING)[key[0]])
    assert ours.control_timestep() == usual.control_timestep()
    assert ours._step_limit == usual._step_limit == 1000
