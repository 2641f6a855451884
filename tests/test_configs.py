"""The configs: each is understood, says only what it changes, and agrees with its twin."""

import inspect
from pathlib import Path

import anomalib.data
import pytest
import yaml
from anomalib.engine import Engine
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

import anomalib_cfa.data
from anomalib_cfa import Cfa
from anomalib_cfa.benchmark.spec import accelerators, check_config, expand

CONFIGS = Path(__file__).parents[1] / "configs"
TRAINING = ("cfa_plus_plus", "fast_cpu", "paper_r", "paper_rc")
BENCHMARKS = sorted(path.stem for path in CONFIGS.glob("benchmark_*.yaml"))
CATEGORIES = {
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
    *("toothbrush", "transistor", "wood", "zipper"),
}


def load(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def specs(name):
    config = load(name)
    return [spec for accelerator in accelerators(config) for spec in expand(accelerator, config["benchmark"])]


@pytest.mark.parametrize("name", TRAINING)
def test_the_command_line_builds_what_a_training_config_says(name):
    _, model, datamodule = Engine.from_config(CONFIGS / f"{name}.yaml", **{"data.category": "screw"})
    assert isinstance(model, Cfa)
    said = load(name)["model"]["init_args"]
    assert {argument: model.hparams[argument] for argument in said} == said
    assert datamodule.category == "screw"
    assert datamodule.train_batch_size == 4


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_overrides_only_what_it_changes(name):
    config = load(name)
    for section, owner in (("model", Cfa), ("data", anomalib.data.MVTecAD)):
        defaults = inspect.signature(owner).parameters
        for argument, value in config[section]["init_args"].items():
            assert defaults[argument].default != value, argument


def test_the_command_line_takes_rotated_mvtec_ad(tmp_path):
    path = tmp_path / "rotated.yaml"
    config = {
        "model": {"class_path": "Cfa", "init_args": {"backbone": "resnet18", "image_size": 224}},
        "data": {"class_path": "anomalib_cfa.data.RotatedMVTecAD", "init_args": {"category": "screw", "degrees": 5}},
    }
    path.write_text(yaml.safe_dump(config))
    datamodule = Engine.from_config(path)[2]
    assert isinstance(datamodule, anomalib_cfa.data.RotatedMVTecAD)
    assert datamodule.train_augmentations.steps.transforms[1].degrees == [-5.0, 5.0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_config_covers_every_category_with_arguments_that_exist(name):
    check_config(load(name))
    jobs = specs(name)
    assert {spec.category for spec in jobs} == CATEGORIES
    for spec in jobs:
        module = anomalib_cfa.data if spec.data_name == "RotatedMVTecAD" else anomalib.data
        for owner, section in ((Cfa, spec.model), (getattr(module, spec.data_name), spec.data)):
            inspect.signature(owner).bind(**section["init_args"])


def test_the_main_benchmark_covers_both_views_two_backbones_and_three_seeds():
    arguments = [spec.model["init_args"] for spec in specs("benchmark_mvtec")]
    points = {(each["backbone"], each["center_crop_size"], each["seed"]) for each in arguments}
    assert len(points) == 12
    assert len(arguments) == 12 * len(CATEGORIES)


def test_anomalibs_own_command_gives_each_job_of_the_main_benchmark_its_seed_and_view():
    section = load("benchmark_mvtec")["benchmark"]
    section["model"]["init_args"]["backbone"] = "test_resnet.r160_in1k"
    section["data"]["init_args"]["category"] = "screw"
    jobs = list(BenchmarkJobGenerator("cpu")(section, None))
    built = [(job.model.hparams["seed"], job.model.hparams["center_crop_size"]) for job in jobs]
    assert sorted(built, key=str) == [(seed, crop) for seed in (0, 1, 2) for crop in (224, None)]
    assert all(isinstance(job.model, Cfa) for job in jobs)


@pytest.mark.parametrize(
    ("benchmark", "training"), [("benchmark_fast_cpu", ["fast_cpu"]), ("benchmark_paper", ["paper_r", "paper_rc"])]
)
def test_a_benchmark_trains_as_its_training_configs_do(benchmark, training):
    wanted = [load(name) for name in training]
    defaults = {name: parameter.default for name, parameter in inspect.signature(Cfa).parameters.items()}
    benchmarked = [{**defaults, **spec.model["init_args"], "seed": 0} for spec in specs(benchmark)]
    trained = [{**defaults, **config["model"]["init_args"]} for config in wanted]
    assert all(model in trained for model in benchmarked)
    assert all(model in benchmarked for model in trained)
    section = load(benchmark)["benchmark"]
    for config in wanted:
        assert section.get("trainer", {}).get("max_epochs") == config["trainer"].get("max_epochs")
        assert section["data"]["init_args"]["train_batch_size"] == config["data"]["init_args"]["train_batch_size"]


def test_names_of_0_1_0_in_a_config_are_read_with_a_warning(tmp_path):
    path = tmp_path / "old.yaml"
    arguments = {
        "backbone": "resnet18",
        "pre_trained": False,
        "descriptor_start": "random",
        "nu": 0.01,
        "search": "ivf",
    }
    config = {"model": {"class_path": "Cfa", "init_args": arguments}, "data": {"class_path": "MVTecAD"}}
    path.write_text(yaml.safe_dump(config))
    with pytest.warns(FutureWarning) as warned:
        model = Engine.from_config(path)[1]
    assert model.hparams["whitening"] is None
    assert model.hparams["search"] == "two_level"
    assert not {"descriptor_start", "nu", "beta"} & set(model.hparams)
    said = " ".join(str(warning.message) for warning in warned)
    assert "descriptor_start is part of whitening now" in said
    assert "nu" in said
    assert "two_level" in said
