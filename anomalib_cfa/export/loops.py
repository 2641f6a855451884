"""Loops around an OpenVINO model, so that its memory depends neither on the batch nor on the sizes of images seen.

OpenVINO was seen to keep every tensor of an unknown size for the whole run, and for each new shape of a matrix product
up to a mebibyte for ever.
"""

from collections.abc import Sequence

import numpy as np
import openvino
from openvino import opset13
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from anomalib_cfa.export.openvino import Node, keep_float32, operations
from anomalib_cfa.resize import ExportableResize

_STRIP = 64  # rows that are resized at a time; images are padded to multiples of it


def leading_resize(pre_processor: nn.Module | None) -> tuple[int, int] | None:
    """Height and width to which an exportable pre-processor brings an image before anything else.

    None if it does not begin with an anti-aliased bilinear resize to a fixed size.
    """
    first = getattr(pre_processor, "export_transform", None)
    while isinstance(first, v2.Compose):
        first = first.transforms[0]
    if not isinstance(first, ExportableResize) or first.size is None or len(first.size) != 2:
        return None
    if first.mode != InterpolationMode.BILINEAR or not first.antialias:
        return None
    height, width = first.size
    return height, width


def one_image_at_a_time(model: openvino.Model) -> openvino.Model:
    """Run a batch as a loop over its images, whose body becomes ``model``.

    Within the loop the number of images is known to be one, and with it every size behind a resize: memory is used
    again. The model has one input; its outputs all have the batch as their first dimension.
    """
    [inner] = model.get_parameters()
    images = opset13.parameter(inner.get_partial_shape(), inner.get_element_type(), name=inner.get_friendly_name())
    images.output(0).set_names(inner.output(0).get_names())
    _reshape_to_one(model)
    return _over_images(model, images, [(inner, images)])


def one_image_of_any_size_at_a_time(model: openvino.Model) -> openvino.Model:
    """The same of a model that takes images (N, 3, h, w) of one known size, with a resize in front of it.

    The resize adds up strips of the image, padded with zeros, so that a product's shape depends on the image's width
    alone, and on that by steps.
    """
    [inner] = model.get_parameters()
    _reshape_to_one(model)
    _, channels, *new_size = inner.get_shape()
    images = opset13.parameter([-1, channels, -1, -1], np.float32, name=inner.get_friendly_name())
    images.output(0).set_names(inner.output(0).get_names())

    shape = opset13.shape_of(images, "i32")
    sizes = [opset13.gather(shape, np.int32(axis), np.int32(0)) for axis in (2, 3)]
    strip = np.int32(_STRIP)
    padding = [opset13.mod(opset13.subtract(strip, opset13.mod(size, strip)), strip) for size in sizes]
    after = opset13.concat([np.zeros(2, np.int32), *(opset13.unsqueeze(pad, np.int32(0)) for pad in padding)], 0)
    padded = opset13.pad(images, np.zeros(4, np.int32), after, "constant", np.float32(0))
    rows, columns = (
        _axis_weights(size, opset13.add(size, pad), int(new))
        for size, pad, new in zip(sizes, padding, new_size, strict=True)
    )
    outside = openvino.Model([opset13.result(part) for part in (padded, rows, columns)], [images])
    keep_float32(operations(outside))

    image = opset13.parameter([1, channels, -1, -1], np.float32)
    of_rows, of_columns = (opset13.parameter([1, 1, new, -1], np.float32) for new in new_size)
    resized = _resize_in_strips(image, of_rows, of_columns, [1, channels, *new_size])
    for target in inner.output(0).get_target_inputs():
        target.replace_source_output(resized)
    body = openvino.Model(model.get_results(), [image, of_rows, of_columns])
    return _over_images(body, images, [(image, padded), (of_rows, rows), (of_columns, columns)])


def _reshape_to_one(model: openvino.Model) -> None:
    [inner] = model.get_parameters()
    shape = inner.get_partial_shape()
    shape[0] = openvino.Dimension(1)
    model.reshape(shape)


def _over_images(body: openvino.Model, images: Node, inputs: Sequence[tuple[Node, Node]]) -> openvino.Model:
    """A loop over the first of the inputs, pairs of the body's parameter and what it reads; others stay the same."""
    names = [output.get_names() for output in body.outputs]
    loop = opset13.tensor_iterator()
    loop.set_body(body)
    slices = {"start": 0, "stride": 1, "part_size": 1, "end": -1, "axis": 0}
    (sliced, batch), *invariant = inputs
    loop.set_sliced_input(sliced, batch.output(0), *slices.values())
    for parameter, value in invariant:
        loop.set_invariant_input(parameter, value.output(0))
    outputs = [loop.get_concatenated_slices(result.output(0), *slices.values()) for result in body.get_results()]
    for output, known in zip(outputs, names, strict=True):
        output.set_names(known)
    return openvino.Model([opset13.result(output) for output in outputs], [images])


def _resize_in_strips(image: Node, rows: Node, columns: Node, shape: list[int]) -> Node:
    """Resize an image to a shape by the sum of its strips' products with their part of the weights."""
    _, channels, height, width = shape
    strip = opset13.parameter([1, channels, _STRIP, -1], np.float32)
    of_rows = opset13.parameter([1, 1, height, _STRIP], np.float32)
    of_columns = opset13.parameter([1, 1, width, -1], np.float32)
    so_far = opset13.parameter(shape, np.float32)
    narrow = opset13.matmul(strip, of_columns, transpose_a=False, transpose_b=True)
    product = opset13.matmul(of_rows, narrow, transpose_a=False, transpose_b=False)
    added = opset13.result(opset13.add(so_far, product))
    goes_on = opset13.result(opset13.constant(np.array([True])))
    body = openvino.Model([goes_on, added], [strip, of_rows, of_columns, so_far])
    keep_float32(operations(body))

    # A tensor iterator would not do: none may be inside of another one.
    strips = opset13.divide(opset13.gather(opset13.shape_of(image, "i32"), np.int32(2), np.int32(0)), np.int32(_STRIP))
    loop = opset13.loop(strips, opset13.constant(np.array(True)))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 0])
    for parameter, whole, axis in ((strip, image, 2), (of_rows, rows, 3)):
        loop.set_sliced_input(parameter, whole.output(0), 0, _STRIP, _STRIP, -1, axis)
    loop.set_invariant_input(of_columns, columns.output(0))
    loop.set_merged_input(so_far, opset13.constant(np.zeros(shape, np.float32)).output(0), added.output(0))
    return loop.get_iter_value(added.output(0), -1)


def _axis_weights(size: Node, padded: Node, new_size: int) -> Node:
    """The weights of :func:`anomalib_cfa.resize.resize_weights` as a part of a graph, zero for what pads the pixels.

    Of shape (1, 1, new_size, padded): factors of other ranks would cost a product its float32.
    """
    zero, one, two = map(np.int32, (0, 1, 2))
    pixel = opset13.add(opset13.multiply(opset13.range(zero, padded, one, "i32"), two), one)
    new_pixel = 2 * np.arange(new_size, dtype=np.int32)[None, None, :, None] + 1
    offsets = opset13.abs(
        opset13.subtract(opset13.multiply(pixel, np.int32(new_size)), opset13.multiply(new_pixel, size))
    )
    width = opset13.multiply(opset13.maximum(size, np.int32(new_size)), two)
    weights = opset13.convert(opset13.maximum(opset13.subtract(width, offsets), zero), "f32")
    weights = opset13.multiply(weights, opset13.convert(opset13.less(pixel, opset13.multiply(size, two)), "f32"))
    total = opset13.reduce_sum(weights, np.int32(3), keep_dims=True)
    # As there, since OpenVINO has no division in float32.
    inverse = opset13.exp(opset13.negative(opset13.log(total)))
    step = opset13.subtract(np.float32(2), opset13.multiply(total, inverse))
    return opset13.multiply(weights, opset13.multiply(inverse, step))
