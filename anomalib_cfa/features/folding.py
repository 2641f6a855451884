"""Batch norms of a frozen network, folded into the convolutions before them."""

import copy
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anomalib_cfa.features.same_padding import ExportableConv2dSame

_CONVOLUTIONS = (nn.Conv2d, ExportableConv2dSame)  # these alone: subclasses may change their weights as they run
_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


@torch.inference_mode(mode=False)
@torch.no_grad()
def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A network that computes the same, up to rounding, with fewer steps.

    A batch norm in evaluation mode is a scale and a shift of each channel, which a convolution can take over. On a CPU
    batch norms take about a tenth of a ResNet's time, and a third of an EfficientNet's.

    Args:
        network: In evaluation mode. It stays as it is.

    Returns:
        A copy whose convolutions have taken over each batch norm that reads nothing but their output, where nothing
        else reads it; the network itself if there is none, or if it cannot be traced.
    """
    pairs = _pairs(network)
    if not pairs:
        return network
    folded = copy.deepcopy(network)
    for convolution_name, norm_name in pairs:
        convolution: Any = folded.get_submodule(convolution_name)
        norm: Any = folded.get_submodule(norm_name)
        dtype = convolution.weight.dtype
        folded.set_submodule(convolution_name, fuse_conv_bn_eval(convolution.float(), norm.float()).to(dtype))
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest)
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _CONVOLUTIONS + _BATCH_NORMS) or super().is_leaf_module(m, module_qualified_name)


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions, and of the batch norms that alone read them."""
    modules = dict(network.named_modules())
    if not any(type(module) in _BATCH_NORMS for module in modules.values()):
        return []
    try:
        nodes = list(_Tracer().trace(network).nodes)
    except Exception:  # noqa: BLE001 - whatever a network does that tracing does not follow; it runs as it is then
        return []
    pairs = []
    for node in nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) not in _BATCH_NORMS:
            continue
        source = node.args[0]
        if source.op == "call_module" and type(modules[source.target]) in _CONVOLUTIONS and len(source.users) == 1:
            pairs.append((source.target, str(node.target)))
    return pairs
