"""Names of the tasks in the authors' multi-task data, in the order of their indices, and sizes of the paper's tasks."""

# DMControl, 30 tasks: the suite's own and eleven more
MT30 = (
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "reacher-easy",
    "reacher-hard",
    "acrobot-swingup",
    "pendulum-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "hopper-stand",
    "hopper-hop",
    "walker-walk-backwards",
    "walker-run-backwards",
    "cheetah-run-backwards",
    "cheetah-run-front",
    "cheetah-run-back",
    "cheetah-jump",
    "hopper-hop-backwards",
    "reacher-three-easy",
    "reacher-three-hard",
    "cup-spin",
    "pendulum-spin",
)

# Meta-World, 50 tasks
META_WORLD = (
    "mw-assembly",
    "mw-basketball",
    "mw-button-press-topdown",
    "mw-button-press-topdown-wall",
    "mw-button-press",
    "mw-button-press-wall",
    "mw-coffee-button",
    "mw-coffee-pull",
    "mw-coffee-push",
    "mw-dial-turn",
    "mw-disassemble",
    "mw-door-open",
    "mw-door-close",
    "mw-drawer-close",
    "mw-drawer-open",
    "mw-faucet-open",
    "mw-faucet-close",
    "mw-hammer",
    "mw-handle-press-side",
    "mw-handle-press",
    "mw-handle-pull-side",
    "mw-handle-pull",
    "mw-lever-pull",
    "mw-peg-insert-side",
    "mw-peg-unplug-side",
    "mw-pick-out-of-hole",
    "mw-pick-place",
    "mw-pick-place-wall",
    "mw-plate-slide",
    "mw-plate-slide-side",
    "mw-plate-slide-back",
    "mw-plate-slide-back-side",
    "mw-push-back",
    "mw-push",
    "mw-push-wall",
    "mw-reach",
    "mw-reach-wall",
    "mw-shelf-place",
    "mw-soccer",
    "mw-stick-push",
    "mw-stick-pull",
    "mw-sweep-into",
    "mw-sweep",
    "mw-window-open",
    "mw-window-close",
    "mw-bin-picking",
    "mw-box-close",
    "mw-door-lock",
    "mw-door-unlock",
    "mw-hand-insert",
)

MT80 = MT30 + META_WORLD

# Observation entries and actions, by the beginning of a name: the longest that is here counts
SIZES = {
    "walker": (24, 6),
    "cheetah": (17, 6),
    "reacher": (6, 2),
    "reacher-three": (8, 3),
    "acrobot": (6, 1),
    "pendulum": (3, 1),
    "cartpole": (5, 1),
    "cup": (8, 2),
    "finger": (9, 2),
    "finger-turn": (12, 2),
    "fish": (24, 5),
    "hopper": (15, 4),
    "quadruped": (78, 12),
    "humanoid": (67, 21),
    "dog": (223, 38),
    "mw": (39, 4),
    "myo-reach": (115, 39),
    "myo-pose": (108, 39),
    "myo-obj-hold": (91, 39),
    "myo-key-turn": (93, 39),
    "myo-pen-twirl": (83, 39),
}


def sizes_by_name(task: str) -> tuple[int, int] | None:
    """
    :param task: The paper's name of a task
    :return: Its observation entries and actions; None where they are not known

    >>> sizes_by_name("finger-turn-easy"), sizes_by_name("myo-obj-hold-hard"), sizes_by_name("pick-cube")
    ((12, 2), (91, 39), None)
    """
    parts = task.split("-")
    beginnings = ("-".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((SIZES[beginning] for beginning in beginnings if beginning in SIZES), None)


def sizes_of(task: str) -> tuple[int, int] | None:
    """
    :param task: Name of a task
    :return: Its observation entries and actions before they were padded, None for a name that is not of mt80

    >>> sizes_of("finger-turn-easy"), sizes_of("finger-spin"), sizes_of("mw-push")
    ((12, 2), (9, 2), (39, 4))
    """
    return sizes_by_name(task) if task in MT80 else None
