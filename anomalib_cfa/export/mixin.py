"""Export to torch, ONNX and OpenVINO."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy.export import CompressionType, ExportType
from anomalib.models.components.base.export_mixin import ExportMixin
from torch import nn
from torchmetrics import Metric

from anomalib_cfa.hyperparameters import EXPORT_RULES, check_arguments
from anomalib_cfa.pre_processing import make_exportable
from anomalib_cfa.resize import ExportableInterpolation
from anomalib_cfa.training.checks import warn_without_threshold

_BACKBONE = "model.patch_features.network"
_ONNX_OPSET = 18  # anomalib asks for 14, which the exporter fails to convert to, after a page of complaints
_SINGLE_FILE_BYTES = 1.5 * 2**30  # an ONNX file itself holds no more than 2 GiB


class CfaExport(ExportMixin, nn.Module):
    """Anomalib's exports, of a fitted model only, that put a file in place only once it is whole.

    The model is left as it was, able to train on, and one format's export has no effect on another's.
    """

    pre_processor: nn.Module | None
    post_processor: nn.Module | None

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to a torch file: anomalib's pickle of the whole module.

        Loading it runs whatever code it names, so anomalib loads it only where ``TRUST_REMOTE_CODE`` is set. The safe
        format is a checkpoint.

        Args:
            export_root: Folder for ``weights/torch``.
            model_file_name: The file's name, without ``.pt``.

        Returns:
            Path of the file.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        with self._ready(), _staged(export_root, ExportType.TORCH) as (staging, folder):
            self._warn_without_threshold()
            return folder / super().to_torch(staging, model_file_name).name

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # passed on to torch.onnx.export
    ) -> Path:
        """Export to ONNX, pre- and post-processing included.

        Args:
            export_root: Folder for ``weights/onnx``.
            model_file_name: The file's name, without ``.onnx``.
            input_size: Height and width of the images that it will take. Default: any.
            **kwargs: Passed on to :func:`torch.onnx.export`. Unless they say otherwise, models of up to 1.5 GiB are
                a single file.

        Returns:
            Path of the file.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If ``input_size`` is not a pair of positive integers.
        """
        check_arguments(EXPORT_RULES, input_size=input_size)
        with (
            self._ready(),
            _staged(export_root, ExportType.ONNX) as (staging, folder),
            ExportableInterpolation(),
            _quiet_exporter(),
        ):
            self._warn_without_threshold()
            size = sum(tensor.nbytes for tensor in self.state_dict().values())
            options = {"opset_version": _ONNX_OPSET, "external_data": size > _SINGLE_FILE_BYTES, "verbose": False}
            return folder / super().to_onnx(staging, model_file_name, input_size, **(options | kwargs)).name

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,  # noqa: ARG002 - anomalib's signature
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, pre- and post-processing included.

        Every compression is of the backbone alone, and lets OpenVINO choose the precision that it computes the backbone
        in: bfloat16 on CPUs that have it, unless its caller asks for float32. All else is computed in float32; without
        compression the backbone is, too. A batch is worked on image by image.

        Args:
            export_root: Folder for ``weights/openvino``.
            model_file_name: The files' name, without ``.xml`` and ``.bin``.
            input_size: Height and width of the images that it will take. Default: any.
            compression_type: ``FP16``, ``INT8``, ``INT8_PTQ`` or ``INT8_ACQ``. Default: none.
            datamodule: Gives the training images that ``INT8_PTQ`` and ``INT8_ACQ`` calibrate on.
            metric: What ``INT8_ACQ`` must keep, on training images with and without synthetic defects; higher is
                better. Default: the mean of image and pixel AUROC; through ``Engine.export`` anomalib's F1 score.
            task: Not used: the data module's images tell.
            max_drop: How much of the metric ``INT8_ACQ`` may lose.
            ov_kwargs: Passed on to :func:`openvino.convert_model`.
            onnx_kwargs: Passed on to :meth:`to_onnx`.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If the data module is missing or has too few images, or ``input_size`` or ``max_drop`` is out of
                its range.
        """
        import openvino  # noqa: PLC0415 - optional, as what these modules import

        from anomalib_cfa.export import loops, quantization  # noqa: PLC0415
        from anomalib_cfa.export import openvino as graph  # noqa: PLC0415

        compression_type = None if compression_type is None else CompressionType(compression_type)
        check_arguments(EXPORT_RULES, input_size=input_size, max_drop=max_drop)
        quantization.check_images(compression_type, datamodule)
        with self._ready(), _staged(export_root, ExportType.OPENVINO) as (staging, folder):
            # A model of any size is one of its own size, and a resize that OpenVINO does in memory that it uses again.
            own_size = loops.leading_resize(self.pre_processor) if input_size is None and not onnx_kwargs else None
            size = own_size or input_size
            onnx_path = self.to_onnx(staging / "onnx", model_file_name, size, **(onnx_kwargs or {}))
            names = graph.module_names(onnx_path)
            model = openvino.convert_model(onnx_path, **(ov_kwargs or {}))
            graph.use_single_output_max_pools(model)
            kept = graph.outside_of(_BACKBONE, model, names)
            if compression_type is None:
                kept = graph.operations(model)
            elif compression_type != CompressionType.FP16:
                seed = getattr(self, "hparams", {}).get("seed", 0)
                model = quantization.compress(
                    model, compression_type, kept, datamodule, self.pre_processor, metric, max_drop, seed
                )
                kept = graph.outside_of(_BACKBONE, model, names)
            graph.keep_float32(kept)
            marked = staging / f"{model_file_name}.xml"
            openvino.save_model(model, marked, compress_to_fp16=False)
            in_a_loop = loops.one_image_at_a_time if own_size is None else loops.one_image_of_any_size_at_a_time
            core = openvino.Core()
            core.set_property({"ENABLE_MMAP": False})  # Windows could not remove the staging folder
            model = in_a_loop(core.read_model(marked))
            path = staging / ExportType.OPENVINO.value / f"{model_file_name}.xml"
            path.parent.mkdir()
            openvino.save_model(model, path, compress_to_fp16=compression_type == CompressionType.FP16)
            return folder / path.name

    def _warn_without_threshold(self) -> None:  # once: OpenVINO's export goes through ONNX
        warn_without_threshold(self.post_processor)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Check that the model can be exported, and bring it into a state for that, and back."""
        model: Any = self.model
        if not model.memory_bank.is_built:
            msg = "The model must be fitted before it is exported, but has no memory bank: fit it, or load a checkpoint"
            raise RuntimeError(msg)
        make_exportable(self.pre_processor)
        assert model.memory_bank.index  # built now: a graph cannot build it
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad(), model.descriptor.exportable():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the hundreds of lines on initializers and constants that would bury where the file is."""
    levels = {log: log.level for log in map(logging.getLogger, ("onnx_ir", "onnxscript"))}
    for log in levels:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


@contextmanager
def _staged(export_root: Path | str, export_type: ExportType) -> Iterator[tuple[Path, Path]]:
    """A folder to export into, and the one to which its files move once all are there.

    Both are on one file system, so each file is replaced in one step; what refers to another file comes last.
    """
    folder = Path(export_root) / "weights" / export_type.value
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as name:
        staging = Path(name)
        yield staging, folder
        files = [file for file in staging.rglob("*") if file.is_file() and file.parent.name == export_type.value]
        for file in sorted(files, key=lambda file: file.suffix in {".onnx", ".xml"}):
            file.replace(folder / file.name)
