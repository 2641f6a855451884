import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan
import plots
import report
import summary
from stopwatch import alternate

pytestmark = pytest.mark.filterwarnings("error")


def _row(part, label, side="ours", number=0, kind="fit", settings=None, **result):
    shared = {"part": part, "label": label, "side": side, "round": number, "kind": kind}
    return {**shared, "settings": settings or {}, "result": result}


def _fit(steps, total=100.0, peak=2**30):
    return {"steps_s": steps, "total_s": total, "peak_bytes": peak}


def _training_rows():
    whole = {"batch_size": 32, "image_count": 320, "epochs": 2}
    return [
        _row("training", "first time, batch 32", **_fit([9.0, 2.0, 2.0])),
        _row("training", "first time, batch 32", "anomalib", **_fit([30.0, 10.0, 10.0], 90.0, 4 * 2**30)),
        _row("training", "kept, batch 32", settings=whole, **_fit([5.0, 1.0, 1.0], 20.0)),
        _row("training", "all defaults, batch 32", **_fit([1.0], 10.0)),
    ]


def _growth_rows():
    sizes = (128, 256)
    ours = [
        _row("growth", "training, ivf, batch 1", settings={"size": size}, **_fit([1.0, 1e-6 * size**3]))
        for size in sizes
    ]
    theirs = _row("growth", "training, batch 1", "anomalib", settings={"size": 128}, **_fit([1.0, 2.0]))
    not_run = _row("growth", "training, batch 1", "anomalib", settings={"size": 256}, not_run="too much for it")
    return [*ours, theirs, not_run]


def _recall_rows():
    kinds = {kind: {"recall": 0.9, "seconds": 0.1, "index_s": 1.0} for kind in plan.SEARCH_KINDS}
    return [_row("recall", "trained", kind="recall", kinds=kinds, queries=2048, centers=1024)]


def _content(rows):
    settings = {"weights_path": None, "images": None, "quick": True, "threads": 2}
    environment = {"machine": {"processor": "one"}, "versions": {"torch": "2"}}
    return {"settings": settings, "environment": environment, "rows": rows}


def test_an_exponent_is_that_of_the_power_law():
    assert summary.exponent([1, 2, 4, 8], [3 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_a_fit_that_was_cut_off_is_extrapolated_from_its_median_step_after_the_first():
    result = _fit([30.0, 10.0, 10.0], total=90.0)
    assert summary.whole_fit_seconds(result, batch_size=32, images=320, epochs=2) == 40 + 20 * 10


def test_a_ratio_is_the_median_of_those_of_neighbouring_runs():
    (line,) = summary.compare("step", [1.0, 2.0, 4.0], [10.0, 40.0, 4.0], "s", ">= 3")
    assert (line.ours, line.anomalib, line.ratio) == (2.0, 10.0, 10.0)
    assert line.is_met


def test_nothing_is_compared_where_a_side_has_no_figure():
    assert summary.compare("step", [1.0], [], "s", ">= 3") == []


def test_a_run_that_failed_or_was_left_out_holds_no_figure():
    rows = [_row("growth", "a", error="it fell"), _row("growth", "a", not_run="too large"), _row("growth", "a", 1)]
    assert summary.find(rows, "growth", "a") == []


@pytest.mark.parametrize(
    ("name", "ratio", "met"),
    [
        ("training step, batch 32, images seen for the first time", 5, True),
        ("training step, batch 32, features kept", 10, True),
        ("whole fit, batch 32, 2 epochs of 320 images (anomalib's extrapolated)", 12, True),
        ("peak memory of that fit, batch 32", 4, True),
    ],
)
def test_training_is_judged_against_anomalib_s_steps(name, ratio, met):
    lines = {line.name: line for line in summary.comparisons(_training_rows())}
    assert lines[name].ratio == pytest.approx(ratio)
    assert lines[name].is_met is met


def test_an_inertia_above_anomalib_s_misses_its_target():
    rows = [
        _row("k_means", "K-means", side, seconds=seconds, inertia=inertia)
        for side, seconds, inertia in (("ours", 1.0, 1.01), ("anomalib", 11.0, 1.0))
    ]
    seconds, inertia = summary.comparisons(rows)
    assert seconds.is_met
    assert not inertia.is_met


@pytest.mark.parametrize("gamma_c", [1, 4])
def test_inference_is_bounded_by_its_backbone_at_the_default_gamma_c_only(gamma_c):
    label = f"resnet18, 256 x 256, gamma_c = {gamma_c}"
    rows = [_row("inference", label, side, whole_s=0.08, backbone_s=0.05) for side in plan.SIDES]
    against, share = summary.comparisons(rows)
    assert against.ratio == 1
    assert not against.is_met
    assert share.ratio == pytest.approx(1.6)
    assert (share.target == "<= 1.5") is (gamma_c == 4)


def test_one_distance_matrix_at_1024_pixels_and_batch_4_takes_anomalib_64_gib():
    assert summary.distance_matrix_bytes(4, 1024) == 64 * 2**30


def test_the_report_names_what_was_not_run_and_what_failed():
    rows = [*_training_rows(), *_growth_rows(), *_recall_rows(), _row("inference", "broken", error="it fell")]
    text = report.markdown(_content(rows))
    assert "not run: too much for it" in text
    assert "inference: broken (ours): it fell" in text
    assert "| 1.50 | 1.50 |" in text  # size**3 is patches**1.5


def test_an_interrupted_benchmark_still_has_a_report(tmp_path):
    assert report.markdown(_content([])).startswith("# Speed and memory")
    assert plots.draw(_content([]), tmp_path) == []


def test_pictures_are_drawn(tmp_path):
    pictures = plots.draw(_content([*_growth_rows(), *_recall_rows()]), tmp_path)
    assert [picture.name for picture in pictures] == ["growth.png", "recall.png"]
    assert all(picture.stat().st_size > 1000 for picture in pictures)


@pytest.mark.parametrize("value", [(1234.0, "1234"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")])
def test_a_figure_has_three_significant_digits(value):
    assert report.figure(value[0]) == value[1]


@pytest.mark.parametrize("scale", [plan.QUICK, plan.FULL])
@pytest.mark.parametrize("part", plan.PARTS)
def test_a_part_reads_only_what_it_has_left_itself(part, scale):
    left = set()
    for one in plan.PARTS[part](scale):
        if one.kind == "fit":
            left |= {one.settings.get("state"), one.settings.get("untrained")}
        else:
            assert one.settings["state"] in left


def test_sides_take_turns():
    timed = [one.side for one in plan.inference(plan.FULL) if one.kind == "inference"]
    assert timed == ["ours", "anomalib", "ours"] * (len(timed) // 3)  # the last with its default layers


def test_calls_are_made_in_turn_and_the_warm_up_is_not_timed():
    made = []
    seconds = alternate([lambda: made.append("a"), lambda: made.append("b")], repeats=2, warm_up=1)
    assert "".join(made) == "ababab"
    assert [len(times) for times in seconds] == [2, 2]
