"""Heads that start from canonical correlation analysis: the maps against scipy's eigenvectors, and a run with them."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch

import clip
import main
from config import Config, parse_config, rules
from embedding import project_and_normalize
from evaluation.retrieval import recall
from modules import ProjectionHead
from training.cca import canonical_maps, start_from_cca
from utils.errors import UserError

CPU = torch.device("cpu")


def paired(n, d_x, d_y, captions=1, seed=0):
    """n rows X, (n, d_x), with noisy mixtures of each, (m, d_y), and the rows of these; both with mean 0.

    captions: how many mixtures each row has; several numbers are taken in turn.
    """
    torch.manual_seed(seed)
    X, row = torch.randn(n, d_x), torch.arange(n).repeat_interleave(torch.from_numpy(np.resize(captions, n)))
    Y = X[row] @ torch.randn(d_x, d_y) / d_x**0.5 + 0.5 * torch.randn(len(row), d_y)
    return X - X.mean(0), Y - Y.mean(0), row


@pytest.mark.parametrize("captions, ridges", [(1, (0.0, 0.0)), (1, (1.0, 0.3)), (3, (1.0, 0.3)), ((1, 4), (0.0, 0.0))])
def test_maps_are_those_of_the_generalised_eigenvalue_problem(captions, ridges):
    """[0 C_xy; C_yx 0] v = rho [C_x + r_x 0; 0 C_y + r_y] v, whose largest rho are the (ridge) correlations."""
    X, Y, row = paired(200, 5, 4, captions)
    A, B = (W.numpy() for W in canonical_maps(X, Y, row, 3, ridges))
    x, y = X.double().numpy(), Y.double().numpy()
    C_x, C_y, C_xy = x[row].T @ x[row] / len(y), y.T @ y / len(y), x[row].T @ y / len(y)
    C_x, C_y = C_x + ridges[0] * np.eye(5), C_y + ridges[1] * np.eye(4)
    cross = np.block([[np.zeros((5, 5)), C_xy], [C_xy.T, np.zeros((4, 4))]])
    values, vectors = scipy.linalg.eigh(cross, scipy.linalg.block_diag(C_x, C_y))
    rho = values[::-1][:3]
    np.testing.assert_allclose(np.diag(A.T @ C_x @ A), rho**2, rtol=1e-6)  # each direction has the length of its correlation
    np.testing.assert_allclose(np.diag(A.T @ C_xy @ B), rho**3, rtol=1e-6)
    expected = vectors[:, ::-1][:, :3]
    for i in range(3):
        for found, reference in ((A[:, i], expected[:5, i]), (B[:, i], expected[5:, i])):
            cosine = found @ reference / np.linalg.norm(found) / np.linalg.norm(reference)
            assert abs(cosine) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("width, images", [(6, 100), (10, 100), (6, 5)])
def test_heads_retrieve_before_the_first_step(width, images):
    """Also where there are fewer directions than rows: those that are left hardly change a cosine, and can learn."""
    X, Y, row = paired(images, 8, 6, captions=2)
    directions = min(width, 6, images - 1)
    model = torch.nn.Module()
    model.image_projection, model.text_projection = ProjectionHead(8, width).eval(), ProjectionHead(6, width).eval()

    def rsum():
        I_e = project_and_normalize(model.image_projection, X * 3 + 5, CPU)
        T_e = project_and_normalize(model.text_projection, Y, CPU)
        return recall((T_e @ I_e.T).numpy(), row.numpy())["rsum"]

    model.image_projection.standardize(X * 3 + 5)
    model.text_projection.standardize(Y)
    before = rsum()
    start_from_cca(model, X * 3 + 5, Y, row)
    assert before < rsum() and (images == 5 or before < 100 < 300 < rsum())
    W_i, W_t = model.image_projection.projection.weight, model.text_projection.projection.weight
    for W in (W_i, W_t):
        assert W[:directions].norm().item() == pytest.approx((width / 3) ** 0.5, rel=1e-5)
    if directions < width:
        assert not W_i[directions:].any() and 0 < W_t[directions:].abs().max() < 0.01


def test_a_run_from_cca_with_a_hidden_layer_is_saved_and_loaded(small_flags, tmp_path):
    settings = {"freeze": "both", "cached_crops": 2, "epochs": 1, "head_lr": 2e-3, "hidden_width": 24}
    flags = small_flags("random", **settings), small_flags("cca", **settings, head_init="cca")
    _, model = (main.train(parse_config(given, "shapes")[0]) for given in flags)
    first = [pd.read_csv(tmp_path / name / "history.csv")["loss"][0] for name in ("random", "cca")]
    assert first[1] < first[0]
    assert model.image_projection.hidden[-1].weight.any()  # 0 before training
    loaded, _ = clip.load(tmp_path / "cca", device="cpu")
    features = torch.randn(3, model.image_encoder.width)
    torch.testing.assert_close(loaded.image_projection(features), model.image_projection.eval()(features))
    tuned = clip.create_model(Config(model=str(tmp_path / "cca"), dropout=0.3, image_feature_dropout=0.2), [])
    assert [tuned.image_projection.hidden[2].p, tuned.image_projection.feature_dropout.p] == [0.3, 0.2]


def test_the_defaults_are_those_that_suit_the_start():
    epochs_and_rates = {}
    for name, flags in {"random": ["--head-init", "random"], "cca": []}.items():
        config = parse_config(["fast", "--epochs", "0", *flags], "shapes")[0]
        epochs_and_rates[name] = config.epochs, config.head_lr
    assert epochs_and_rates == {"random": (60, 5e-3), "cca": (30, 2e-3)}


@pytest.mark.parametrize("flags", [["shapes"], ["fast", "--freeze", "none", "--image-weights", "random"], ["open_clip"]])
def test_it_needs_new_heads_on_frozen_encoders(flags):
    with pytest.raises(UserError, match="--head-init cca: is for new heads on frozen pretrained encoders"):
        parse_config([*flags, "--head-init", "cca"], "shapes")


@pytest.mark.parametrize("flags", [{"hidden_width": 8}, {"head_init": "cca"}])
def test_they_need_heads(flags):
    messages = [message for broken, message in rules(Config(freeze="both", num_projection_layers=0, **flags)) if broken]
    assert messages[-1:] == [
        "--hidden-width, --head-init cca: are for heads, and --num-projection-layers 0 has none; leave one out"
    ]


def features(kind, n=50, d=6):
    """(n, d) features, some or all of which do not vary; or vary by what rounding leaves."""
    torch.manual_seed(1)
    X = torch.randn(n, d)
    if kind == "one constant":
        X[:, 2] = 7.0
    if kind == "all constant":
        X[:] = X[0]
    if kind == "equal but for rounding":
        X = X[0] * (1 + 1e-7 * torch.randn(n, 1))
    return X[:1] if kind == "one row" else X


@pytest.mark.parametrize("kind", ["one constant", "all constant", "equal but for rounding", "one row"])
def test_features_that_do_not_vary_are_not_divided_by_0(kind):
    head, X = ProjectionHead(6, 4).eval(), features(kind)
    head.standardize(X)
    standardised = (X - head.mean) / head.std
    assert standardised.isfinite().all() and standardised.abs().max() < 10
    assert head(X + 0.1).isfinite().all()
    if kind == "one constant":
        assert standardised.std(dim=0)[[0, 1, 3, 4, 5]].numpy() == pytest.approx(1) and not standardised[:, 2].any()
    else:
        assert head.std.tolist() == [1.0] * 6


@pytest.mark.parametrize("kinds", [("all constant", "varied"), ("varied", "all constant"), ("all constant", "all constant")])
def test_heads_stay_random_where_nothing_correlates(kinds, capsys):
    model = torch.nn.Module()
    model.image_projection, model.text_projection = ProjectionHead(6, 4), ProjectionHead(6, 4)
    X, Y = map(features, kinds)
    heads = [model.image_projection, model.text_projection]
    before = [head.projection.weight.clone() for head in heads]
    for head, rows in zip(heads, (X, Y)):
        head.standardize(rows)
    start_from_cca(model, X, Y, torch.arange(len(X)))
    assert all(torch.equal(head.projection.weight, weight) for head, weight in zip(heads, before))
    assert "nothing correlates" in capsys.readouterr().out


@pytest.mark.parametrize("head_init", ["cca", "random"])
def test_a_run_on_equal_captions_ends_with_finite_weights(sample, small_flags, tmp_path, head_init):
    shutil.copytree(sample, tmp_path / "equal")
    rows = pd.read_csv(tmp_path / "equal" / "captions.txt")
    rows.assign(caption="A red circle .").to_csv(tmp_path / "equal" / "captions.txt", index=False)
    flags = {"data_dir": tmp_path / "equal", "freeze": "both", "head_init": head_init, "head_lr": 1e-3, "epochs": 1}
    model = main.train(parse_config(small_flags(**flags, cached_crops=1), "shapes")[0])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert pd.read_csv(tmp_path / "run" / "history.csv")[["loss", "val_loss", "rsum"]].notna().all(axis=None)
