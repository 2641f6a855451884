"""A job's name and its point of the grid."""

from benchmark_jobs import TINY, section, spec_of

from anomalib_cfa.benchmark.spec import expand


def test_a_jobs_key_depends_on_all_that_the_file_says():
    keys = {spec_of().key, spec_of(seed=1).key, spec_of(category="tile").key, spec_of(gamma_d=2).key}
    assert len(keys) == 4
    assert spec_of().key == spec_of().key


def test_the_grid_shares_nothing_between_its_points():
    grid = {"grid": [{"class_path": "Cfa", "init_args": TINY}]}
    one, other = expand("cpu", section("data", model=grid, seed={"grid": [0, 1]}))
    assert one.config["model"] is not other.config["model"]
    assert TINY == {"backbone": "test_resnet.r160_in1k", "pre_trained": False, "image_size": 64}
