"""The paper's tasks as Gymnasium ids, ``mbdpo/<task>-v0``: importing this package registers them, and builds none."""

from sb3_mbdpo.suites.registration import register_suites

register_suites()
