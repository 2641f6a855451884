"""A checkpoint -> the model that was trained, whatever the new one was built with."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_cfa.hyperparameters import DEFAULT_FALSE_ALARM_RATE, RULES, check_hyperparameters, plain
from anomalib_cfa.pre_processing import make_exportable
from anomalib_cfa.training.checkpoints import check_checkpoint
from anomalib_cfa.training.features import TeardownOnException
from anomalib_cfa.training.saved_arguments import (
    COMPONENTS,
    UNSAVED_PRE_PROCESSING,
    check_layers,
    check_pre_processing,
    current_arguments,
    merge,
    saved_arguments,
    unsaved_pre_processing,
)
from anomalib_cfa.training.worst_fitting import WorstFitting, saved_worst_fitting

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_TRAINING_IMAGES = "anomalib_cfa_training_images"
_WORST_FITTING = "anomalib_cfa_worst_fitting"


class CfaCheckpoints(LightningModule):
    """The saving and loading of checkpoints: a checkpoint says everything about the model that it holds.

    Arguments that were left at their defaults are the checkpoint's. Those that were given must agree with it, unless
    they may change afterwards.
    """

    # Of anomalib's module and of this package's; not a kind of the former, since anomalib lists these as its models.
    _build: Callable[[], None]
    _constructed_with: dict[str, Any]
    _given: dict[str, Any]
    clear_memory_bank: Callable[[], None]
    configure_post_processor: Callable[[], Any]
    configure_pre_processor: Callable[..., Any]
    loss: Any
    model: Any
    pre_processor: Any
    post_processor: Any
    evaluator: Any
    visualizer: Any
    training_images: list[str]
    worst_fitting: WorstFitting

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save with the components the paths of the images that the memory bank came from, and which fit worst."""
        super().on_save_checkpoint(checkpoint)
        if unsaved := unsaved_pre_processing(self.pre_processor):
            checkpoint[UNSAVED_PRE_PROCESSING] = unsaved
        checkpoint[_TRAINING_IMAGES] = self.training_images
        checkpoint[_WORST_FITTING] = self.worst_fitting

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that the checkpoint holds.

        Raises:
            ValueError: If the checkpoint is damaged or not of this model, an argument contradicts it, or the
                pre-processor is missing, which anomalib could not save.
        """
        check_checkpoint(checkpoint)
        # What 0.1.0 saved of the anomaly map's Gaussian, and later versions compute.
        _replace_state(checkpoint["state_dict"], {}, ("model.anomaly_map_generator.blur.",))
        trainer: Trainer | None = self._trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        # Not on top of the present ones, which may be those of a checkpoint before.
        arguments = {**self._constructed_with, **merge(saved_arguments(checkpoint), self._given, fitting=fitting)}
        check_hyperparameters(**arguments)
        check_pre_processing(checkpoint, self.pre_processor, self._given)
        self._restore_components(checkpoint, arguments, trainer)
        images = checkpoint.get(_TRAINING_IMAGES)  # older checkpoints have none
        self.training_images = [str(path) for path in images] if isinstance(images, list) else []
        self.worst_fitting = saved_worst_fitting(checkpoint.get(_WORST_FITTING))
        taken = {name: value for name, value in arguments.items() if value != self.hparams[name]}
        if taken:
            logger.info("From the checkpoint: %s", ", ".join(f"{name} {value!r}" for name, value in taken.items()))
            self.save_hyperparameters({**self.hparams, **arguments})
            self._build()
        if "layers" in self._given:
            check_layers(self.model.patch_features, self._given["layers"])
        if fitting:
            self.teardown(TrainerFn.FITTING)
            self.setup(TrainerFn.FITTING)  # with the new network and pre-processor

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load a whole state dict, or forget everything: a model that is half another would score without a word."""
        try:
            return super().load_state_dict(*args, **options)
        except RuntimeError:
            self.clear_memory_bank()
            raise

    def _restore_components(
        self, checkpoint: dict[str, Any], arguments: Mapping[str, Any], trainer: Trainer | None
    ) -> None:
        """Restore the pre- and post-processor; the evaluator and the visualizer may have changed.

        A post-processor that was given keeps its settings, and takes the checkpoint's thresholds.
        """
        config = checkpoint.get("anomalib_pre_processor_config") or {}
        if config.get("transform") is None and "pre_processor" in self._given:
            checkpoint.pop("anomalib_pre_processor_config", None)  # anomalib could not save it: the given one stays
        if "post_processor" in self._given:
            checkpoint.pop("anomalib_post_processor_config", None)
            (checkpoint.get("anomalib_components_enabled") or {})["post_processor"] = True
        before = {name: getattr(self, name) for name in COMPONENTS}
        # An earlier checkpoint's model may have had none.
        if self.pre_processor is None and "pre_processor" not in self._given:
            sizes = arguments["image_size"], arguments["center_crop_size"]
            self.pre_processor = self.configure_pre_processor(*sizes, arguments["backbone"])
        if self.post_processor is None and "post_processor" not in self._given:
            self.post_processor = self.configure_post_processor()
        super().on_load_checkpoint(checkpoint)
        make_exportable(self.pre_processor)
        if trainer is not None:
            self.evaluator, self.visualizer = before["evaluator"], before["visualizer"]
            for component in (self.evaluator, self.visualizer):
                # As callbacks they would take the state of the checkpoint's, which may have other metrics.
                checkpoint.get("callbacks", {}).pop(getattr(component, "state_key", None), None)
            _replace_callbacks(trainer, before.values(), [getattr(self, name) for name in COMPONENTS])
            # The data module resizes to the size of the model before the checkpoint was read.
            if isinstance(datamodule := getattr(trainer, "datamodule", None), AnomalibDataModule):
                datamodule.setup(trainer.state.fn)
        own, saved = self.state_dict(), checkpoint["state_dict"]
        _replace_state(saved, own, ("evaluator.", "visualizer."))
        thresholds = [{name for name in state if name.startswith("post_processor.")} for state in (own, saved)]
        if "post_processor" in self._given and thresholds[0] != thresholds[1]:
            _replace_state(saved, own, ("post_processor.",))

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> "Self":
        """Load the model that a checkpoint holds.

        Args:
            checkpoint_path: The checkpoint's path, or an open file.
            map_location: Where its tensors go, as in :func:`torch.load`.
            hparams_file: Hyper-parameters that take the place of the checkpoint's; not needed.
            strict: Whether the weights' names must all agree.
            weights_only: Whether the file may hold plain data only, and no code.
            **kwargs: The constructor's arguments that may differ from the checkpoint's, such as ``visualizer``.

        Returns:
            The model.

        Raises:
            ValueError: If the checkpoint is damaged or not of this model, or an argument contradicts it.
        """
        given = {name: plain(value) for name, value in current_arguments(kwargs).items()}
        check_hyperparameters(**{name: value for name, value in given.items() if name in RULES})
        components = {name: value for name, value in given.items() if name in COMPONENTS or name not in RULES}
        if components.get("pre_processor", True) is not True:
            components |= {"image_size": None, "center_crop_size": None}
        if components.get("post_processor", True) is not True:
            components |= {"false_alarm_rate": DEFAULT_FALSE_ALARM_RATE}
        options: Any = (map_location, hparams_file, strict, weights_only)
        model: Self = super().load_from_checkpoint(checkpoint_path, *options, **components)
        model.change_arguments({name: value for name, value in given.items() if name not in components})
        return model

    def change_arguments(self, given: Mapping[str, Any]) -> None:
        """Change arguments of a restored model that may change afterwards.

        Raises:
            ValueError: If one contradicts the model.
        """
        arguments = merge(self.hparams, given, fitting=False)
        if given.get("layers") is not None:
            check_layers(self.model.patch_features, given["layers"])
        sizes = {name: given.get(name, self.hparams[name]) for name in ("image_size", "center_crop_size")}
        if sizes != {name: self.hparams[name] for name in sizes}:
            config: Any = getattr(self.pre_processor, "checkpoint_config", dict)()
            restored = {"hyper_parameters": self.hparams, "anomalib_pre_processor_config": config}
            check_pre_processing(restored, self.configure_pre_processor(**sizes), sizes)
        self.hparams.update(arguments)
        self._given.update(given)
        # What else may change is read where it is needed; of these the parts have copies.
        self.loss.alpha, self.model.seed = arguments["alpha"], arguments["seed"]


def _replace_callbacks(trainer: Trainer, old: Collection[Any], new: Sequence[Any]) -> None:
    """Put components in the place of others, in their order: labels come before metrics of labels."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [each for each in callbacks if not any(each is component for component in old)]
    # The model gives this callback after its components.
    place = next((i for i, each in enumerate(callbacks) if isinstance(each, TeardownOnException)), 0)
    callbacks[place:place] = [component for component in new if isinstance(component, Callback)]


def _replace_state(state: dict[str, Any], own: Mapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Put the model's own tensors in the place of the checkpoint's where they need not agree."""
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
    state.update({name: value for name, value in own.items() if name.startswith(prefixes)})
