"""Broken, foreign and malicious checkpoints and weights: a clear error or a finite score, and no code is run."""

import io
import json
import pickle
import random
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import FOLDER
from mutation import mutated
from soak import cases, count
from tiny import noise, tiny_cfa

from anomalib_cfa import Cfa
from anomalib_cfa.features.weights import read_weights

CHECKPOINT = max(FOLDER.glob("*.ckpt"))
IMAGE = noise(1, 64, 64)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Where the next hostile file goes."""
    return tmp_path_factory.mktemp("hostile") / "model.ckpt"


@torch.no_grad()
def loads_and_scores(path: Path) -> str | None:
    """Load a checkpoint and score an image: None if all went well, and the score is finite, or the error's message."""
    try:
        model = Cfa.load_from_checkpoint(path, map_location="cpu").eval()
        found = model(IMAGE)
    except Exception as error:
        return f"{type(error).__name__}: {error}"  # torch's may be no more than an EOFError
    assert found.pred_score.isfinite().all()
    assert found.anomaly_map.isfinite().all()
    return None


def rezipped(data: bytes, seed: int) -> bytes:
    """One member of a torch file changed, and the check sums put right: as one who tampers would do it."""
    dice = random.Random(seed)
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = dice.choice([name for name in names if name.endswith("data.pkl")] + [dice.choice(names)])
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(name, mutated(source.read(name), seed) if name == chosen else source.read(name))
    return target.getvalue()


@pytest.mark.parametrize("how", [mutated, rezipped])
def test_a_mutated_checkpoint_is_refused_or_scores_finitely(file, how):
    whole, outcomes = CHECKPOINT.read_bytes(), {"refused": 0, "scored": 0}
    for seed in range(count(quick=30, soak=1000)):
        file.write_bytes(how(whole, seed))
        outcomes["scored" if loads_and_scores(file) is None else "refused"] += 1
    assert outcomes["refused"] > 0
    print(f"{how.__name__}: {outcomes}")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"<html></html>", b"\x89PNG\r\n\x1a\n"])
def test_a_file_of_something_else_is_refused(file, content):
    file.write_bytes(content)
    assert loads_and_scores(file)


TAMPERS = {
    "nan": lambda value: value.float().index_fill_(-1, torch.tensor([0]), torch.nan),
    "infinite": lambda value: value.float().index_fill_(-1, torch.tensor([0]), torch.inf),
    "fewer": lambda value: value[1:],
    "more": lambda value: torch.cat([value, value]),
    "flat": lambda value: value.flatten(),
    "deeper": lambda value: value[None],
    "empty": lambda value: value[:0],
    "zero": torch.zeros_like,
    "negative": lambda value: value.logical_not() if value.dtype == torch.bool else -value,
    "integer": lambda value: value.long(),
    "double": lambda value: value.double(),
    "half": lambda value: value.half(),
    "complex": lambda value: torch.complex(value.float(), value.float()),
    "sparse": lambda value: value.to_sparse(),
    "number": lambda value: 1.0,
    "text": lambda value: "text",
    "none": lambda value: None,
}
WEIGHTS = [name for name in torch.load(CHECKPOINT, weights_only=True)["state_dict"] if name.startswith("model.")]


@cases(quick=30, soak=1000)
@given(name=st.sampled_from(WEIGHTS), tamper=st.sampled_from(list(TAMPERS)))
def test_a_tampered_weight_is_refused_or_scores_finitely(file, name, tamper):
    saved = torch.load(CHECKPOINT, weights_only=True)
    value = saved["state_dict"][name]
    saved["state_dict"][name] = TAMPERS[tamper](value if value.ndim else value[None])
    torch.save(saved, file)
    message = loads_and_scores(file)
    if tamper in {"nan", "infinite", "text", "none", "number", "sparse"}:
        assert message is not None
        assert name in message


@pytest.mark.parametrize("name", ["centers", "mean", "deviation"])
@pytest.mark.parametrize("tamper", ["fewer", "more", "flat", "deeper"])
def test_a_bank_whose_parts_do_not_fit_is_refused_at_loading(file, name, tamper):
    saved = torch.load(CHECKPOINT, weights_only=True)
    (key,) = [key for key in WEIGHTS if key.rsplit(".", 1)[-1] == name]
    saved["state_dict"][key] = TAMPERS[tamper](saved["state_dict"][key])
    if torch.equal(saved["state_dict"][key], torch.load(CHECKPOINT, weights_only=True)["state_dict"][key]):
        return  # a vector is flat
    torch.save(saved, file)
    with pytest.raises(ValueError, match=r"The checkpoint's .*: it is damaged"):
        Cfa.load_from_checkpoint(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@cases(quick=30, soak=1000)
@given(data=st.data())
def test_a_checkpoint_with_other_contents_is_refused_or_scores_finitely(file, data):
    saved = torch.load(CHECKPOINT, weights_only=True)
    branch = data.draw(st.sampled_from([saved, saved["hyper_parameters"], saved["state_dict"]]))
    name = data.draw(st.sampled_from([key for key in branch if key not in {"image_size", "gamma_d"}]))
    if data.draw(st.booleans()):
        del branch[name]
    else:
        branch[name] = data.draw(JSON)
    torch.save(saved, file)
    loads_and_scores(file)


class Malicious:
    """Pickles as a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code was run")


def malicious_checkpoint(place: str, path: Path, file: Path) -> Path:
    saved = torch.load(CHECKPOINT, weights_only=True)
    branch = saved if place == "top" else saved[place]
    branch["extra"] = Malicious(path)
    torch.save(saved, file)
    return file


@pytest.mark.parametrize("place", ["top", "state_dict", "hyper_parameters", "loops"])
@pytest.mark.parametrize("by", ["load_from_checkpoint", "fit", "test", "predict"])
def test_no_code_of_a_checkpoint_is_run(rendered_mvtec, tmp_path, file, place, by):
    from anomalib.data import MVTecAD

    trace = tmp_path / "trace"
    path = malicious_checkpoint(place, trace, file)
    if by == "load_from_checkpoint":
        load = partial(Cfa.load_from_checkpoint, path)
    else:
        datamodule = MVTecAD(rendered_mvtec, category="tile", num_workers=0)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
        load = partial(getattr(engine, by), tiny_cfa(), datamodule=datamodule, ckpt_path=path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load()
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file does what it says where it is trusted
    assert trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_no_code_of_a_weights_file_is_run(tmp_path, suffix):
    trace, path = tmp_path / "trace", tmp_path / f"weights{suffix}"
    torch.save({"conv1.weight": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="weights_path must be a file of weights"):
        tiny_cfa(pre_trained=True, weights_path=path).model.patch_features.load_weights()
    assert not trace.exists()


@pytest.mark.parametrize("variable", [None, "0"])
def test_anomalibs_pickle_is_not_opened_unless_the_user_says_so(tmp_path, monkeypatch, variable):
    from anomalib.deploy import TorchInferencer

    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRUST_REMOTE_CODE", variable)
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    torch.save({"model": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE"):
        TorchInferencer(path, device="cpu")
    assert not trace.exists()


@pytest.fixture(scope="module", params=[".pth", ".safetensors"])
def weights(request, tmp_path_factory) -> Path:
    """A file of the tiny backbone's weights."""
    from safetensors.torch import save_file

    state = tiny_cfa(seed=1).model.patch_features.network.state_dict()
    state = {name.removeprefix("model."): value.contiguous() for name, value in state.items()}
    path = tmp_path_factory.mktemp("weights") / f"whole{request.param}"
    save_file(state, path) if request.param == ".safetensors" else torch.save(state, path)
    return path


def test_a_mutated_weights_file_is_refused_or_loads_finite_weights(weights, tmp_path):
    whole, path = weights.read_bytes(), tmp_path / f"weights{weights.suffix}"
    for seed in range(count(quick=30, soak=500)):
        path.write_bytes((rezipped if weights.suffix == ".pth" and seed % 2 else mutated)(whole, seed))
        features = tiny_cfa(pre_trained=True, weights_path=path).model.patch_features
        try:
            features.load_weights()
        except ValueError as error:
            assert str(path) in str(error) or "backbone" in str(error)
        assert all(value.isfinite().all() for value in features.state_dict().values())


@cases(quick=30, soak=500)
@given(tamper=st.sampled_from(list(TAMPERS)), place=st.integers(0, 1000))
def test_tampered_weights_are_refused_or_finite(tmp_path_factory, tamper, place):
    path = tmp_path_factory.getbasetemp() / "tampered.pth"
    state = {
        name.removeprefix("model."): value
        for name, value in tiny_cfa(seed=1).model.patch_features.network.state_dict().items()
    }
    name = list(state)[place % len(state)]
    state[name] = TAMPERS[tamper](state[name] if state[name].ndim else state[name][None])
    torch.save(state, path)
    features = tiny_cfa(pre_trained=True, weights_path=path).model.patch_features
    try:
        features.load_weights()
    except ValueError as error:
        assert str(path) in str(error)
    assert all(value.isfinite().all() for value in features.state_dict().values())


def test_headers_of_safetensors_that_lie_about_sizes_are_refused(tmp_path):
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="cannot be read as one"):
        read_weights(path)
