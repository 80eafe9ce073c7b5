"""Training metrics, summed on the device and read only when they are logged."""

import torch as th

from sb3_mbdpo.ranks import Ranks


class RunningMeans:
    """
    Means of scalar tensors by name, without waiting for the device at each addition.

    >>> means = RunningMeans()
    >>> means.add({"train/reward_loss": th.tensor(1.0)})
    >>> means.add({"train/reward_loss": th.tensor(2.0)})
    >>> means.pop()
    {'train/reward_loss': 1.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, th.Tensor]) -> None:
        """
        :param values: Scalar tensors by name
        """
        known = [name for name in values if name in self._sums]
        if known:
            # One kernel for all of them
            sums = th._foreach_add([self._sums[name] for name in known], [values[name] for name in known])
            self._sums.update(zip(known, sums, strict=True))
        for name, value in values.items():
            self._sums.setdefault(name, value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def average(self, ranks: Ranks) -> None:
        """
        :param ranks: Processes over which sums are averaged; all have added the same names equally often
        """
        if ranks.size > 1 and self._sums:
            sums = ranks.mean(th.stack([value.reshape(()) for value in self._sums.values()]))
            self._sums = dict(zip(self._sums, sums, strict=True))

    def pop(self) -> dict[str, float]:
        """
        Read all means in one transfer and start anew.

        :return: Means by name since the last call
        """
        if not self._sums:
            return {}
        sums = th.stack([value.reshape(()) for value in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means
