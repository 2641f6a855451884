"""Which operations of an OpenVINO model belong to the backbone, and how the others are kept in float32.

Where the CPU can, OpenVINO computes in bfloat16 unless its caller objects; a file cannot object for a whole model. The
backbone bears it. The resize and the distances to the bank do not: a mark on each operation keeps them in float32.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from anomalib_cfa.resize import ExportableResize

# The legacy key of ov::DisableFP16Compression, the only one that Python can set. It is saved, under its new name.
_KEEP_FLOAT32 = "precise_0"
_PILLOW_MODES = {InterpolationMode.BILINEAR: "bilinear_pillow", InterpolationMode.BICUBIC: "bicubic_pillow"}


def module_names(onnx_path: Path) -> dict[str, str]:
    """Find the module that each node of an exported ONNX file comes from.

    Args:
        onnx_path: A file that :func:`torch.onnx.export` wrote.

    Returns:
        The module's dotted path (``model.descriptor``) by the node's name, for those nodes for which it is known.
    """
    import onnx  # noqa: PLC0415 - optional

    names = {}
    for node in onnx.load(str(onnx_path), load_external_data=False).graph.node:
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        # From the whole model to the operation itself: ['', 'model', 'model.descriptor', 'conv2d'].
        scopes = ast.literal_eval(metadata.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(scopes) > 1:
            names[node.name] = scopes[-2]
    return names


def outside_of(module: str, model: Any, names: Mapping[str, str]) -> list[Any]:  # noqa: ANN401 - OpenVINO is optional
    """Operations of an OpenVINO model that do not come from a module.

    Args:
        module: The module's dotted path.
        model: The OpenVINO model.
        names: :func:`module_names` of the ONNX file that it was converted from.

    Returns:
        The operations in the order in which they run, without inputs, outputs and constants. One that OpenVINO or NNCF
        added is taken to belong to what it follows.
    """
    inside: set[str] = set()
    outside = []
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        # What replaces a node, or is put before it, is often named after it: "node_Conv_1/fq_input_0".
        if (source := names.get(name.partition("/")[0])) is not None:
            belongs = f"{source}.".startswith(f"{module}.")
        else:
            belongs = any(value.get_node().get_friendly_name() in inside for value in operation.input_values())
        if belongs:
            inside.add(name)
        elif operation.get_type_name() not in {"Parameter", "Result", "Constant"}:
            outside.append(operation)
    return outside


def keep_float32(operations: list[Any]) -> None:
    """Have operations, and the constants that they read, computed and saved in float32 whatever the precision.

    It holds once the model is saved and read again, and for those operations only that OpenVINO does not replace by
    others: see the exported forms in :mod:`anomalib_cfa.exported_head`.

    Args:
        operations: Operations of an OpenVINO model, marked in place.
    """
    for operation in operations:
        constants = [value.get_node() for value in operation.input_values()]
        for marked in (operation, *(node for node in constants if node.get_type_name() == "Constant")):
            marked.get_rt_info()[_KEEP_FLOAT32] = ""


def use_native_resize(model: Any, transform: nn.Module | None) -> None:  # noqa: ANN401 - OpenVINO is optional
    """Put OpenVINO's own anti-aliased resize, that of Pillow and torch, in place of the first resize's matrix products.

    ONNX cannot express it, and the division in the products' weights cannot be kept in float32. Where the model does
    not begin with an anti-aliased resize to a fixed size it stays as it is.

    Args:
        model: The OpenVINO model, changed in place.
        transform: The exported transform.
    """
    from openvino import opset11  # noqa: PLC0415 - optional

    first = transform
    while isinstance(first, v2.Compose) and first.transforms:
        first = first.transforms[0]
    if not isinstance(first, ExportableResize) or first.size is None or len(first.size) == 1:
        return
    if not first.antialias or first.mode not in _PILLOW_MODES:
        return
    image = model.inputs[0].node.output(0)
    output = image
    for _ in range(2):  # rows, then columns
        products = [target.get_node() for target in output.get_target_inputs()]
        products = [node for node in products if node.get_type_name() == "MatMul"]
        if len(products) != 1:
            return
        output = products[0].output(0)
    resized = opset11.interpolate(
        image=image,
        scales_or_sizes=np.array(first.size, dtype=np.int32),
        mode=_PILLOW_MODES[first.mode],
        shape_calculation_mode="sizes",
        axes=np.array([2, 3], dtype=np.int32),
        pads_begin=[0],
        pads_end=[0],
        cube_coeff=-0.5,
        name="resize",
    )
    for target in list(output.get_target_inputs()):
        target.replace_source_output(resized.output(0))
    model.validate_nodes_and_infer_types()
