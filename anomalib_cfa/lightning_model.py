"""CFA as an anomalib model: wires the network, its memory bank and its loss into Lightning's loops."""

import logging
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, Evaluator, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from anomalib_cfa import pre_processing
from anomalib_cfa.export.mixin import CfaExport
from anomalib_cfa.features import PatchFeatures
from anomalib_cfa.features.backbones import find_backbone
from anomalib_cfa.hyperparameters import DEFAULT_FALSE_ALARM_RATE, RULES, check_hyperparameters, plain
from anomalib_cfa.loss import CfaLoss
from anomalib_cfa.metrics import AUROC, reset_metrics
from anomalib_cfa.old_names import current_search, from_old_names
from anomalib_cfa.post_processing import OneClassPostProcessor, forget_thresholds
from anomalib_cfa.processes import Processes
from anomalib_cfa.torch_model import CfaModel
from anomalib_cfa.training.checks import (
    check_epochs_left,
    check_trainer,
    do_without_validation,
    warn_of_other_images,
    warn_without_threshold,
)
from anomalib_cfa.training.features import TeardownOnException, TrainingFeatures
from anomalib_cfa.training.gradient_blocks import sum_over_blocks
from anomalib_cfa.training.kept_features import IndexedBatch
from anomalib_cfa.training.out_of_bag import OutOfBagScores
from anomalib_cfa.training.restoring import CfaCheckpoints
from anomalib_cfa.training.saved_arguments import given_arguments
from anomalib_cfa.training.whole_files import write_whole_files
from anomalib_cfa.training.worst_fitting import WorstFitting, log_worst

logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = 1


class Cfa(CfaExport, CfaCheckpoints, AnomalibModule):  # type: ignore[misc]  # as with anomalib's own mixin
    """CFA: Coupled-hypersphere-based Feature Adaptation (Lee, Lee, Song, IEEE Access 2022, arXiv 2206.04325).

    Anomalib's own arguments of the same name mean the same.

    Args:
        backbone: A timm model by its name, with or without tag.
        gamma_c: The memory bank holds T / gamma_c centres, T being the patches of an image. Below 1 it holds more than
            an image has patches, which K-means alone can do. None: 16,384 centres of K-means, fewer where there are few
            patches; of the other banks T.
        gamma_d: A patch descriptor has as many channels as the chosen layers together, divided by gamma_d.
        num_nearest_neighbors: K, the nearest centres that attract a patch, and by which it is scored.
        num_hard_negative_features: J, the centres behind them that repel it.
        radius: The hyperspheres' radius r, where it starts if it is learned.
        pre_processor: Anomalib's, or True for a resize to ``image_size``, a crop to ``center_crop_size``, and
            the normalization that the backbone's weights were trained with.
        post_processor: Anomalib's, or True for an :class:`~anomalib_cfa.post_processing.OneClassPostProcessor`.
        evaluator: Anomalib's, or True for :meth:`configure_evaluator`.
        visualizer: Anomalib's, or True for its default.
        layers: Layers of the backbone to take features from. None: those of strides 8 and 16, a
            ResNet's ``layer2`` and ``layer3``. The paper's are ``layer1`` to ``layer3``.
        pre_trained: Whether the backbone starts with ImageNet weights: timm's, from its cache or the hub.
        weights_path: A local file to take them from instead, ``.safetensors`` or ``.pth``.
        bank: How the centres are made: ``"kmeans"`` over patches of all images; the ``"mean"`` of each position, as the
            authors' code has it; or the paper's ``"ema"`` of nearest neighbours.
        whitening: How far the patch descriptor's start evens out how much the target's patch features vary in each
            direction: 1 makes them vary alike, 0 leaves them as they are. None: the paper's random start.
        learn_radius: Whether the radius is trained with the descriptor.
        alpha: Margin of the repulsion, which is zero until radius² > alpha.
        search: How a patch's nearest centres are found: ``"two_level"``, in time that hardly grows with the bank, or
            ``"exact"``, among all.
        lr: Learning rate of AdamW. From a random start the authors take 1e-3.
        weight_decay: Weight decay of AdamW.
        score: ``"local"``: the anomaly map shows distances to the nearest centre, and the image's score relates them to
            what is usual for normal patches around that centre. ``"nearest"``: the distance alone, for both.
            ``"softmin"``: the paper's, weighted by its softmin among the K nearest. ``"calibrated"``: 0.1.0's, related
            to what is usual at that one centre, for both.
        sigma: Standard deviation of the anomaly map's smoothing, in pixels.
        center_view: Whether the centre of the image, seven eighths of a side, is scored once more as a view of its own,
            and both views are averaged there (CFA++).
        seed: Governs the descriptor's start, K-means and the order of images.
        image_size: Height and width to resize to, or one number for both. Only without a ``pre_processor``.
        center_crop_size: Height and width to crop to after that. Only without a ``pre_processor``.
        false_alarm_rate: The share of normal images, and of their pixels, that may lie above the thresholds where no
            validation image is defective. Only without a ``post_processor``.
        feature_budget: GiB of memory in which the backbone's features of the training images may be kept across
            epochs; those of larger data sets go to a temporary file in the run's folder. 0 keeps none.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> Engine().train(Cfa("resnet18"), datamodule=MVTecAD(category="screw"))  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        gamma_c: float | None = None,
        gamma_d: int = 1,
        num_nearest_neighbors: int = 3,
        num_hard_negative_features: int = 3,
        radius: float = 1e-5,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        layers: list[str] | None = None,
        pre_trained: bool = True,
        weights_path: str | None = None,
        bank: str = "kmeans",
        whitening: float | None = 0.5,
        learn_radius: bool = True,
        alpha: float = 0.1,
        search: str = "two_level",
        lr: float = 1e-4,
        weight_decay: float = 5e-4,
        score: str = "local",
        sigma: float = 4.0,
        center_view: bool = False,
        seed: int = 0,
        image_size: list[int] | int | None = None,
        center_crop_size: list[int] | int | None = None,
        false_alarm_rate: float = DEFAULT_FALSE_ALARM_RATE,
        feature_budget: float = 1.0,
        **old_names: Any,  # arguments of 0.1.0
    ) -> None:
        whitening = from_old_names(**old_names).get("whitening", whitening)
        search = current_search(search)
        old_names.clear()  # Lightning saves these locals as hyper-parameters
        weights_path = str(weights_path) if isinstance(weights_path, Path) else weights_path
        hyperparameters = {name: plain(value) for name, value in locals().items() if name in RULES}
        check_hyperparameters(**hyperparameters)
        given_pre_processor = pre_processor
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size, center_crop_size, backbone)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self._constructed_with = {name: value for name, value in hyperparameters.items() if name in self.hparams}
        self.hparams.update(self._constructed_with)
        pre_processing.make_exportable(self.pre_processor)
        components = {"pre_processor": given_pre_processor, "post_processor": post_processor}
        self._given = given_arguments({**self.hparams, **components}, Cfa)
        if given_pre_processor is not True:
            pre_processing.warn_of_other_statistics(self.pre_processor, find_backbone(backbone))
            pre_processing.warn_of_late_resize(self.pre_processor)
        self._build()
        self.training_images: list[str] = []  # in the data set's order, to which the memory bank's sources refer
        self.worst_fitting: WorstFitting = []  # training images that stand out, and their scores, the worst first
        self._features: TrainingFeatures | None = None
        self._out_of_bag: OutOfBagScores | None = None
        self._limit_val_batches: int | float | None = None
        # Anomalib's command line shows this line: two packages have a Cfa.
        logger.info("This Cfa is that of anomalib-cfa %s, not anomalib's own", version("anomalib-cfa"))

    def _build(self) -> None:
        """Build the network and the loss from the hyper-parameters."""
        size = self._size_to_build_for()
        patch_features = PatchFeatures(**{**self._arguments_of(PatchFeatures), "image_size": size})
        self.model: CfaModel = CfaModel(patch_features, **self._arguments_of(CfaModel))
        if size is not None:
            self.model.check_image_size(*size)
        self.loss = CfaLoss(**self._arguments_of(CfaLoss))

    def _size_to_build_for(self) -> tuple[int, int] | None:
        """Height and width of images, where they are known and matter before images come.

        In a user's own pre-processor they do so only if the backbone is built for a size: anomalib's tiled ensemble
        builds throw-away models of 10 x 10 pixels.
        """
        is_default = "pre_processor" not in self._given
        tells_size = hasattr(self.pre_processor, "transform")
        if is_default or (tells_size and find_backbone(self.hparams["backbone"]).is_of_one_size):
            return self.input_size
        return None

    def _arguments_of(self, part: type) -> dict[str, Any]:
        return {name: self.hparams[name] for name in signature(part).parameters if name in self.hparams}

    configure_pre_processor = staticmethod(pre_processing.configure_pre_processor)

    def configure_post_processor(self) -> PostProcessor:
        """Anomalib's, which also finds thresholds from normal images alone."""
        return OneClassPostProcessor(self.hparams["false_alarm_rate"])

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image AUROC and F1, pixel AUROC, F1 and AUPRO in tests; image and pixel AUROC in validation."""
        image_scores, image_labels = ["pred_score", "gt_label"], ["pred_label", "gt_label"]
        pixel_scores, pixel_labels = ["anomaly_map", "gt_mask"], ["pred_mask", "gt_mask"]
        return Evaluator(
            val_metrics=[AUROC(image_scores, "image_"), AUROC(pixel_scores, "pixel_", strict=False)],
            test_metrics=[
                AUROC(image_scores, "image_"),
                F1Score(image_labels, "image_", strict=False),  # there are none without thresholds
                AUROC(pixel_scores, "pixel_", strict=False),
                F1Score(pixel_labels, "pixel_", strict=False),
                AUPRO(pixel_scores, "pixel_", strict=False),
            ],
        )

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's, and one that gives trainer and data module back after an exception."""
        callbacks: Any = super().configure_callbacks()
        return [*callbacks, TeardownOnException()]

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit: a copy would hold the training images' features."""
        return {**super().__getstate__(), "_features": None, "_out_of_bag": None}

    @property
    def trainer(self) -> Trainer:
        """The trainer that the model is attached to."""
        trainer: Trainer = LightningModule.trainer.fget(self)  # type: ignore[attr-defined]
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None:
            return
        check_trainer(trainer)  # before callbacks set anything up
        # The last moment before Lightning sets 1,000 epochs, where no epochs, steps or time are given.
        if trainer.state.fn == TrainerFn.FITTING and trainer.max_epochs is None and trainer.max_steps == -1:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(each, Timer) and each.time_remaining() is not None for each in callbacks):
                trainer.fit_loop.max_epochs = DEFAULT_EPOCHS
                logger.info("Training for %d epoch, as no number of epochs, steps or time is given", DEFAULT_EPOCHS)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None but that validation is not tried out before training, as with anomalib's own Cfa."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    def clear_memory_bank(self) -> None:
        """Forget all that was learned from images, thresholds too, so that the next fit is as a new model's."""
        self.model.reset()
        self.training_images, self.worst_fitting = [], []
        forget_thresholds(self.post_processor)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with AMSGrad, the authors' optimizer, for the descriptor and the radius: the backbone is frozen."""
        options = {name: self.hparams[name] for name in ("lr", "weight_decay")}
        return torch.optim.AdamW(self.model.trained_parameters(), amsgrad=True, **options)

    # The hooks in a fit's order; anomalib_cfa.training.features says what happens to the images meanwhile.

    def setup(self, stage: str) -> None:
        """Let a data module's training images be read in the seed's order, and once where their features are kept."""
        reset_metrics(self.post_processor, self.evaluator)  # of a run that was interrupted
        self._limit_val_batches = do_without_validation(self.trainer)
        if stage == TrainerFn.FITTING:
            self._features = TrainingFeatures(self)
            write_whole_files(self.trainer.strategy)

    def on_fit_start(self) -> None:
        """Build the memory bank, unless the model has one: from a checkpoint, or from a fit before."""
        assert self._features is not None
        self.model.calibration.restart()  # a fit that goes on within an epoch does not start one
        self.trainer.fit_loop.setup_data()
        if self.model.memory_bank.is_built:
            logger.info("Training continues with the model's memory bank; clear_memory_bank() discards it")
            warn_of_other_images(self._features.paths(), self.training_images)
        else:
            check_epochs_left(self.trainer)
            self.training_images = self._features.paths()
            self.model.patch_features.load_weights()
            all_features, processes = self._features, Processes.of(self.trainer)
            self.model.build(all_features, processes)
            if self.trainer.fit_loop.skip:  # otherwise an epoch calibrates the score as it trains
                self.model.calibrate_all(all_features, processes)

    def on_train_start(self) -> None:
        """Read no image that need not be read."""
        assert self._features is not None
        self._features.start_training()
        if images := self._features.paths():
            out_of_bag = OutOfBagScores(self.model, self.training_images, images)
            self._out_of_bag = out_of_bag if out_of_bag.knows_owners else None

    def on_train_epoch_start(self) -> None:
        """Calibrate anew from this epoch's patches."""
        assert self._features is not None
        self._features.start_epoch()
        self.model.calibration.restart()
        if self._out_of_bag is not None:
            self._out_of_bag.start_epoch()

    def training_step(self, batch: ImageBatch | IndexedBatch) -> STEP_OUTPUT:
        """Attract each patch to its nearest centres, and repel it from the hard negatives behind them.

        Raises:
            ValueError: If the loss is not finite.
        """
        assert self._features is not None
        pyramid = self._features.pyramid(batch)
        terms = torch.zeros(2, device=self.device)
        if self._out_of_bag is not None:
            self._out_of_bag.start_batch(batch.image_path, self._features.image_size)

        def loss_of(block: list[Tensor]) -> Tensor:
            squared, indices, descriptors = self.model.targets(block)
            self.model.calibrate(squared.detach(), indices)
            if self._out_of_bag is not None:
                self._out_of_bag.update(squared.detach(), indices, descriptors.detach())
            share = len(squared) / len(pyramid[0])
            attraction_and_repulsion = share * torch.stack(self.loss(squared, self.model.radius))
            terms.add_(attraction_and_repulsion.detach())
            return attraction_and_repulsion.sum()

        loss = sum_over_blocks(loss_of, self.model.blocks(pyramid), self.model.trained_parameters())
        if not torch.isfinite(loss):
            msg = (
                f"The loss is {loss.item()}: the images or the features hold nan or infinite values, or lr is too high"
            )
            raise ValueError(msg)
        values = {"loss": loss, "attraction": terms[0], "repulsion": terms[1], "radius": self.model.radius}
        logged = {f"train_{name}": value.detach() for name, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(pyramid[0]))
        return loss

    def on_validation_start(self) -> None:
        """Score with the calibration that this epoch's training patches give."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._finish_epoch()

    def validation_step(self, batch: ImageBatch) -> STEP_OUTPUT:
        """Predict a batch."""
        updated: STEP_OUTPUT = batch.update(**self.model(batch.image)._asdict())
        return updated

    def on_train_epoch_end(self) -> None:
        """The same without a validation, and thresholds from the training images, before the checkpoint is written."""
        self._finish_epoch()
        post_processor, out_of_bag = self.post_processor, self._out_of_bag
        if out_of_bag is None or any(self.trainer.num_val_batches):
            return
        if isinstance(post_processor, OneClassPostProcessor):
            for predictions in out_of_bag.predictions():
                post_processor.update(predictions)
            post_processor.finish("training images, each scored without the centres that it gave")
            if self.model.center_view:
                logger.warning(
                    "The training images were scored without their central view, which lowers scores: the thresholds "
                    "are probably too high. Hold normal images out for validation to have them from both views"
                )

    def _finish_epoch(self) -> None:
        processes = Processes.of(self.trainer)
        self.model.finish_calibration(processes)
        if self._out_of_bag is not None:
            self.worst_fitting = self._out_of_bag.worst(processes)

    def on_train_end(self) -> None:
        """Name the training images that fit worst; calibrate the score if time was up before the first step."""
        if self.trainer.global_step == 0 and self._features is not None:
            self.model.calibrate_all(self._features, Processes.of(self.trainer))
        if self._out_of_bag is not None and self.trainer.is_global_zero:
            log_worst(self.worst_fitting, len(self.training_images))

    def teardown(self, stage: str) -> None:
        """Give trainer and data module back as they were, and forget the kept features."""
        if self._limit_val_batches is not None:
            self.trainer.limit_val_batches = self._limit_val_batches
        if stage == TrainerFn.FITTING and self._features is not None:
            self._features.detach()
            self._features = self._out_of_bag = None

    def on_test_start(self) -> None:
        """Warn where labels would mean nothing."""
        warn_without_threshold(self.post_processor)

    on_predict_start = on_fit_end = on_test_start
