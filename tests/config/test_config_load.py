"""Reading configurations: published files, defaults, overrides, and everything wrong at once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sanctl.config.load import (
    LoadedConfig,
    config_to_yaml,
    load_config,
    parse_config,
    resolve_config,
)
from sanctl.config.schema import KEYS, Config
from sanctl.errors import UserError

HERE = Path(__file__).parent
SMALL = "DATA:\n  data_root: data\n  classes: 10\nTRAIN:\n  model: resnet26\n"


def load(tmp_path: Path, text: str, *overrides: str) -> LoadedConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return [line.replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]


def test_published_imagenet_file() -> None:
    loaded = load_config(HERE / "original_imagenet_san.yaml")
    data, train = loaded.config.DATA, loaded.config.TRAIN
    assert (data.dataset_init, data.classes, data.in_chans) == ("image_folder", 1000, 3)
    assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (data.image_size, data.resize) == (224, 256)
    assert (train.arch, train.sa_type, train.kernels) == ("san", 0, [3, 7, 7, 7, 7])
    assert (train.mixup_alpha, train.manual_seed, train.weight, train.resume) == (
        0,
        None,
        None,
        None,
    )
    assert train.train_gpu == list(range(8))
    assert loaded.config.Distributed.multiprocessing_distributed
    assert loaded.config.TEST.use_val_set
    assert loaded.run_dir == Path("exp/imagenet/san10_pairwise")
    assert loaded.notes == []


def test_published_mnist_file() -> None:
    path = HERE / "original_mnist_resnet.yaml"
    loaded = load_config(path)
    assert loaded.config.DATA.in_chans == 1
    assert (loaded.config.TRAIN.base_lr, loaded.config.TRAIN.weight_decay) == (0.1, 1e-4)
    assert loaded.config.TRAIN.scheduler == "step"
    assert loaded.config.TRAIN.widths is None
    assert [note.split(" has no effect")[0] for note in loaded.notes] == [
        f"{path}:13: TRAIN.widths",
        f"{path}:8: DATA.split",
        f"{path}:9: DATA.split_ratio",
    ]


def test_published_hybrid_file_without_arch() -> None:
    loaded = load_config(HERE / "original_sketch_hybrid.yaml")
    assert loaded.config.TRAIN.arch == "hybrid"
    assert loaded.config.TRAIN.added_nl_blocks == [0, 1, 2, 0]
    # The published code fed such files' networks three equal channels and one mean.
    assert loaded.config.DATA.in_chans == 3
    assert loaded.config.DATA.mean == [0.1307]
    assert loaded.config.TRAIN.weight == "exp/imagenet/hybrid_patch_2-2_nl/model/model_best.pth"
    assert len(loaded.notes) == 2
    assert "TRAIN.time_breakdown has no effect" in loaded.notes[0]
    assert "DATA.mean has one value" in loaded.notes[1]


def test_defaults_and_their_origins(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMALL)
    assert set(loaded.origins) == set(KEYS)
    assert loaded.origins["DATA.classes"] == f"{tmp_path}/x.yaml:3"
    assert loaded.origins["TRAIN.epochs"] == "default"
    assert loaded.config.TRAIN.epochs == 100
    assert loaded.config.TRAIN.label_smoothing == 0.0
    assert not loaded.config.DATA.grayscale


def test_overrides_win_and_are_recorded(tmp_path: Path) -> None:
    text = SMALL + "  epochs: 7\n  base_lr: 0.5\n"
    loaded = load(tmp_path, text, "TRAIN.epochs=3", "TRAIN.step_epochs=[1, 2]", "TRAIN.base_lr=")
    assert loaded.config.TRAIN.epochs == 3
    assert loaded.config.TRAIN.step_epochs == [1, 2]
    assert loaded.config.TRAIN.base_lr == 0.1
    assert loaded.origins["TRAIN.epochs"] == "override"
    assert loaded.origins["TRAIN.base_lr"] == "default"


@pytest.mark.parametrize(
    ("keys", "mean", "resize"),
    [
        ("grayscale: true", [0.1307], 256),
        ("channels: 1", [0.1307], 256),
        ("channels: 3", [0.485, 0.456, 0.406], 256),
        ("grayscale: true, mean: 0.5", [0.5], 256),
        ("image_size: 64", [0.485, 0.456, 0.406], 73),
        ("image_size: 64, resize: 64", [0.485, 0.456, 0.406], 64),
        ("mean: , resize: ", [0.485, 0.456, 0.406], 256),
    ],
)
def test_defaults_that_follow_other_keys(
    tmp_path: Path, keys: str, mean: list[float], resize: int
) -> None:
    text = f"DATA: {{data_root: data, classes: 10, {keys}}}\nTRAIN: {{model: resnet26}}\n"
    data = load(tmp_path, text).config.DATA
    assert (data.mean, data.resize) == (mean, resize)
    assert data.grayscale == (data.in_chans == 1)


@pytest.mark.parametrize(
    ("path", "run_dir"),
    [
        ("exp/a/b/model", "exp/a/b"),
        ("exp/a/b/model/", "exp/a/b"),
        ("exp/a/b", "exp/a/b"),
        ("exp/model/b", "exp/model/b"),
    ],
)
def test_run_folder(tmp_path: Path, path: str, run_dir: str) -> None:
    assert load(tmp_path, SMALL, f"TRAIN.save_path={path}").run_dir == Path(run_dir)


def test_run_folder_by_dataset_and_name(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    path = tmp_path / "birds" / "birds_small_net.yaml"
    path.write_text(SMALL)
    loaded = resolve_config("birds", "small_net", root=tmp_path)
    assert (loaded.path, loaded.dataset, loaded.name) == (path, "birds", "small_net")
    assert loaded.run_dir == Path("exp/birds/small_net")
    assert load(tmp_path, SMALL).run_dir == Path("exp/data/x")


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = """\
DATA:
  data_root: data
  clases: 10
  mean: [0.1, 0.2]
TRIAN:
  epochs: 3
TRAIN:
  epoch: 3
  classes: 10
  model: resnet26
  epochs: ten
  kernels: [3, x]
  evaluate: 1
  scheduler: linear
  label_smoothing: 1.0
  base_lr: .nan
  frobnicate: 1
TEST: 3
workers: 4
"""
    assert problems(tmp_path, text, "TRAIN.batch_size=0", "TRAIN.bach_size=3") == [
        "x.yaml:3: DATA.clases: unknown key, did you mean DATA.classes?",
        "x.yaml:4: DATA.mean: 2 values for 3 channel(s)",
        "x.yaml:5: TRIAN: unknown section, did you mean TRAIN?",
        "x.yaml:8: TRAIN.epoch: unknown key, did you mean TRAIN.epochs?",
        "x.yaml:9: TRAIN.classes: unknown key, did you mean DATA.classes?",
        "x.yaml:11: TRAIN.epochs: expected a whole number, got 'ten'",
        "x.yaml:12: TRAIN.kernels[1]: expected a whole number, got 'x'",
        "x.yaml:13: TRAIN.evaluate: expected true or false, got 1",
        "x.yaml:14: TRAIN.scheduler: expected one of 'step' or 'cosine', got 'linear'",
        "x.yaml:15: TRAIN.label_smoothing: expected less than 1, got 1.0",
        "x.yaml:16: TRAIN.base_lr: expected a finite number, got nan",
        "x.yaml:17: TRAIN.frobnicate: unknown key",
        "x.yaml:18: TEST: expected keys below it, got 3",
        "x.yaml:19: workers: unknown section, did you mean TRAIN.workers?",
        "override: TRAIN.bach_size: unknown key, did you mean TRAIN.batch_size?",
        "x.yaml: DATA.classes: missing, and it has no default",
        "override: TRAIN.batch_size: expected at least 1, got 0",
    ]


SAN = "arch: san, sa_type: 0, layers: [1, 1, 1, 1, 1]"
HYBRID = "arch: hybrid, sa_type: 0, layers: [1, 1], layer_types: [res, san], widths: [256, 512]"


@pytest.mark.parametrize(
    ("data", "train", "message"),
    [
        ("", "epochs: 3", "x.yaml: TRAIN.arch: no network: set TRAIN.model"),
        ("", "arch: san, sa_type: 0", "TRAIN.layers: missing, arch san needs it"),
        ("", "arch: hybrid, layers: [1]", "TRAIN.layer_types: missing, arch hybrid needs it"),
        ("", f"{SAN}, kernels: [3, 7]", "TRAIN.kernels: 2 values, but TRAIN.layers has 5 stages"),
        ("", f"{SAN}, widths: [64]", "TRAIN.widths: 1 values, but TRAIN.layers has 5 stages"),
        ("", f"{SAN}, kernels: [3, 3, 4, 3, 3]", "TRAIN.kernels: must be odd"),
        ("", f"{HYBRID}, added_nl_blocks: [0]", "TRAIN.added_nl_blocks: 1 values, but"),
        ("", HYBRID.replace("res, san", "res"), "TRAIN.layer_types: 1 values, but"),
        ("", HYBRID.replace("san]", "sam]"), "TRAIN.layer_types[1]: expected one of"),
        (", channels: 3, grayscale: true", SAN, "DATA.channels: 3, but DATA.grayscale is true"),
        (", grayscale: true, mean: [1, 2, 3]", SAN, "DATA.mean: 3 values for 1 channel(s)"),
        (", std: [1, 0, 1]", SAN, "DATA.std: must be more than 0"),
        (", resize: 200", SAN, "DATA.resize: 200 px is less than DATA.image_size, 224 px"),
        (", channels: 4", SAN, "DATA.channels: expected one of 1 or 3, got 4"),
        (", dataset_init: folder", SAN, "DATA.dataset_init: expected one of 'image_folder',"),
        (", data_name: 3", SAN, "DATA.data_name: expected text (put it in quotes), got 3"),
        ("", f"{SAN}, ignore_label: 9", "TRAIN.ignore_label: 9 is one of the 10 classes"),
        ("", f"{SAN}, epochs: 5, warmup_epochs: 5", "TRAIN.warmup_epochs: 5 must be less than"),
        ("", f"{SAN}, epochs: 5, start_epoch: 9", "TRAIN.start_epoch: 9 must be less than"),
        ("", f"{SAN}, step_epochs: [3, 2]", "TRAIN.step_epochs: must rise"),
        ("", f"{SAN}, step_epochs: 3", "TRAIN.step_epochs: expected a list, got 3"),
        ("", f"{SAN}, batch_size: 4, accumulate: 8", "TRAIN.accumulate: 8 parts of a batch of 4"),
        ("", f"{SAN}, base_lr: 0", "TRAIN.base_lr: expected more than 0, got 0"),
        ("", f"{SAN}, base_lr: fast", "TRAIN.base_lr: expected a number, got 'fast'"),
        ("", f"{SAN}, momentum: true", "TRAIN.momentum: expected a number, got True"),
        ("", f"{SAN}, epochs: 2.5", "TRAIN.epochs: expected a whole number, got 2.5"),
        ("", f"{SAN}, epochs: true", "TRAIN.epochs: expected a whole number, got True"),
        ("", f"{SAN}, amp: 'true'", "TRAIN.amp: expected true or false, got 'true'"),
    ],
)
def test_wrong_values(tmp_path: Path, data: str, train: str, message: str) -> None:
    text = f"DATA: {{data_root: data, classes: 10{data}}}\nTRAIN: {{{train}}}\n"
    assert any(message in line for line in problems(tmp_path, text))


def test_two_classes_at_least(tmp_path: Path) -> None:
    assert problems(tmp_path, SMALL, "DATA.classes=1") == [
        "override: DATA.classes: expected at least 2, got 1"
    ]


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    train = load(tmp_path, SMALL, "TRAIN.weight_decay=1e-4", "TRAIN.base_lr=1").config.TRAIN
    assert (train.weight_decay, train.base_lr) == (1e-4, 1.0)


def test_one_gpu_needs_no_list(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL, "TRAIN.train_gpu=2").config.TRAIN.train_gpu == [2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("TRAIN.epochs", "override TRAIN.epochs: expected KEY=VALUE, e.g. TRAIN.epochs=3"),
        ("epochs=3", "override: epochs: unknown section, did you mean TRAIN.epochs?"),
        ("TRAIN=3", "override: TRAIN: unknown section, did you mean TRAIN?"),
        ("TRAIN.kernels=[3", "override TRAIN.kernels=[3:1: not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    assert problems(tmp_path, SMALL, override)[0].startswith(message)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such file; `sanctl config list` .* `sanctl config new`"
    ):
        load_config(tmp_path / "none.yaml")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.yaml: not a text file"):
        load_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_preset_where_there_is_no_file(tmp_path: Path) -> None:
    loaded = resolve_config("mnist", "resnet26", ["TRAIN.epochs=4"], root=tmp_path)
    assert loaded.path is None
    assert loaded.origins["DATA.classes"] == "preset mnist"
    assert loaded.origins["TRAIN.arch"] == "preset resnet26"
    assert loaded.origins["TRAIN.momentum"] == "preset base"
    assert loaded.origins["TRAIN.epochs"] == "override"
    assert loaded.notes == [
        f"{tmp_path}/mnist/mnist_resnet26.yaml does not exist, so the preset mnist resnet26 is used"
        " (`sanctl config new mnist resnet26` writes the file)"
    ]


@pytest.mark.parametrize(
    ("dataset", "name", "message"),
    [
        ("mnits", "resnet26", "no preset for the dataset mnits, did you mean mnist?"),
        ("mnist", "resnet62", "no preset for the model resnet62, did you mean resnet26?"),
        ("birds", "resnet26", "`sanctl config new birds resnet26` writes one"),
        ("mnist", "qqq", "`sanctl config list` shows the presets"),
    ],
)
def test_neither_file_nor_preset(tmp_path: Path, dataset: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config(dataset, name, root=tmp_path)
    assert message in str(caught.value)


def test_config_inside_a_checkpoint(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL).config
    assert parse_config(config.model_dump(), "best.pth") == config
    with pytest.raises(UserError, match=r"best\.pth: TRAIN\.epoch: unknown key"):
        parse_config({"DATA": config.DATA.model_dump(), "TRAIN": {"epoch": 1}}, "best.pth")
    with pytest.raises(UserError, match=r"best\.pth: expected sections"):
        parse_config([1, 2], "best.pth")  # type: ignore[arg-type]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
patient = settings(suppress_health_check=[HealthCheck.too_slow])


@patient
@given(st.dictionaries(st.sampled_from(KEYS), plain, max_size=8))
def test_any_values_are_taken_or_refused(values: dict[str, Any]) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        config = parse_config(sections, "any")
    except UserError:
        return
    assert parse_config(config.model_dump(), "again") == config


texts = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable())
rates = st.floats(min_value=1e-12, max_value=1e6)


@patient
@given(
    data=st.fixed_dictionaries(
        {"data_root": texts, "classes": st.integers(2, 10**6)},
        optional={
            "data_name": texts,
            "grayscale": st.booleans(),
            "image_size": st.integers(1, 2000),
            "mean": st.lists(rates, min_size=1, max_size=1),
        },
    ),
    train=st.fixed_dictionaries(
        {"model": texts, "base_lr": rates},
        optional={
            "weight": texts,
            "manual_seed": st.integers(0, 2**40),
            "train_gpu": st.lists(st.integers(0, 9), max_size=3),
            "weight_decay": rates,
            "amp": st.booleans(),
        },
    ),
)
def test_dump_loads_again_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], train: dict[str, Any]
) -> None:
    config = parse_config({"DATA": data, "TRAIN": train}, "drawn")
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    loaded = load_config(path, [] if config.TRAIN.save_path else ["TRAIN.save_path="])
    assert without_save_path(loaded.config) == without_save_path(config)


def without_save_path(config: Config) -> dict[str, Any]:
    dump = config.model_dump()
    del dump["TRAIN"]["save_path"]
    return dump
