"""Probes: what a ridge regression finds in features whose content is known, and the command over trained runs."""

import numpy as np
import pytest
import torch
from commands import is_png, read, run
from small import hybrid, tiny

from sleep_ops.experiments import probe as probes
from sleep_ops.experiments.probe import STRING, TRAINED, UNTRAINED, probe
from sleep_ops.tasks.mqar import MQAR
from sleep_ops.tasks.rule110 import Rule110, rule110_steps

TASK = Rule110(t=2, strings=2, bits=12, held_out=0.125)
RUN = "rule110 --t 1 --strings 2 --bits 10 --layers attn-gdn --width 16 --heads 2 --steps 2 --batch 4".split()
RUN += "--eval-samples 8 --passes 2 --device cpu".split()


def test_a_ridge_regression_is_least_squares_with_its_penalty():
    """Against the solution of the stacked system, with more features than rows and fewer."""
    generator = torch.Generator().manual_seed(0)
    for M, F in ((20, 7), (7, 20)):
        x, y, asked = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((M, F), (M, 3), (5, F)))
        centred = x - x.mean(0)
        gram = centred @ centred.mT if M < F else centred.mT @ centred
        for strength, found in zip(probes.STRENGTHS, probes._ridge(x, y, asked), strict=True):
            penalty = (strength * gram.diagonal().mean()).sqrt() * torch.eye(F, dtype=torch.float64)
            stacked = torch.cat([centred, penalty])
            target = torch.cat([y - y.mean(0), torch.zeros(F, 3, dtype=torch.float64)])
            weights = torch.linalg.lstsq(stacked, target, driver="gelsd").solution
            torch.testing.assert_close(found, (asked - x.mean(0)) @ weights + y.mean(0), rtol=1e-7, atol=1e-9)


def test_features_that_hold_a_row_are_read_and_others_are_not():
    rng = np.random.default_rng(0)
    seen, asked = (rng.integers(0, 2, (n, TASK.bits), dtype=np.uint8) for n in (256, 512))
    rows = [torch.from_numpy(probes._rows(TASK, cells)) for cells in (seen, asked)]
    assert np.array_equal(rows[0][:, 2].numpy(), rule110_steps(seen, 2))
    noise = [torch.from_numpy(rng.standard_normal((n, 4))) for n in (256, 512)]
    held = [torch.cat([r[:, 2].double(), x], 1) for r, x in zip(rows, noise, strict=True)]
    right = probes._judge(held[0], rows[0], held[1], rows[1])
    assert (right[2] == 1).all() and right[0].mean() < 0.9
    blind = probes._judge(noise[0], rows[0], noise[1], rows[1])
    assert blind[0].mean() < 0.6  # a fair coin's


def test_the_cone_is_what_the_answer_depends_on():
    """Flip each cell of row j, on many strings: the answer changes for some of them exactly inside of the cone."""
    for boundary in ("periodic", "zero"):
        for t, bits in ((3, 12), (7, 10)):
            task = Rule110(t=t, strings=1, bits=bits, boundary=boundary)
            row = np.random.default_rng(1).integers(0, 2, (4096, bits), dtype=np.uint8)
            for j in range(t + 1):
                answer = rule110_steps(row, t - j, boundary)[:, 0]
                flips = [row ^ (np.arange(bits) == i).astype(np.uint8) for i in range(bits)]
                matter = [i for i, x in enumerate(flips) if (rule110_steps(x, t - j, boundary)[:, 0] != answer).any()]
                assert set(matter) <= set(probes._cone(task, j))
                assert j < t or matter == probes._cone(task, j) == [0]
                assert len(probes._cone(task, j)) == min(bits, (2 if boundary == "periodic" else 1) * (t - j) + 1)


def test_rows_of_a_model():
    model = hybrid(vocab_size=3, window=TASK.bits).eval()
    rows = probe({TRAINED: model}, TASK, passes=[1, 3], fitted=64, judged=128)
    assert [(r["features"], r["passes"], r["step"]) for r in rows] == [
        *((STRING, 0, j) for j in range(3)),
        *((TRAINED, n, j) for n in (1, 3) for j in range(3)),
    ]
    assert rows[0]["first"] == rows[0]["cone"] == 1  # a string says its own cells
    assert all(0 <= r[k] <= 1 for r in rows for k in ("first", "cone", "guess"))
    assert all(r["first"] == r["cone"] for r in rows if r["step"] == TASK.t)
    # Features of n passes are those of a window that slept n times.
    cells = probes._strings(TASK, 8, 1, "train")
    once, thrice = (probes._fast_weights(model, n, cells) for n in (1, 3))
    assert once.shape == thrice.shape and not torch.equal(once, thrice)
    longer = torch.from_numpy(np.pad(cells, ((0, 0), (0, 1))).astype(np.int64))
    begun = [s.fast_weights.flatten(1) for s in model(longer, passes=3).state.start if s is not None]
    torch.testing.assert_close(thrice, torch.cat(begun, 1))
    assert rows == probe({TRAINED: model}, TASK, passes=[1, 3], fitted=64, judged=128)


def test_what_cannot_be_probed_is_refused():
    model = hybrid(vocab_size=3, window=TASK.bits)
    for named, arguments, options in (
        ("task: expected rule110, got mqar", (model, MQAR()), {}),
        ("model.window: expected one string, 12 tokens, got 6", (tiny(vocab_size=3, window=6), TASK), {}),
        ("passes: ", (model, TASK), {"passes": [0]}),
        ("fitted: ", (model, TASK), {"fitted": 8}),
        ("judged: ", (model, TASK), {"judged": 0}),
    ):
        with pytest.raises(ValueError, match=named):
            probe({TRAINED: arguments[0]}, arguments[1], **{"passes": [1]} | options)


def test_the_command(tmp_path):
    for seed in (0, 1):
        run("train", *RUN, "--seed", seed, "--out", tmp_path / f"run-{seed}")
    runs = [tmp_path / "run-0", tmp_path / "run-1"]
    options = ("--fitted", 32, "--judged", 64, "--device", "cpu", "--out", tmp_path / "probe")
    text = run("probe", *runs, *options)
    assert "the string itself" in text and "trained, n = 2" in text and "untrained, n = 1" in text
    rows = read(tmp_path / "probe" / "probe.csv")
    assert len(rows) == 2 * (1 + 2 * 2) * 2 and {row["run"] for row in rows} == set(map(str, runs))
    assert {row["features"] for row in rows} == {STRING, UNTRAINED, TRAINED}
    assert {row["trained_steps"] for row in rows} == {"2"} and is_png(tmp_path / "probe" / "probe.png")
    assert "expected rule110" not in run("probe", runs[0], "--passes", "3", *options)
    assert {row["passes"] for row in read(tmp_path / "probe" / "probe.csv")} == {"0", "3"}


def test_a_run_of_another_task_leaves_nothing(tmp_path):
    run("train", "mqar", "--preset", "tiny", "--steps", 1, "--batch", 2, "--eval-samples", 4, "--device", "cpu",
        "--out", tmp_path / "run")  # fmt: skip
    assert "task: expected rule110, got mqar" in run("probe", tmp_path / "run", "--out", tmp_path / "probe", code=2)
    assert not (tmp_path / "probe").exists()
    assert "passes" in run("probe", tmp_path / "run", "--passes", "0", "--out", tmp_path / "probe", code=2)
