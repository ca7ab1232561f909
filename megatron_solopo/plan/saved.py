"""What autograd keeps alive, counted as it happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedMeter:
    """Bytes of the storages that tensors saved for backward keep alive: now, and at most so far.

    A storage that several tensors share counts once, parameters' do not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: dict[int, int] = {}
        self.now = self.most = 0

    @contextmanager
    def counting(self) -> Iterator["SavedMeter"]:
        """Count what is saved in the body, until its last use."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield self

    def _keep(self, tensor: Tensor) -> "_Kept":
        return _Kept(tensor, self)

    def add(self, tensor: Tensor) -> None:
        """One more holder of a tensor's storage."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)

    def remove(self, tensor: Tensor) -> None:
        """One holder less."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """A saved tensor; autograd drops it when its graph is done."""

    def __init__(self, tensor: Tensor, meter: SavedMeter) -> None:
        self.tensor, self.meter = tensor, meter
        meter.add(tensor)

    def __del__(self) -> None:
        self.meter.remove(self.tensor)
