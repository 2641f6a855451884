"""One resize in training, testing and every export.

Anomalib exports another resize than it tests with: it turns anti-aliasing off, since OpenVINO silently ignores that of
ONNX. Here the exported graph resizes by two matrix products, which every runtime has.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode, v2

# Kernels take integer offsets and how many of their unit make one (widened) pixel; they need not sum to 1.
_Kernel = Callable[[Tensor, int | torch.SymInt], Tensor]


def _triangle(offsets: Tensor, width: int | torch.SymInt) -> Tensor:
    return (-offsets + width).clamp(min=0)


def _cubic(offsets: Tensor, width: int | torch.SymInt) -> Tensor:
    # Keys' kernel with a = -0.5, as torch and Pillow use it when they anti-alias, times width^3.
    x = offsets.float()
    one = width * torch.ones_like(x[..., :1, :1])  # as an integer its cube overflows in OpenVINO, which has 32 bits
    inner = (1.5 * x - 2.5 * one) * x * x + one * one * one
    outer = ((-0.5 * x + 2.5 * one) * x - 4 * one * one) * x + 2 * one * one * one
    return torch.where(offsets < width, inner, torch.where(offsets < 2 * width, outer, 0.0))


# Without anti-aliasing torch repeats the border for its bicubic kernel, where these weights are normalized instead.
_KERNELS: dict[tuple[InterpolationMode, bool], _Kernel] = {
    (InterpolationMode.BILINEAR, True): _triangle,
    (InterpolationMode.BILINEAR, False): _triangle,
    (InterpolationMode.BICUBIC, True): _cubic,
}

_INTERPOLATE = inspect.signature(F.interpolate)
_CACHED = 16  # matrices; an image and its central view need four to eight


def cache_by_size(weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache what a function of sizes gives for those it saw last: it costs more than the product that it is for.

    The function gives a matrix on the CPU, in float32. Cached, it takes one more argument, ``like``: a tensor with the
    data type and device to give the matrix in.
    """

    @lru_cache(maxsize=_CACHED)
    def cached(dtype: torch.dtype, device: torch.device, *arguments: float) -> Tensor:
        # Whoever asks first may be in a mode that those who ask later are not.
        with torch.device("cpu"), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            return weights(*arguments).to(device, dtype)

    @wraps(weights)
    def weights_like(*arguments: float, like: Tensor) -> Tensor:
        # A graph computes or folds them itself: there sizes may be symbols, and tensors stand-ins without values.
        if torch.compiler.is_compiling() or type(like) not in {Tensor, nn.Parameter}:
            return weights(*arguments).to(like)
        return cached(like.dtype, like.device, *arguments)

    return weights_like


def resize_weights(
    size: int,
    new_size: int,
    kernel: _Kernel = _triangle,
    antialias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    leading: int = 0,
) -> Tensor:
    """Weights that resize one axis as :func:`torch.nn.functional.interpolate` does with ``align_corners=False``.

    Args:
        size: Pixels along the axis; may be symbolic, as ``new_size``.
        new_size: Pixels wanted.
        kernel: The interpolation kernel.
        antialias: Whether the kernel widens where the axis shrinks.
        dtype: Data type of the weights.
        device: Device of the weights.
        leading: How many dimensions of size one to put in front: put in later, they cost float32 in OpenVINO.

    Returns:
        Weights of shape (..., new_size, size); each row sums to 1. The identity where the sizes agree.

    Example:
        >>> resize_weights(4, 2)
        tensor([[0.4286, 0.4286, 0.1429, 0.0000],
                [0.0000, 0.1429, 0.4286, 0.4286]])
    """
    # In units of 1 / (2 * new_size) of a pixel all centres are integers. As floating point numbers they would be off by
    # whole pixels where OpenVINO computes in bfloat16.
    pixels = (2 * torch.arange(size, device=device) + 1).reshape(*[1] * leading, 1, -1)
    new_pixels = (2 * torch.arange(new_size, device=device) + 1).reshape(*[1] * leading, -1, 1)
    offsets = (pixels * new_size - new_pixels * size).abs()
    width = 2 * (torch.sym_max(size, new_size) if antialias else new_size)
    weights = kernel(offsets, width).to(torch.promote_types(dtype, torch.float32))
    total = weights.sum(dim=-1, keepdim=True)
    if not torch.compiler.is_exporting():
        return (weights / total).to(dtype)
    # OpenVINO has no division: it has powers of -1, computed in bfloat16. A step of Newton's takes the rounding
    # of the logarithm away.
    inverse = (-total.log()).exp()
    return (weights * (inverse * (2 - total * inverse))).to(dtype)


def _resize_by_products(image: Tensor, size: Sequence[int], kernel: _Kernel, antialias: bool) -> Tensor:
    rows, columns = (
        resize_weights(side, new_side, kernel, antialias, image.dtype, image.device, leading=image.ndim - 2)
        for side, new_side in zip(image.shape[-2:], size, strict=True)
    )
    # The rows last: OpenVINO fails on a product with a constant from the right where what follows is by channels.
    return rows @ (image @ columns.mT)


class ExportableInterpolation(TorchFunctionMode):
    """While it is entered, anti-aliased resizes inside of a network are matrix products, which export as they run.

    Transformers bring their position embedding to the image's size with one.

    Example:
        >>> with ExportableInterpolation():
        ...     F.interpolate(torch.rand(1, 3, 16, 16), (7, 7), mode="bicubic", antialias=True).shape
        torch.Size([1, 3, 7, 7])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stand in for one call."""
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("antialias"):
            bound = _INTERPOLATE.bind(*args, **kwargs).arguments
            mode, size = bound.get("mode"), bound.get("size")
            modes = {known.value: kernel for (known, antialias), kernel in _KERNELS.items() if antialias}
            if mode in modes and isinstance(size, Sequence) and not bound.get("align_corners"):
                return _resize_by_products(bound["input"], size, modes[mode], antialias=True)
        return func(*args, **kwargs)


class ExportableResize(v2.Resize):  # type: ignore[misc] # torchvision is not typed
    """A ``Resize`` that resizes in an exported graph as it does in PyTorch, anti-aliasing included.

    In PyTorch it is its base class. In a graph exported by :mod:`torch.export`, and so in ONNX and OpenVINO, floating
    point images are multiplied from both sides by :func:`resize_weights`, which the graph computes from the image's
    height and width. The two agree to the rounding of torch's own float32 weights: 1e-6 of the range where the new size
    is a power of two, else 2e-5 at worst. What has no such weights, the nearest modes and bicubic without
    anti-aliasing, is exported as PyTorch exports it. The arguments are those of torchvision's ``Resize``.

    Example:
        >>> ExportableResize((64, 64))(torch.rand(2, 3, 300, 200)).shape
        torch.Size([2, 3, 64, 64])
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input: the method that torchvision's transforms override."""
        antialias = bool(self.antialias)
        kernel = _KERNELS.get((self.mode, antialias))
        if not torch.compiler.is_exporting() or kernel is None or not inpt.is_floating_point():
            return super().transform(inpt, params)
        height, width = inpt.shape[-2:]
        new_height, new_width = self.output_size(height, width)
        if isinstance(height, int) and isinstance(width, int) and (height, width) == (new_height, new_width):
            return inpt
        return _resize_by_products(inpt, (new_height, new_width), kernel, antialias)

    @property
    def mode(self) -> InterpolationMode:
        """The interpolation, given by name or by number."""
        if isinstance(self.interpolation, int):  # Pillow's constant
            return InterpolationMode(Resampling(self.interpolation).name.lower())
        return InterpolationMode(self.interpolation)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, as torchvision has them, also for symbolic ones.

        Torchvision asks which side is longer, and the answer would be fixed in the exported graph.
        """
        if self.size is not None and len(self.size) > 1:
            return self.size[0], self.size[1]
        if self.size is None:
            longer = torch.sym_max(height, width)
            return self.max_size * height // longer, self.max_size * width // longer
        shorter = torch.sym_min(height, width)
        height, width = self.size[0] * height // shorter, self.size[0] * width // shorter
        if self.max_size is None:
            return height, width
        longer = torch.sym_max(height, width)
        return tuple(torch.sym_min(side, self.max_size * side // longer) for side in (height, width))
