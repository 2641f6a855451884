"""A random sample of all images' patches that stays small however many images there are."""

import torch
from torch import Tensor

from anomalib_cfa.processes import Processes

_MOST_BYTES = 512 * 2**20


class PatchSample:
    """Holds at most ``capacity`` patch descriptors, of all images alike, and where each came from.

    Whenever the sample is full, a random half of it is dropped, and half as many patches of each further image are
    taken in, so that all images count alike. Capacity and memory, at most 512 MiB, are those of all processes together.
    """

    def __init__(self, capacity: int, seed: int, processes: Processes) -> None:
        self.capacity = capacity
        self.processes = processes
        self.share = 1.0
        self._images = 0
        self._held = 0  # patches: the first rows of these
        self._points = torch.empty(0, 0)
        self._sources = torch.empty(0, 3, dtype=torch.int32)
        self._generator = torch.Generator().manual_seed(seed + processes.rank)

    @property
    def device(self) -> torch.device:
        """Where the patches are held."""
        return self._points.device

    def update(self, descriptors: Tensor) -> None:
        """Take in the patch descriptors of some images, of shape (B, h, w, D)."""
        _, height, width, channels = descriptors.shape
        most = min(self.capacity, _MOST_BYTES // (4 * channels))
        most = max(most // self.processes.count, 1)
        if not self._images:  # with room for the image that overfills it
            self._points = descriptors.new_empty(most + height * width, channels, dtype=torch.float32)
            self._sources = self._sources.new_empty(len(self._points), 3, device=descriptors.device)
        for image in descriptors.detach().float():
            chosen = self._choose(height * width, max(1, int(self.share * height * width)))
            number = self.processes.rank + self._images * self.processes.count
            places = torch.stack([torch.full_like(chosen, number), chosen // width, chosen % width], dim=1)
            new = slice(self._held, self._held + len(chosen))
            torch.index_select(image.flatten(0, 1), 0, chosen.to(image.device), out=self._points[new])
            self._sources[new] = places.to(self._sources)
            self._images += 1
            self._held += len(chosen)
            while self._held > most:
                kept = self._choose(self._held, self._held // 2).to(image.device)
                self._held = len(kept)
                for rows in (self._points, self._sources):
                    rows[: self._held] = rows[kept]
                self.share /= 2

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The samples of all processes, of shape (P, D), and their images, rows and columns, of shape (P, 3)."""
        points, sources = self._points[: self._held], self._sources[: self._held]
        if self.processes.count == 1:
            return points, sources
        counts = torch.zeros(self.processes.count, dtype=torch.int64, device=points.device)
        counts[self.processes.rank] = len(points)
        sizes = self.processes.sum(counts).tolist()
        start = sum(sizes[: self.processes.rank])
        gathered = []
        for own in (points, sources):
            everyone = own.new_zeros(sum(sizes), own.shape[1])
            everyone[start : start + len(own)] = own
            gathered.append(self.processes.sum(everyone))
        return gathered[0], gathered[1]

    def _choose(self, of: int, count: int) -> Tensor:
        return torch.randperm(of, generator=self._generator)[:count]
