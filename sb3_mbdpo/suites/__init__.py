"""The paper's tasks as Gymnasium ids, ``mbdpo/<task>-v0``: importing this package registers them, and builds none."""

from sb3_mbdpo.suites.catalogue import TASK_SETS, suite_entry, task_set, task_set_names
from sb3_mbdpo.suites.registration import env_id, register_suites

register_suites()

__all__ = ["TASK_SETS", "env_id", "suite_entry", "task_set", "task_set_names"]
