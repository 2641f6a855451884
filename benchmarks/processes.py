"""What several processes or machines say to each other, in bytes, and how long gloo takes over it on the loopback.

``python benchmarks/processes.py`` prints the table in CONTRIBUTING.md.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import multiprocessing

_POINTS_PER_CENTER = 32  # of K-means' sample, as in `bank_building.py`
_REPEATS = 5


@dataclass(frozen=True)
class Model:
    """What the sizes depend on: C channels of all layers, D of a patch descriptor, T patches, N centres."""

    name: str
    channels: int
    width: int
    patches: int
    centers: int

    def messages(self) -> dict[str, int]:
        """Bytes of each message."""
        return {
            "gradients, each step": 4 * (self.width * (self.channels + 2) + self.width + 1),
            "calibration, each epoch": 8 * 3 * self.centers,
            "whitened start, once": 8 * (self.channels**2 + self.channels),
            "bank by K-means, once": 4 * self.width * self.centers * (_POINTS_PER_CENTER + 1),
            "bank of means, once": 8 * self.width * self.patches,
        }


MODELS = [
    Model("resnet18", channels=384, width=384, patches=1024, centers=1024),
    Model("wide_resnet50_2", channels=1536, width=1536, patches=1024, centers=1024),
]


def _measure(rank: int, processes: int, meeting: str, sizes: list[int], seconds: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    for place, size in enumerate(sizes):
        tensor = torch.zeros(max(1, size // 4))
        times = []
        for _ in range(_REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - begin)
        if rank == 0:
            seconds[place] = min(times)
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    processes = parser.parse_args().processes
    messages = [(model.name, what, size) for model in MODELS for what, size in model.messages().items()]
    seconds = torch.zeros(len(messages)).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [size for _, _, size in messages]
        arguments = processes, f"{folder}/meeting", sizes, seconds
        multiprocessing.spawn(_measure, arguments, nprocs=processes)
    print("| model | message | MB | ms |\n|---|---|---|---|")
    for (name, what, size), taken in zip(messages, seconds.tolist(), strict=True):
        print(f"| {name} | {what} | {size / 1e6:.2f} | {1000 * taken:.1f} |")


if __name__ == "__main__":
    main()
