"""Programs that measure: how fast the algorithms learn and how long they take. Nothing here asserts a time."""
