"""What is done to an OpenVINO model so that it computes what was tested, in memory that is used again.

Where the CPU can, OpenVINO computes in bfloat16 unless its caller objects, and a file cannot object for a whole model.
Measured on the magnetic tiles, that flips the label of one image in a hundred, even if the backbone alone does it; so a
mark on each operation keeps it in float32, but for the backbone's where the export was asked for less.

OpenVINO replaces some operations by others once a file is read, and those have no mark. So what is around the backbone
is written in forms that it keeps; nothing else asks for these forms:

=================================== ==================================================================
replaced                            written as
=================================== ==================================================================
``a - b``                           ``a + minus_b``, of a table that is stored negated
``x[..., 0]``, ``x.squeeze()``      ``x.flatten()``, or a sum with ``keepdim``
``table[indices]``                  ``F.embedding(indices, table)``
``x.expand()``, ``x.unsqueeze()``   a product with ones; dimensions of size one are there from the start
``a / b``                           exponential of a logarithm, and a step of Newton's
weights worked out in the graph     worked out before the export (``PatchDescriptor.exportable``)
=================================== ==================================================================
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import onnx
from openvino import Model, opset1

Node: TypeAlias = Any
"""An operation of an OpenVINO model; what kind of one is known when it runs only."""

# The legacy key of ov::DisableFP16Compression, the only one that Python can set. It is saved, under its new name.
_KEEP_FLOAT32 = "precise_0"
_NO_OPERATIONS = ("Parameter", "Result", "Constant")


def module_names(onnx_path: Path) -> dict[str, str]:
    """The module (``model.descriptor``) that each node of an exported ONNX file comes from, where it is known."""
    names = {}
    for node in onnx.load(str(onnx_path), load_external_data=False).graph.node:
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        # From the whole model to the operation itself: ['', 'model', 'model.descriptor', 'conv2d'].
        scopes = ast.literal_eval(metadata.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(scopes) > 1:
            names[node.name] = scopes[-2]
    return names


def outside_of(module: str, model: Model, names: Mapping[str, str]) -> list[Node]:
    """Operations of an OpenVINO model that do not come from a module, given by its dotted path.

    ``names`` are the :func:`module_names` of the ONNX file that it was converted from. An operation that OpenVINO or
    NNCF added is taken to belong to what it follows.
    """
    inside: set[str] = set()
    outside = []
    for operation in operations(model):
        name = operation.get_friendly_name()
        # What replaces a node, or is put before it, is often named after it: "node_Conv_1/fq_input_0".
        if (source := names.get(name.partition("/")[0])) is not None:
            belongs = f"{source}.".startswith(f"{module}.")
        else:
            belongs = any(value.get_node().get_friendly_name() in inside for value in operation.input_values())
        if belongs:
            inside.add(name)
        else:
            outside.append(operation)
    return outside


def operations(model: Model) -> list[Node]:
    """All operations of an OpenVINO model in the order in which they run, without inputs, outputs and constants."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() not in _NO_OPERATIONS]


def use_single_output_max_pools(model: Model) -> None:
    """Replace max pools that also tell where the maxima lie: OpenVINO would do so later, and lose their marks."""
    for pool in operations(model):
        if pool.get_type_name() != "MaxPool" or pool.get_output_size() == 1 or pool.output(1).get_target_inputs():
            continue
        attributes = pool.get_attributes()
        if set(attributes["dilations"]) != {1}:
            continue
        names = ("strides", "pads_begin", "pads_end", "kernel", "rounding_type", "auto_pad")
        plain = opset1.max_pool(pool.input_value(0), *map(attributes.get, names), name=pool.get_friendly_name())
        for target in pool.output(0).get_target_inputs():
            target.replace_source_output(plain.output(0))


def keep_float32(marked: list[Node]) -> None:
    """Have operations computed in float32 whatever the precision, and the constants that they read saved so.

    It holds once the model is saved and read again, and for those operations only that OpenVINO does not replace by
    others: the network is written in forms that it keeps.
    """
    for operation in marked:
        constants = [value.get_node() for value in operation.input_values()]
        for node in (operation, *(node for node in constants if node.get_type_name() == "Constant")):
            node.get_rt_info()[_KEEP_FLOAT32] = ""
