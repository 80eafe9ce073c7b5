"""
The eleven DMControl tasks that are not part of dm_control, on the suite's own models.

Time limits and control steps are the suite's for each domain; heights and speeds are what its physics classes give.
Needs dm_control, hence imported only when one of these tasks is made.
"""

import copy
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import ball_in_cup, cheetah, hopper, pendulum, reacher, walker
from dm_control.utils.rewards import tolerance

Model = tuple[str, dict[str, Any]]
# Of the three-link reacher
LINK_LENGTH, JOINT_LIMIT = 0.09, 80
# Share of cup-spin's episodes in which the ball starts inside the cup
START_INSIDE = 0.9


class BackwardsWalker(walker.PlanarWalker):
    """
    A walker that goes backwards, upright.

    :param speed: Speed from which on it is fast enough
    :param random: As for the suite's tasks
    """

    def __init__(self, speed: float, random: Any = None):
        super().__init__(move_speed=speed, random=random)
        self.speed = speed

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        standing = tolerance(physics.torso_height(), (1.2, np.inf), margin=0.6)
        upright = (1 + physics.torso_upright()) / 2
        move = _linear(physics.horizontal_velocity(), (-np.inf, -self.speed), self.speed / 2, 0.5)
        return (3 * standing + upright) / 4 * (5 * move + 1) / 6


class BackwardsCheetah(cheetah.Cheetah):
    """A cheetah that runs backwards."""

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        return _linear(physics.speed(), (-np.inf, -8), 8, 0.0)


class OneFootCheetah(cheetah.Cheetah):
    """
    A cheetah that runs on its front or on its back foot.

    :param raised_foot: The foot that is off the ground, "bfoot" or "ffoot"
    :param random: As for the suite's tasks
    """

    def __init__(self, raised_foot: str, random: Any = None):
        super().__init__(random=random)
        self.raised_foot = raised_foot

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        foot = tolerance(_height(physics, self.raised_foot), (1.2, np.inf), margin=0.6)
        torso = tolerance(_height(physics, "torso"), (1.2, np.inf), margin=0.6)
        run = _linear(physics.speed(), (6, np.inf), 6, 0.0)
        return (3 * foot + 2 * torso) / 5 * (5 * run + 1) / 6


class JumpingCheetah(cheetah.Cheetah):
    """A cheetah that jumps on the spot: torso and both feet up, without running away."""

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        still = _linear(physics.speed(), (-0.5, 0.5), 0.5, 0.0)
        heights = [(_height(physics, "torso") + _height(physics, foot)) / 2 for foot in ("bfoot", "ffoot")]
        return float(np.mean([(5 * tolerance(height, (1.2, np.inf), margin=0.6) + still) / 6 for height in heights]))


class BackwardsHopper(hopper.Hopper):
    """
    A hopper that hops backwards.

    :param random: As for the suite's tasks
    """

    def __init__(self, random: Any = None):
        super().__init__(hopping=True, random=random)

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        standing = tolerance(physics.height(), (0.6, 2))
        return standing * _linear(physics.speed(), (-np.inf, -1), 0.5, 0.5)


class SpinningCup(ball_in_cup.BallInCup):
    """A cup that swings its ball round, outside of it."""

    def initialize_episode(self, physics: Any) -> None:
        """
        Place the ball at random, free of contact; inside the cup in 9 of 10 episodes.

        :param physics: The simulation
        """
        inside = self.random.uniform() < START_INSIDE
        found = False
        while not found:
            physics.named.data.qpos["ball_x"] = self.random.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            found = physics.data.ncon == 0 and bool(physics.in_target()) == inside
        # Past the suite's own task, which would place the ball anew
        super(ball_in_cup.BallInCup, self).initialize_episode(physics)

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        away = _linear(float(np.linalg.norm(physics.ball_to_target())), (0.5, np.inf), 0.25, 0.5)
        speed = float(np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]]))
        fast = _linear(speed, (6, np.inf), 3, 0.5)
        return (1.0 - physics.in_target()) * (away + 2 * fast) / 3


class SpinningPendulum(pendulum.SwingUp):
    """A pendulum that turns as fast as it can, either way round."""

    def get_reward(self, physics: Any) -> float:
        """:return: Reward of a control step, in [0, 1]"""
        return _linear(abs(float(physics.angular_velocity().item())), (9, np.inf), 4.5, 0.5)


def _linear(value: float, bounds: tuple[float, float], margin: float, value_at_margin: float) -> float:
    return float(tolerance(value, bounds, margin=margin, value_at_margin=value_at_margin, sigmoid="linear"))


def _height(physics: Any, body: str) -> float:
    return float(physics.named.data.xpos[body, "z"])


# --- models -----------------------------------------------------------------------------------------------------------


def longer_floor(model: Model, geom: str) -> Model:
    """
    :param model: A model of the suite: XML and assets
    :param geom: Name of its floor
    :return: The model with a floor of twice the length, to run on in both directions
    """
    root = ET.fromstring(model[0])
    floor = _find(root, "geom", geom)
    length, *rest = floor.attrib["size"].split()
    floor.set("size", " ".join([str(2 * float(length)), *rest]))
    return ET.tostring(root, encoding="unicode"), model[1]


def three_links(model: Model) -> Model:
    """
    :param model: The suite's two-link reacher: XML and assets
    :return: The same arena with an arm of three links, the finger at the end of the third
    """
    root = ET.fromstring(model[0])
    arm, hand, finger = (_find(root, "body", name) for name in ("arm", "hand", "finger"))
    arm.remove(hand)
    forearm = copy.deepcopy(hand)
    forearm.remove(_find(forearm, "body", "finger"))
    forearm.set("name", "forearm")
    _find(forearm, "geom", "hand").set("name", "forearm")
    _find(forearm, "joint", "wrist").set("name", "elbow")
    arm.append(forearm)
    forearm.append(hand)
    for link in (arm, forearm, hand):
        _find(link, "geom", link.attrib["name"]).set("fromto", f"0 0 0 {LINK_LENGTH} 0 0")
    for body in (forearm, hand, finger):
        body.set("pos", f"{LINK_LENGTH} 0 0")
    for joint in ("elbow", "wrist"):
        _find(root, "joint", joint).set("range", f"-{JOINT_LIMIT} {JOINT_LIMIT}")
    motors = root.find("actuator")
    assert motors is not None
    elbow = copy.deepcopy(_find(motors, "motor", "wrist"))
    elbow.attrib.update(name="elbow", joint="elbow")
    motors.insert(1, elbow)
    return ET.tostring(root, encoding="unicode"), model[1]


def _find(root: ET.Element, tag: str, name: str) -> ET.Element:
    found = root.find(f".//{tag}[@name='{name}']")
    if found is None:
        raise ValueError(
            f"This version of dm_control has no {tag} {name!r} in the model: take the one in constraints.txt."
        )
    return found


# --- environments -----------------------------------------------------------------------------------------------------


def _walker(speed: float) -> control.Environment:
    model = longer_floor(walker.get_model_and_assets(), "floor")
    physics = walker.Physics.from_xml_string(*model)
    return control.Environment(physics, BackwardsWalker(speed), time_limit=25, control_timestep=0.025)


def _cheetah(task: cheetah.Cheetah) -> control.Environment:
    model = longer_floor(cheetah.get_model_and_assets(), "ground")
    return control.Environment(cheetah.Physics.from_xml_string(*model), task, time_limit=10)


def _hopper() -> control.Environment:
    physics = hopper.Physics.from_xml_string(*hopper.get_model_and_assets())
    return control.Environment(physics, BackwardsHopper(), time_limit=20, control_timestep=0.02)


def _reacher(target_size: float) -> control.Environment:
    physics = reacher.Physics.from_xml_string(*three_links(reacher.get_model_and_assets()))
    return control.Environment(physics, reacher.Reacher(target_size=target_size), time_limit=20)


def _cup() -> control.Environment:
    physics = ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets())
    return control.Environment(physics, SpinningCup(), time_limit=20, control_timestep=0.02)


def _pendulum() -> control.Environment:
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return control.Environment(physics, SpinningPendulum(), time_limit=20)


# Domain and task, as in the suite: how the environment is made
TASKS: dict[tuple[str, str], Callable[[], control.Environment]] = {
    ("walker", "walk_backwards"): lambda: _walker(speed=1),
    ("walker", "run_backwards"): lambda: _walker(speed=8),
    ("cheetah", "run_backwards"): lambda: _cheetah(BackwardsCheetah()),
    ("cheetah", "run_front"): lambda: _cheetah(OneFootCheetah("bfoot")),
    ("cheetah", "run_back"): lambda: _cheetah(OneFootCheetah("ffoot")),
    ("cheetah", "jump"): lambda: _cheetah(JumpingCheetah()),
    ("hopper", "hop_backwards"): _hopper,
    ("reacher", "three_easy"): lambda: _reacher(target_size=0.05),
    ("reacher", "three_hard"): lambda: _reacher(target_size=0.015),
    ("ball_in_cup", "spin"): _cup,
    ("pendulum", "spin"): _pendulum,
}
