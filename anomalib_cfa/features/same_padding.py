"""TensorFlow's "same" padding in a form that exports with dynamic image sizes."""

from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class ExportableConv2dSame(Conv2dSame):
    """timm's ``Conv2dSame`` for stride 2 and odd kernels from 3 x 3, its output size written as (size + 1) // 2.

    Both compute the same. But timm's formula for the padding names the input's size many times, and so the symbolic
    size of an exported graph grows exponentially with the number of such layers: EfficientNet-B5 takes ten times as
    long to export. In the sum of this formula's terms the input's size cancels.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve maps (B, C, h, w) into maps (B, C', (h + 1) // 2, (w + 1) // 2)."""
        (kernel_height, kernel_width), (height, width) = self.kernel_size, images.shape[-2:]
        top = (kernel_height - 2) // 2 + 2 * ((height + 1) // 2) - height
        left = (kernel_width - 2) // 2 + 2 * ((width + 1) // 2) - width
        padded = F.pad(images, (left, (kernel_width - 1) // 2, top, (kernel_height - 1) // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def replace_same_padding(network: nn.Module) -> nn.Module:
    """Give the network's "same" convolutions the exportable form, where there is one; they keep their weights."""
    for module in network.modules():
        if type(module) is not Conv2dSame or module.stride != (2, 2) or module.dilation != (1, 1):
            continue
        if all(size % 2 and size >= 3 for size in module.kernel_size):
            module.__class__ = ExportableConv2dSame
    return network
