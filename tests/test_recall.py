"""Recall against N: the curve is the recurrence's, its limit is least squares, and the command writes it down."""

import functools
import math

import pytest
import torch
from commands import is_png, read, run

from sleep_ops import sleep_gated_delta_rule
from sleep_ops.experiments.recall import RecallExperiment, plot, table
from sleep_ops.reference import sleep_gated_delta_rule_reference

SMALL = {"key_dim": 16, "value_dim": 8, "codewords": 64, "memories": 4, "device": "cpu"}


def experiment(**settings):
    return RecallExperiment(**SMALL | {"loads": (0.5, 0.75, 1.0, 1.25), "passes": (1, 2, 4, 16, 64)} | settings)


def errors(rows, rule="delta", measure="error"):
    """{load: {passes: error}}"""
    chosen = [row for row in rows if row["rule"] == rule]
    return {
        load: {r["passes"]: r[measure] for r in chosen if r["load"] == load} for load in {r["load"] for r in chosen}
    }


def measured(recalled, answers, codebook):
    """The two errors of S^T k, counted one key at a time."""
    wrong, error = [], []
    for vector, answer in zip(recalled.flatten(0, 1), answers.flatten(), strict=True):
        wrong.append((codebook - vector).norm(dim=-1).argmin() != answer)
        error.append((vector - codebook[answer]).square().sum() / codebook[answer].square().sum())
    return torch.stack(wrong).double().mean().item(), torch.stack(error).mean().item()


@pytest.mark.parametrize("settings", [{}, {"beta": 0.5, "decay": 0.01, "seed": 3}], ids=["plain", "decay"])
def test_rows_are_those_of_the_recurrence(settings):
    e = experiment(**settings)
    keys, codebook, answers = e.draw()
    rows = e.run()
    for load in e.loads:
        k, a = keys[:, : e.pairs(load), None], answers[:, : e.pairs(load)]
        g, beta = (torch.full(k.shape[:3], x, dtype=torch.float64) for x in (-e.decay, e.beta))
        for rule, passes in (("hebbian", 1), ("delta", 1), ("delta", 4)):
            state = sleep_gated_delta_rule_reference(
                k, k, codebook[a][:, :, None], g, beta, passes=passes, rule=rule
            ).final_state
            wrong, error = measured(k[:, :, 0] @ state[:, 0], a, codebook)
            assert errors(rows, rule)[load][passes] == pytest.approx(error, rel=1e-10)
            assert errors(rows, rule, "wrong")[load][passes] == pytest.approx(wrong)


@pytest.mark.parametrize("passes", [3, 64])
def test_the_operator_gives_the_same(passes):
    e = experiment(passes=(passes,))
    keys, codebook, answers = e.draw()
    k, v = keys[:, :, None], codebook[answers][:, :, None]
    beta = torch.ones_like(k[..., 0])
    state = sleep_gated_delta_rule(k, k, v, 0 * beta, beta, passes=passes).final_state
    wrong, error = measured(keys @ state[:, 0], answers, codebook)
    rows = e.run()
    assert errors(rows)[1.25][passes] == pytest.approx(error, rel=1e-9)
    assert errors(rows, measure="wrong")[1.25][passes] == pytest.approx(wrong)


def test_error_falls_with_every_pass_and_with_a_lighter_load():
    e = experiment()
    found, wrong = errors(e.run()), errors(e.run(), measure="wrong")
    for load in (0.5, 0.75, 1.0):
        curve = [found[load][n] for n in e.passes]
        assert all(later < earlier for earlier, later in zip(curve[:-1], curve[1:], strict=True)), load
        assert wrong[load][64] <= wrong[load][4] < wrong[load][1]
    for n in e.passes:
        assert found[0.5][n] < found[0.75][n] < found[1.0][n] < found[1.25][n]


def test_the_limit_is_least_squares_up_to_the_capacity():
    rows = experiment().run()
    limit, least = errors(rows), errors(rows, "least squares")
    for load in (0.5, 0.75, 1.0):
        assert limit[load][math.inf] < 1e-12 and least[load][math.inf] < 1e-12
        assert errors(rows, measure="wrong")[load][math.inf] == 0
    # No state recalls 20 keys of 16 dims; least squares does best, and a smaller beta comes closer.
    best = least[1.25][math.inf]
    gentle = errors(experiment(beta=0.05).run())[1.25][math.inf]
    assert 0.1 < best < gentle < 1.02 * best < limit[1.25][math.inf]


def test_the_limit_is_where_the_passes_go():
    """Decayed, overloaded or neither: thousands of passes end at the row for infinity."""
    for settings in ({}, {"decay": 0.01}, {"beta": 1.5}):
        e = experiment(loads=(0.5, 0.75, 1.25), passes=(2**16,), **settings)
        for curve in errors(e.run()).values():
            assert curve[2**16] == pytest.approx(curve[math.inf], rel=1e-6, abs=1e-12)


def test_least_squares_is_torchs():
    e = experiment(loads=(0.5, 1.25))
    keys, codebook, answers = e.draw()
    found = torch.linalg.lstsq(keys, codebook[answers], driver="gelsd").solution
    wrong, error = measured(keys @ found, answers, codebook)
    rows = e.run()
    assert errors(rows, "least squares")[1.25][math.inf] == pytest.approx(error)
    assert errors(rows, "least squares", "wrong")[1.25][math.inf] == pytest.approx(wrong)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_seed_decides_every_bit(threads):
    rows = experiment(seed=1).run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert experiment(seed=1).run() == rows
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert errors(experiment(seed=2).run()) != errors(rows)
    assert {row["pairs"] for row in rows} == {8, 12, 16, 20} and {row["seed"] for row in rows} == {1}
    assert len(rows) == 4 * (1 + 5 + 1 + 1) and all(0 < row["error_stderr"] < 1 for row in rows if row["passes"] == 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"key_dim": 0}, "key_dim"),
        ({"value_dim": 2.0}, "value_dim"),
        ({"codewords": 1}, "codewords"),
        ({"memories": 1}, "memories"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"passes": ()}, "passes"),
        ({"passes": (0,)}, "passes"),
        ({"passes": (1, math.inf)}, "passes"),
        ({"passes": (2, 1)}, "passes"),
        ({"loads": ()}, "loads"),
        ({"loads": (math.nan,)}, "loads"),
        ({"loads": (0.01,)}, "loads"),
        ({"loads": (0.5, 0.51)}, "loads"),
        ({"loads": (1.0, 0.5)}, "loads"),
        ({"beta": 2.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"decay": -1e-3}, "decay"),
        ({"device": "abacus"}, "device"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"^{named}: expected .* got "):
        experiment(**settings)


def test_table_and_plot(tmp_path):
    rows = experiment().run()
    for measure in ("wrong", "error"):
        drawn = table(rows, measure)
        assert drawn.row_count == 8 and len(drawn.columns) == 5
    plot(rows, tmp_path / "one.png")
    plot(experiment(loads=(1.0,), passes=(3,)).run(), tmp_path / "two.png")
    assert is_png(tmp_path / "one.png") and is_png(tmp_path / "two.png")


recall = functools.partial(run, "recall")


def test_command(tmp_path):
    out = tmp_path / "deep" / "recall"
    sizes = "--key-dim 16 --value-dim 8 --codewords 64 --memories 4 --beta 0.9 --decay 0.001".split()
    text = recall("--loads", "0.5,1", "--passes", "1,8", "--seed", 5, "--device", "cpu", *sizes, "--out", out)
    assert "least squares" in text and "Hebbian" in text
    rows = read(out / "recall.csv")
    expected = experiment(loads=(0.5, 1.0), passes=(1, 8), seed=5, beta=0.9, decay=0.001).run()
    assert rows == [{key: str(value) for key, value in row.items()} for row in expected]
    assert is_png(out / "recall.png")


@pytest.mark.parametrize(
    "arguments",
    [("--loads", "0.5;1"), ("--loads", "0"), ("--passes", "1,inf"), ("--beta", "2"), ("--device", "abacus")],
    ids=" ".join,
)
def test_refusals(tmp_path, arguments):
    assert "expected" in recall(*arguments, "--out", tmp_path / "x", code=2)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "expected a folder" in recall("--out", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"
