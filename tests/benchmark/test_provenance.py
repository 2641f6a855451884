"""The conditions of a measurement."""

import torch

from anomalib_cfa.benchmark.provenance import peak_memory


def test_cuda_is_started_before_its_peak_is_reset(monkeypatch):
    calls = []
    for name in ("init", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, name=name: calls.append((name, *arguments)))
    with peak_memory("cuda", 1):
        calls.append("measured")
    assert calls == [("init",), ("reset_peak_memory_stats", 1), "measured", ("max_memory_allocated", 1)]
