"""Means and correlations of a study, against direct formulas and published corrections."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from stiffcore.metrics import spell_share
from stiffcore.report.statistics import (
    PERMUTATIONS,
    _coefficients,
    benjamini_hochberg,
    compared,
    correlations,
    holm,
    mean_groups,
    spread,
)
from stiffcore.report.tables import correlations_table, mean_cells, means_table


def study(images=40, blocks=("a", "b"), seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        correct, loss = float(rng.random() < 0.7), float(rng.exponential())
        for number, block in enumerate(blocks, 1):
            rows.append(
                {
                    "image": image,
                    "number": number,
                    "block": block,
                    "label": image % 4,
                    "state": "done",
                    "certified": True,
                    "S_active": 2 + 0.5 * loss * (number == 1) + rng.normal() / 10,
                    "negative": 0.0,
                    "correct": correct,
                    "loss": loss,
                }
            )
    return pd.DataFrame(rows)


def test_means_are_over_certified_spectra_and_count_what_is_not_finite():
    rows = study()
    rows.loc[0, "certified"] = False
    rows.loc[2, "S_active"] = math.inf
    rows.loc[4, "S_active"] = math.nan
    found = spread(rows, ["number", "block"]).set_index(["block", "metric"])
    first = found.loc[("a", "S_active")]
    kept = rows[(rows["block"] == "a")]["S_active"].to_numpy()[3:]
    assert (first["images"], first["values"], first["infinite"], first["unknown"]) == (39, 37, 1, 1)
    assert first["mean"] == pytest.approx(kept.mean())
    assert first["std"] == pytest.approx(kept.std(ddof=1))
    assert (first["min"], first["median"], first["max"]) == (kept.min(), np.median(kept), kept.max())
    assert found.loc[("b", "S_active"), "values"] == 40
    by_label = spread(rows, ["label"], ["S_active"])
    assert by_label["label"].tolist() == [0, 1, 2, 3] * 2
    assert by_label["values"].sum() == 77
    assert by_label["values"].max() == 10  # blocks are not pooled


def test_the_mean_of_open_shares_is_an_interval():
    rows = study().assign(negative=0.25, negative_low=0.25, negative_high=0.25, kind="matrix", function="block")
    for name in ("zero", "abscissa", "min_re_active"):
        rows[name] = 1.0
    sure = spread(rows, ["number", "block"]).set_index(["block", "metric"]).loc[("a", "negative")]
    assert (sure["mean_low"], sure["mean"], sure["mean_high"]) == (0.25, 0.25, 0.25)
    assert mean_cells(rows)[1] == "25 (0)"
    rows.loc[rows["image"] == 3, ["negative_low", "negative_high"]] = 0.0, 0.65
    rows.loc[rows["image"] == 4, "certified"] = False
    found = spread(rows, ["number", "block"]).set_index(["block", "metric"])
    assert found.loc[("a", "negative"), "mean_low"] == pytest.approx(0.25 - 0.25 / 39)
    assert found.loc[("a", "negative"), "mean_high"] == pytest.approx(0.25 + 0.4 / 39)
    assert math.isnan(found.loc[("a", "S_active"), "mean_low"])
    assert mean_cells(rows[rows["image"] == 3])[1] == "25 (0) [0 to 65]"


def test_a_share_is_spelled_with_its_interval():
    share = {"negative": 0.125, "negative_low": 0.125, "negative_high": 0.125}
    assert spell_share(share, "negative") == "12.500"
    assert spell_share(share | {"negative_high": 0.25}, "negative", 1) == "12.5 (12.5 to 25.0)"
    assert (
        spell_share({"negative": math.nan, "negative_low": 0.0, "negative_high": 0.5}, "negative", 0)
        == "open (0 to 50)"
    )
    assert spell_share({"negative": math.nan}, "negative") == "open"


def test_a_planted_correlation_is_found_and_a_constant_has_none():
    rows = study(images=120)
    found = correlations(rows).set_index(["block", "metric", "outcome"])
    planted = found.loc[("a", "S_active", "loss")]
    rows = rows[rows["block"] == "a"]
    r = np.corrcoef(rows["S_active"], rows["loss"])[0, 1]
    assert planted["pearson"] == pytest.approx(r)
    n = len(rows)
    t = r * math.sqrt((n - 2) / (1 - r * r))
    assert planted["pearson_p"] == pytest.approx(2 * student.sf(abs(t), n - 2), rel=1e-6)
    ranks = [pd.Series(rows[c].to_numpy()).rank() for c in ("S_active", "loss")]
    assert planted["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert planted["pearson_holm"] < 0.05
    assert found.loc[("b", "S_active", "loss"), "pearson_holm"] > 0.05
    assert found["pearson"].xs("negative", level="metric").isna().all()
    assert (found["pearson_holm"].dropna() >= found["pearson_p"].dropna()).all()


def test_p_values_of_few_images_are_of_permutations_and_of_skewed_losses_right():
    rows = study(images=40)
    planted = correlations(rows).set_index(["block", "metric", "outcome"]).loc[("a", "S_active", "loss")]
    assert planted["pearson_p"] == planted["spearman_p"] == 1 / (PERMUTATIONS + 1)
    rng, below = np.random.default_rng(3), 0
    for _ in range(60):  # no relation, but heavy tails: p < 0.05 in one of twenty
        sample = pd.DataFrame({"S": rng.standard_cauchy(20), "loss": rng.exponential(size=20) ** 4})
        below += _coefficients(sample.to_numpy())["pearson_p"] < 0.05
    assert below <= 9


def test_an_interval_covers_what_is_true_of_all_images():
    rng, covered = np.random.default_rng(5), 0
    for _ in range(60):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)  # r = 0.6
        found = _coefficients(np.stack([x, y], axis=1))
        covered += found["pearson_low"] <= 0.6 <= found["pearson_high"]
        assert found["pearson_low"] < found["pearson"] < found["pearson_high"]
    assert covered >= 51


def test_what_a_column_held_fixed_explains_is_no_correlation():
    rows = study(images=200)
    rng = np.random.default_rng(1)
    margin = np.repeat(rng.normal(size=200), 2)
    rows["margin"], rows["loss"] = margin, 2 * margin + rng.normal(size=400)
    rows["S_active"] = margin + rng.normal(size=400)
    plain = correlations(rows, ["S_active"], ["loss"]).set_index("block").loc["a"]
    partial = correlations(rows, ["S_active"], ["loss"], held="margin").set_index("block").loc["a"]
    assert plain["pearson"] > 0.4
    assert abs(partial["pearson"]) < 0.2
    part = rows[rows["block"] == "a"]
    left = [
        np.polynomial.Polynomial.fit(part["margin"], part[c], 1)(part["margin"]) - part[c] for c in ("S_active", "loss")
    ]
    r = np.corrcoef(*left)[0, 1]
    assert partial["pearson"] == pytest.approx(r)
    t = abs(r) * math.sqrt(197 / (1 - r * r))
    assert partial["pearson_p"] == pytest.approx(2 * student.sf(t, 197))


@pytest.mark.parametrize("images", [0, 1, 2, 3, 19])
def test_too_few_images_have_no_coefficient_and_no_star(images):
    rows = study(images=40)[: 2 * images]
    rows["S_active"] = rows["loss"]  # a perfect correlation, whose p is 0
    found = correlations(rows)
    assert found.empty or found[["pearson", "pearson_p", "pearson_holm", "spearman", "spearman_holm"]].isna().all(None)
    rows = rows.assign(function="block", kind="matrix")
    if images:
        table = correlations_table(rows, "block")
        assert {cell for column in table.columns[-2:] for cell in column.cells} == {"-"}


def test_one_image_of_the_other_class_makes_no_correlation_with_accuracy():
    rows = study(images=30)
    rows["correct"] = (rows["image"] != 7).astype(float)
    rows.loc[rows["image"] == 7, "S_active"] = 50.0
    found = correlations(rows).set_index(["block", "metric", "outcome"])
    assert math.isnan(found.loc[("a", "S_active", "correct"), "pearson"])
    assert not math.isnan(found.loc[("a", "S_active", "loss"), "pearson"])


def test_means_by_label_are_within_blocks_and_of_one_image_there_is_none():
    rows = study(images=4).assign(function="block", kind="matrix")
    for name in ("zero", "abscissa", "min_re_active"):
        rows[name] = 1.0
    assert mean_groups(rows, "label") == []  # each label has one image, though two blocks of it
    assert means_table(rows, "label").row_count == 0
    assert spread(rows, ["label"])[["mean", "std"]].isna().all(None)
    assert len(mean_groups(rows, "block")) == 2
    rows = study(images=5).assign(function="block", kind="matrix", zero=1.0, abscissa=1.0, min_re_active=1.0)
    table = means_table(rows, "label")
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[:4] for row in cells[:2]] == [("1 a", "0", "block", "2"), ("1 a", "1", "block", "1")]
    both = rows[(rows["block"] == "a") & (rows["label"] == 0)]["S_active"]
    assert cells[0][4] == f"{both.mean():.5g} ({both.std():.2g})"
    assert set(cells[1][4:]) == {"-"}


def test_corrections_are_those_of_the_papers():
    # the worked example of Benjamini & Hochberg (1995), section 3
    p = np.array(
        [
            0.0001,
            0.0004,
            0.0019,
            0.0095,
            0.0201,
            0.0278,
            0.0298,
            0.0344,
            0.0459,
            0.324,
            0.4262,
            0.5719,
            0.6528,
            0.759,
            1.0,
        ]
    )
    assert (benjamini_hochberg(p) <= 0.05).sum() == 4
    assert (holm(p) <= 0.05).sum() == 3
    assert holm(np.array([0.01, np.nan, 0.04, 0.03])) == pytest.approx([0.03, np.nan, 0.06, 0.06], nan_ok=True)
    shuffled = np.random.default_rng(0).permutation(len(p))
    assert np.allclose(holm(p[shuffled]), holm(p)[shuffled])


def test_runs_are_compared_at_the_same_images():
    first = study(images=30).assign(function="block", kind="matrix", abscissa=1.0)
    first["image_digest"] = first["image"].map("image {}".format)
    second = first[first["image"] >= 10].assign(S_active=first["S_active"] + 0.25)
    second.loc[second.index[0], "certified"] = False  # image 10 of block a
    second["image_digest"] = second["image_digest"].replace("image 29", "another")
    second["image"] -= 10  # positions are others, images the same
    found = compared({"before": first, "after": second}).set_index(["block", "metric", "run"])
    row = found.loc[("a", "S_active", "after")]
    assert (row["images"], row["common"]) == (19, 18)
    assert row["difference"] == pytest.approx(0.25)
    assert row["difference_low"] == pytest.approx(0.25)
    assert found.loc[("b", "S_active", "after"), "common"] == 19
    assert math.isnan(found.loc[("a", "S_active", "before"), "difference"])
    noisy = first.assign(S_active=first["S_active"] + np.random.default_rng(0).normal(0.1, 1, len(first)))
    row = (
        compared({"before": first, "after": noisy})
        .set_index(["block", "metric", "run"])
        .loc[("a", "S_active", "after")]
    )
    each = (noisy["S_active"] - first["S_active"])[first["block"] == "a"]
    half = student.ppf(0.975, 29) * each.std(ddof=1) / math.sqrt(30)
    assert row["difference_low"] == pytest.approx(each.mean() - half)
    assert row["difference_high"] == pytest.approx(each.mean() + half)
