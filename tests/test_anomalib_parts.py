"""The parts of anomalib around a model work with this one; `docs/anomalib.md` has the table."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import anomalib.models
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib import data
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem, MVTecAD
from anomalib.data.datasets import MVTecADDataset, UCSDpedDataset
from anomalib.data.utils import Split
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.pipelines import Benchmark
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from anomalib.post_processing import PostProcessor
from anomalib.visualization import ImageVisualizer
from PIL import Image
from tiny import tiny_cfa
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler

from anomalib_cfa import Cfa
from anomalib_cfa.training.loaders import check_images

TRAIN, GOOD, BAD = 4, 3, 3
LOADING = {"num_workers": 0, "train_batch_size": 2, "eval_batch_size": 4}


def engine(folder, **options) -> Engine:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return Engine(default_root_dir=folder, **(defaults | options))


def mvtec(root) -> MVTecAD:
    return MVTecAD(root, category="tile", **LOADING)


def draw(path: Path, kind: str = "good") -> str:
    """Draw an image of 40 x 48 pixels: a pattern, a spot in it, or the mask of the spot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)) + sum(map(ord, path.stem)))
    pixels = rng.integers(90, 130, (40, 48, 3), dtype=np.uint8)
    if kind != "good":
        pixels[10:24, 8:22] = 255
    if kind in {"mask", "no mask"}:
        pixels = np.where((pixels == 255) & (kind == "mask"), 255, 0).astype(np.uint8)[..., 0]
    Image.fromarray(pixels).save(path)
    return str(path)


def draw_all(root: Path, train: str, good: str, bad: str, mask: str | None = None, suffix: str = ".png") -> None:
    """Draw a data set; the folders' names may hold an image's number."""
    for folder, count, kind in ((train, TRAIN, "good"), (good, GOOD, "good"), (bad, BAD, "bad"), (mask, BAD, "mask")):
        for number in range(count if folder else 0):
            name = f"{folder}.png" if kind == "mask" else f"{folder}/{{0:03d}}{suffix}"
            draw(root / name.format(number), kind)


def folder(root):
    draw_all(root, "good", "fine", "bad", "masks/{0:03d}")
    where = {"normal_dir": "good", "normal_test_dir": "fine", "abnormal_dir": "bad", "mask_dir": "masks"}
    return data.Folder("any", root=root, **where, val_split_mode="same_as_test", **LOADING)


def like_mvtec(kind, category, mask="ground_truth/bad/{0:03d}_mask", inner=""):
    def build(root):
        draw_all(root / inner / category, "train/good", "test/good", "test/bad", mask)
        return kind(root, category=category, **LOADING)

    return build


def btech(root):
    draw_all(root / "01", "train/ok", "test/ok", "test/ko", "ground_truth/ko/{0:03d}", suffix=".bmp")
    return data.BTech(root, category="01", **LOADING)


def bmad(root):
    draw_all(root / "Brain", "train/good", "test/good/img", "test/Ungood/img", "test/Ungood/label/{0:03d}")
    draw_all(root / "Brain", "train/good", "valid/good/img", "valid/Ungood/img", "valid/Ungood/label/{0:03d}")
    return data.BMAD(root, category="Brain", **LOADING)


def datumaro(root):
    items = []
    for number in range(TRAIN + BAD):
        draw(root / f"images/default/{number}.png", "good" if number < TRAIN else "bad")
        items.append({"image": {"path": f"{number}.png"}, "annotations": [{"label_id": int(number >= TRAIN)}]})
    labels = {"label": {"labels": [{"name": "Normal"}, {"name": "Anomalous"}]}}
    (root / "annotations").mkdir()
    (root / "annotations/default.json").write_text(json.dumps({"categories": labels, "items": items}))
    return data.Datumaro(root, test_split_mode="from_dir", val_split_mode="same_as_test", **LOADING)


def kaputt(root):
    pytest.importorskip("pyarrow")
    counts = {"train": (TRAIN, 0), "validation": (GOOD, BAD), "test": (GOOD, BAD)}
    for split, (good, bad) in counts.items():
        rows = []
        for number in range(good + bad):
            name, kind = f"{split}-{number}.png", "good" if number < good else "bad"
            draw(root / "query-image" / name, kind)
            draw(root / "query-mask" / name, "mask" if kind == "bad" else "no mask")
            told = {"item_material": "book_other", "defect_types": "", "defect": kind == "bad"}
            rows.append(
                {"capture_id": name, "query_image": f"query-image/{name}", "query_mask": f"query-mask/{name}", **told}
            )
        (root / "datasets").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(root / f"datasets/query-{split}.parquet")
    return data.Kaputt(root, category="book_other", **LOADING)


def kolektor(root):
    for number in range(TRAIN + GOOD + BAD):
        kind = "bad" if number < BAD else "good"
        draw(root / f"kos{number:02d}/Part0.jpg", kind)
        draw(root / f"kos{number:02d}/Part0_label.bmp", "mask" if kind == "bad" else "no mask")
    return data.Kolektor(root, **LOADING)


def mvtec_ad_2(root):
    draw_all(
        root / "can", "train/good", "test_public/good", "test_public/bad", "test_public/ground_truth/bad/{0:03d}_mask"
    )
    for number in range(GOOD):
        draw(root / f"can/validation/good/{number}.png")
    return data.MVTecAD2(root, category="can", **LOADING)


def mvtec_loco(root):
    draw_all(
        root / "pins",
        "train/good",
        "test/good",
        "test/logical_anomalies",
        "ground_truth/logical_anomalies/{0:03d}/000",
    )
    for number in range(GOOD):
        draw(root / f"pins/validation/good/{number}.png")
    return data.MVTecLOCO(root, category="pins", **LOADING)


def real_iad(root):
    inner = root / "realiad_256/audiojack"
    draw_all(inner, "OK/S0001", "OK/S0002", "NG/BX/S0003", "NG/BX/S0003/{0:03d}_mask")

    def entries(where, count):
        bad = where.startswith("NG")
        return [
            {
                "image_path": f"{where}/{number:03d}.png",
                "mask_path": f"{where}/{number:03d}_mask.png" if bad else None,
                "anomaly_class": "BX" if bad else "OK",
            }
            for number in range(count)
        ]

    listed = {"train": entries("OK/S0001", TRAIN), "test": entries("OK/S0002", GOOD) + entries("NG/BX/S0003", BAD)}
    (root / "list.json").write_text(json.dumps(listed))
    return data.RealIAD(root, category="audiojack", json_path="list.json", test_split_mode="from_dir", **LOADING)


def tabular(root):
    draw_all(root, "good", "fine", "bad", "masks/{0:03d}")
    rows = [("good", "train", 0, TRAIN), ("fine", "test", 0, GOOD), ("bad", "test", 1, BAD)]
    samples = [
        {
            "image_path": f"{where}/{number:03d}.png",
            "mask_path": f"masks/{number:03d}.png" if label else "",
            "split": split,
            "label_index": label,
        }
        for where, split, label, count in rows
        for number in range(count)
    ]
    return data.Tabular("any", samples, root=root, val_split_mode="same_as_test", **LOADING)


def depth(folder, kind):
    def build(root):
        import tifffile

        draw_all(root / "bagel", "train/good/rgb", "test/good/rgb", "test/hole/rgb", f"test/hole/{folder}/{{0:03d}}")
        for number in range(GOOD):
            draw(root / f"bagel/test/good/{folder}/{number:03d}.png", "no mask")
        for image in sorted((root / "bagel").rglob("rgb/*.png")):
            image.parents[1].joinpath("xyz").mkdir(exist_ok=True)
            tifffile.imwrite(image.parents[1] / f"xyz/{image.stem}.tiff", np.zeros((40, 48, 3), np.float32))
        return kind(root, category="bagel", **LOADING)

    return build


def folder_3d(root):
    import tifffile

    draw_all(root, "good", "fine", "bad", "masks/{0:03d}")
    for name in ("good", "fine", "bad"):
        (root / f"{name}_xyz").mkdir()
        for image in (root / name).glob("*.png"):
            tifffile.imwrite(root / f"{name}_xyz/{image.stem}.tiff", np.zeros((40, 48, 3), np.float32))
    where = {"normal_dir": "good", "normal_test_dir": "fine", "abnormal_dir": "bad", "mask_dir": "masks"}
    depths = {"normal_depth_dir": "good_xyz", "normal_test_depth_dir": "fine_xyz", "abnormal_depth_dir": "bad_xyz"}
    return data.Folder3D("any", root=root, **where, **depths, val_split_mode="same_as_test", **LOADING)


LAYOUTS = {
    "ADAM3D": depth("ground_truth", data.ADAM3D),
    "AutoVI": like_mvtec(data.AutoVI, "engine_wiring", "ground_truth/bad/{0:03d}/0000"),
    "BMAD": bmad,
    "BTech": btech,
    "Datumaro": datumaro,
    "Folder": folder,
    "Folder3D": folder_3d,
    "Kaputt": kaputt,
    "Kolektor": kolektor,
    "MPDD": like_mvtec(data.MPDD, "tubes"),
    "MVTec3D": depth("gt", data.MVTec3D),
    "MVTecAD": like_mvtec(MVTecAD, "tile"),
    "MVTecAD2": mvtec_ad_2,
    "MVTecLOCO": mvtec_loco,
    "RealIAD": real_iad,
    "Tabular": tabular,
    "VAD": like_mvtec(data.VAD, "vad"),
    "Visa": like_mvtec(data.Visa, "capsules", "ground_truth/bad/{0:03d}", inner="visa_pytorch"),
}
VIDEOS = {"Avenue", "ShanghaiTech", "UCSDped"}


def test_every_data_module_of_anomalib_has_a_case():
    kinds = {name for name in data.__all__ if isinstance(getattr(data, name), type)}
    modules = {name for name in kinds if issubclass(getattr(data, name), AnomalibDataModule)}
    assert modules - {"AnomalibDataModule"} == set(LAYOUTS) | VIDEOS


def skip_what_anomalib_cannot_read(datamodule):
    """Anomalib 2.7 reads some of its layouts with pandas below 3 only, whatever the model."""
    try:
        datamodule.setup()
        readable = [dataset[0] for dataset in (datamodule.train_data, datamodule.test_data)]
    except (IndexError, TypeError, ValueError) as error:
        pytest.skip(f"anomalib itself does not read it with pandas {pd.__version__}: {error}")
    assert len(readable) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_data_modules_images_are_trained_on_and_tested(tmp_path, name):
    datamodule = LAYOUTS[name](tmp_path / "set")
    skip_what_anomalib_cannot_read(datamodule)
    model = tiny_cfa()
    run = engine(tmp_path)
    run.fit(model, datamodule=datamodule)
    assert len(model.training_images) == len(datamodule.train_data) >= 2
    assert len(model.model.memory_bank.centers) == len(model.training_images) * 32
    assert float(model.post_processor.image_threshold) > 0
    (metrics,) = run.test(model, datamodule=datamodule, verbose=False)
    assert metrics["image_AUROC"] == 1
    assert ("pixel_AUPRO" in metrics) == (name != "Datumaro")  # which has no masks
    assert metrics.get("pixel_AUROC", 1) > 0.7
    batches = run.predict(model, datamodule=datamodule)
    assert sum(len(batch.pred_score) for batch in batches) == len(datamodule.test_data)


def test_videos_are_refused_by_their_data_set():
    dataset = object.__new__(UCSDpedDataset)  # to read one takes anomalib's extra `video`
    with pytest.raises(ValueError, match="must be images, but UCSDpedDataset holds videos"):
        check_images(SimpleNamespace(dataset=dataset), None)


class Arrays(Dataset):
    """A user's own data set, of arrays."""

    collate_fn = staticmethod(ImageBatch.collate)

    def __len__(self):
        return 5

    def __getitem__(self, index):
        array = np.random.default_rng(index).random((3, 50, 60), dtype=np.float32)
        return ImageItem(image=torch.from_numpy(array))


def loader(dataset, **options):
    return DataLoader(dataset, **({"batch_size": 2, "collate_fn": dataset.collate_fn} | options))


@pytest.fixture(scope="module")
def fitted(rendered_mvtec, tmp_path_factory):
    model = tiny_cfa()
    run = engine(tmp_path_factory.mktemp("fitted"))
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    return model.eval(), run


def test_folders_files_arrays_and_loaders_are_predicted_alike(fitted, rendered_mvtec, tmp_path):
    model, _ = fitted

    def scores(**source):
        batches = engine(tmp_path).predict(model, **source)
        return torch.cat([batch.pred_score for batch in batches])

    place = rendered_mvtec / "tile/test/good"
    files = [scores(data_path=path) for path in sorted(place.glob("*.png"))]
    assert torch.equal(scores(data_path=place), torch.cat(files))
    expected = torch.cat([model(Arrays()[index].image[None]).pred_score for index in range(5)])
    torch.testing.assert_close(scores(dataset=Arrays()), expected)
    torch.testing.assert_close(scores(dataloaders=loader(Arrays())), expected)
    assert len(scores(datamodule=mvtec(rendered_mvtec))) == 8


def test_validation_and_training_in_one_call_give_the_metrics_of_their_parts(fitted, rendered_mvtec, tmp_path):
    model, run = fitted
    expected = engine(tmp_path).test(model, datamodule=mvtec(rendered_mvtec), verbose=False)
    assert engine(tmp_path).train(tiny_cfa(), datamodule=mvtec(rendered_mvtec)) == expected
    options = {"datamodule": mvtec(rendered_mvtec), "verbose": False}
    (metrics,) = engine(tmp_path).validate(Cfa(visualizer=False), ckpt_path=run.best_model_path, **options)
    assert metrics["pixel_AUROC"] == pytest.approx(expected[0]["pixel_AUROC"], abs=1e-3)


def test_an_engine_from_a_config_fits(rendered_mvtec, tmp_path):
    arguments = {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64, "visualizer": False}
    config = {
        "model": {"class_path": "Cfa", "init_args": arguments},
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(rendered_mvtec), "category": "tile", **LOADING}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
        "default_root_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run, model, datamodule = Engine.from_config(tmp_path / "config.yaml")
    run.fit(model, datamodule=datamodule)
    assert len(model.training_images) == 6


def own_loaders():
    def dataset(root):
        return MVTecADDataset(root, category="tile", split=Split.TRAIN)

    def batched(root):
        batches = BatchSampler(RandomSampler(dataset(root)), 4, drop_last=False)
        return DataLoader(dataset(root), batch_sampler=batches, collate_fn=ImageBatch.collate)

    return {
        "plain": (lambda root: loader(dataset(root)), 6),
        "shuffled": (lambda root: loader(dataset(root), shuffle=True), 6),
        "batch sampler": (batched, 6),
        "subset": (lambda root: loader(dataset(root), sampler=SubsetRandomSampler([1, 3, 4])), 3),
        "arrays": (lambda _: loader(Arrays()), 5),
    }


@pytest.mark.parametrize("name", own_loaders())
def test_the_bank_is_made_of_the_images_that_a_loader_of_ones_own_draws(rendered_mvtec, tmp_path, name):
    build, images = own_loaders()[name]
    model = tiny_cfa()
    train = build(rendered_mvtec)
    engine(tmp_path).fit(model, train_dataloaders=train)
    assert len(model.model.memory_bank.centers) == images * 32
    if name == "subset":
        paths = train.dataset.samples.image_path
        assert model.training_images == [paths[place] for place in (1, 3, 4)]


class Endless(IterableDataset):
    collate_fn = staticmethod(ImageBatch.collate)

    def __iter__(self):
        yield from Arrays()


class Tensors(Arrays):
    collate_fn = None

    def __getitem__(self, index):
        return super().__getitem__(index).image


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (lambda: loader(Endless()), r"data set with indices, .* but Endless is an IterableDataset"),
        (lambda: loader(Tensors()), r"Batches must be of anomalib's kind, but one is of type Tensor"),
        (lambda: [loader(Arrays()), loader(Arrays())], r"must come from one DataLoader, but comes from list"),
    ],
    ids=["iterable", "tensors", "two loaders"],
)
def test_loaders_that_cannot_be_trained_on_are_refused_with_the_reason(tmp_path, source, named):
    with pytest.raises(TypeError, match=named):
        engine(tmp_path).fit(tiny_cfa(), train_dataloaders=source())


class Tiny(Cfa):
    """The tiled ensemble of anomalib 2.7 cannot give a Cfa arguments."""

    def __init__(self, **options):
        super().__init__(**{"backbone": "test_resnet.r160_in1k", "pre_trained": False, **options})


@pytest.mark.parametrize("stage", ["image", "tile"])
def test_the_tiled_ensembles_pipelines_end_with_their_table(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.setattr(anomalib.models, "Tiny", Tiny, raising=False)
    monkeypatch.chdir(tmp_path)
    draw_all(tmp_path / "set", "good", "fine", "bad", "masks/{0:03d}")
    where = {"normal_dir": "good", "normal_test_dir": "fine", "abnormal_dir": "bad", "mask_dir": "masks"}
    loading = {"name": "any", "root": str(tmp_path / "set"), "val_split_mode": "same_as_test", **where, **LOADING}
    loading["test_split_mode"] = "from_dir"
    config = {
        "seed": 1,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path / "results"),
        "tiling": {"image_size": [64, 128], "tile_size": [64, 64], "stride": [64, 64]},
        "normalization_stage": stage,
        "thresholding_stage": stage,
        "data": {"class_path": "anomalib.data.Folder", "init_args": loading},
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": "Tiny"}, "trainer": {"max_epochs": 1, "logger": False}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    training = TrainTiledEnsemble()
    training.run(Namespace(config=tmp_path / "config.yaml"))
    EvalTiledEnsemble(training.root_dir).run(Namespace(config=tmp_path / "config.yaml"))
    assert "some errors when running" not in capsys.readouterr().out
    (table,) = tmp_path.rglob("metric_results.csv")
    metrics = pd.read_csv(table).iloc[0]
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.7


def test_anomalibs_own_benchmark_searches_a_grid_of_arguments(rendered_mvtec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"class_path": "Cfa", "init_args": {"backbone": "test_resnet.r160_in1k", "pre_trained": False}}
    grid["init_args"] |= {"image_size": 64, "visualizer": False, "score": {"grid": ["local", "nearest"]}}
    loading = {"class_path": "MVTecAD", "init_args": {"root": str(rendered_mvtec), "category": "tile", **LOADING}}
    config = {"accelerator": ["cpu"], "benchmark": {"seed": 1, "model": grid, "data": loading}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(config))
    Benchmark().run(Namespace(config=tmp_path / "grid.yaml"))
    (table,) = tmp_path.rglob("results.csv")
    results = pd.read_csv(table)
    assert list(results["model.init_args.score"]) == ["local", "nearest"]
    assert results["image_AUROC"].between(0, 1).all()


def drawn(fitted, root, folder, **options):
    """The pictures that a visualizer makes of the first four test images."""
    run = engine(folder, limit_test_batches=1)
    model = Cfa(visualizer=ImageVisualizer(output_dir=folder / "drawn", **options))
    run.test(model, datamodule=mvtec(root), ckpt_path=fitted[1].best_model_path, verbose=False)
    return [Image.open(path) for path in sorted((folder / "drawn").rglob("*.png"))]


@pytest.fixture(scope="module")
def drawn_by_default(fitted, rendered_mvtec, tmp_path_factory):
    return drawn(fitted, rendered_mvtec, tmp_path_factory.mktemp("drawn"))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (1024, 256)),
        ({"fields": ["image"], "overlay_fields": [("image", ["pred_mask"])]}, (512, 256)),
        ({"field_size": (80, 60), "text_config": {"enable": False}}, (320, 60)),
    ],
    ids=str,
)
def test_the_visualizer_draws_a_picture_of_each_image_as_it_is_told(
    fitted, drawn_by_default, rendered_mvtec, tmp_path, options, size
):
    pictures = drawn(fitted, rendered_mvtec, tmp_path, **options)
    assert len(pictures) == len(drawn_by_default) == 4
    assert {picture.size for picture in pictures} == {size}
    same = [ours.tobytes() == plain.tobytes() for ours, plain in zip(pictures, drawn_by_default, strict=True)]
    assert all(same) == (not options)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_normalization": False},
        {"enable_thresholding": False},
        {"enable_threshold_matching": False},
    ],
    ids=str,
)
def test_the_post_processors_options_do_what_they_say(fitted, rendered_mvtec, tmp_path, options):
    model = tiny_cfa(post_processor=PostProcessor(**options))
    run = engine(tmp_path)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    ours, plain = (
        torch.cat([batch.pred_score for batch in run.predict(subject, datamodule=mvtec(rendered_mvtec))])
        for subject in (model, fitted[0])
    )
    if not options.get("enable_normalization", True):
        assert ours.max() > 1
    elif not options.get("enable_thresholding", True):
        assert (ours.min(), ours.max()) == (0, 1)  # the validation images' range, with no threshold in the middle
    else:
        assert torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", "as it is"])
def test_an_evaluator_of_ones_own_gives_its_metrics(fitted, rendered_mvtec, tmp_path, where):
    metrics = [AUROC(["pred_score", "gt_label"], "mine_"), F1Score(["pred_label", "gt_label"], "mine_")]
    model = Cfa(visualizer=False, evaluator=Evaluator(test_metrics=metrics, compute_on_cpu=where == "cpu"))
    found = engine(tmp_path).test(
        model, datamodule=mvtec(rendered_mvtec), ckpt_path=fitted[1].best_model_path, verbose=False
    )
    expected = engine(tmp_path).test(fitted[0], datamodule=mvtec(rendered_mvtec), verbose=False)[0]
    assert found == [{"mine_AUROC": expected["image_AUROC"], "mine_F1Score": expected["image_F1Score"]}]


@pytest.mark.parametrize("post_processor", [False, PostProcessor(enable_thresholding=False)])
def test_without_labels_all_other_metrics_remain(rendered_mvtec, tmp_path, post_processor):
    run = engine(tmp_path)
    [metrics] = run.train(tiny_cfa(post_processor=post_processor), datamodule=mvtec(rendered_mvtec))
    assert {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"} <= set(metrics)


def test_without_components_there_are_bare_scores(rendered_mvtec, tmp_path):
    model = tiny_cfa(evaluator=False, post_processor=False)
    run = engine(tmp_path)
    run.fit(model, datamodule=mvtec(rendered_mvtec))
    assert run.test(model, datamodule=mvtec(rendered_mvtec), verbose=False) == [{}]
    assert all(batch.pred_label is None for batch in run.predict(model, datamodule=mvtec(rendered_mvtec)))
