"""N of a training step: fixed, drawn or rising, the same after a stop; and runs that end early."""

import math
from collections import Counter

import pytest
from cases import slow_unless
from rich.console import Console

from sleep_ops import HybridConfig
from sleep_ops.files import read_csv
from sleep_ops.tasks import Rule110
from sleep_ops.training import RunConfig, TrainConfig, Trainer

TASK = Rule110(t=2, strings=2, bits=6)
MODEL = dict(vocab_size=3, hidden_size=8, layers=("attn", "gdn"), window=6, num_heads=2)


def trainer(out, task=TASK, model=None, **recipe):
    recipe = dict(steps=8, batch_size=4, eval_every=2, eval_samples=8, checkpoint_every=3, device="cpu") | recipe
    settings = HybridConfig(**MODEL | {"passes": 3} | (model or {}))
    config = RunConfig(TASK.to_dict(), settings.to_dict(), TrainConfig(**recipe))
    return Trainer(config, out, task=task, console=Console(quiet=True))


def column(out, name, file="metrics.csv"):
    return [row[name] for row in read_csv(out / file)]


class TestSchedule:
    def test_fixed(self):
        assert {TrainConfig().passes_at(step, 4) for step in range(800)} == {4}

    def test_random_draws_every_number_alike(self):
        config = TrainConfig(passes_schedule="random")
        drawn = [config.passes_at(step, 4) for step in range(4000)]
        found = Counter(drawn)
        assert sorted(found) == [1, 2, 3, 4] and all(abs(n - 1000) < 5 * 750**0.5 for n in found.values())
        assert drawn == [config.passes_at(step, 4) for step in range(4000)]
        assert drawn != [TrainConfig(passes_schedule="random", seed=1).passes_at(step, 4) for step in range(4000)]

    @pytest.mark.parametrize("fraction, steps", [(0.5, 80), (1.0, 9), (0.01, 20)], ids=["half", "all", "no-step"])
    def test_curriculum_rises_to_n(self, fraction, steps):
        config = TrainConfig(steps=steps, passes_schedule="curriculum", curriculum=fraction)
        found = [config.passes_at(step, 4) for step in range(steps)]
        rising = max(round(fraction * steps), 1)
        assert found == sorted(found) and found[0] == 1 and set(found[rising:]) <= {4}
        times = Counter(found[:rising])
        if rising > 3:
            assert sorted(times) == [1, 2, 3] and max(times.values()) - min(times.values()) <= 1

    def test_one_pass_stays_one(self):
        for schedule in ("fixed", "random", "curriculum"):
            assert {TrainConfig(passes_schedule=schedule).passes_at(step, 1) for step in range(50)} == {1}


class TestRuns:
    @pytest.mark.parametrize("schedule", slow_unless(["random"], ["random", "curriculum"]))
    def test_the_model_runs_with_it_and_a_resumed_run_too(self, schedule, tmp_path):
        run = trainer(tmp_path / "straight", passes_schedule=schedule)
        forward, seen = run.model.forward, []

        def noted(*args, passes=None, **kwargs):
            seen.append((run.model.training, passes))
            return forward(*args, passes=passes, **kwargs)

        run.model.forward = noted
        run.fit()
        expected = [run.config.train.passes_at(step, 3) for step in range(8)]
        assert len(set(expected)) > 1
        assert [n for training, n in seen if training] == expected
        assert {n for training, n in seen if not training} == {None}
        assert column(tmp_path / "straight", "passes") == expected
        trainer(tmp_path / "parts", passes_schedule=schedule).fit(until=5)
        assert trainer(tmp_path / "parts", passes_schedule=schedule).fit().finished
        for name in ("loss", "grad_norm", "passes"):
            assert column(tmp_path / "parts", name) == column(tmp_path / "straight", name)
        trainer(tmp_path / "fixed").fit()
        assert column(tmp_path / "fixed", "passes") == [3] * 8
        assert column(tmp_path / "fixed", "loss") != column(tmp_path / "straight", "loss")

    def test_logs_of_a_run_older_than_the_column(self, tmp_path):
        trainer(tmp_path).fit(until=3)
        path = tmp_path / "metrics.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()]
        place = rows[0].index("passes")
        path.write_text("".join(",".join(row[:place] + row[place + 1 :]) + "\n" for row in rows))
        trainer(tmp_path).fit()
        found = column(tmp_path, "passes")
        assert all(map(math.isnan, found[:3])) and found[3:] == [3] * 5

    @pytest.mark.parametrize(
        "settings, name",
        [
            (dict(passes_schedule="falling"), "passes_schedule"),
            (dict(curriculum=0.0), "curriculum"),
            (dict(curriculum=1.5), "curriculum"),
            (dict(stop_at=math.nan), "stop_at"),
            (dict(patience=0), "patience"),
            (dict(parallel="tensor"), "parallel"),
            (dict(parallel="fsdp", cuda_graph=True), "parallel"),
        ],
        ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
    )
    def test_bad_settings(self, settings, name):
        with pytest.raises(ValueError, match=name):
            TrainConfig(**settings)

    def test_endless_passes_have_no_schedule(self, tmp_path):
        endless = dict(passes=math.inf, sleep_kind="replay")
        with pytest.raises(ValueError, match="passes_schedule: expected 'fixed' .* inf, got 'random'"):
            trainer(tmp_path / "run", model=endless, passes_schedule="random")
        assert not (tmp_path / "run").exists()


class Judged(Rule110):
    """Evaluations whose values are given."""

    def evaluate(self, model, **kwargs):
        return {self.metric: next(self.values)}


def judged(*values, metric="exact"):
    task = Judged(t=2, strings=2, bits=6)
    for name, value in {"values": iter(values), "metric": metric}.items():
        object.__setattr__(task, name, value)
    return task


class TestEarlyStop:
    """Evaluations after steps 2, 4, 6 and 8."""

    @pytest.mark.parametrize(
        "recipe, values, steps",
        [
            (dict(stop_at=0.5), (0.1, 0.5), 4),
            (dict(stop_at=0.5), (0.1, 0.4, 0.3, 0.2), 8),
            (dict(patience=1), (0.1, 0.2, 0.2), 6),
            (dict(patience=2), (0.2, 0.1, 0.3, 0.1), 8),
            (dict(patience=2), (math.nan, math.nan), 4),
            (dict(), (0.9, 0.1, 0.1, 0.1), 8),
        ],
        ids=["reached", "not-reached", "no-better", "better-again", "nan", "off"],
    )
    @pytest.mark.parametrize(
        "stop", slow_unless(["stopped-at-5"], [None, 4, 5], ids=["straight", "stopped-at-4", "stopped-at-5"])
    )
    def test_where_a_run_ends(self, stop, recipe, values, steps, tmp_path):
        task = judged(*values)
        if stop is not None:
            trainer(tmp_path, task, **recipe).fit(until=stop)
        result = trainer(tmp_path, task, **recipe).fit()
        assert (result.step, result.finished, result.signal) == (steps, True, None)
        assert column(tmp_path, "step") == list(range(1, steps + 1))
        assert len(column(tmp_path, "step", "eval.csv")) == steps // 2
        again = trainer(tmp_path, judged(), **recipe)
        assert again.step == steps and again.finished and again.fit().evaluation is None

    @pytest.mark.parametrize(
        "recipe, steps", [(dict(stop_at=0.6), 6), (dict(patience=2), 8), (dict(patience=1), 4)], ids=str
    )
    def test_a_smaller_loss_is_better(self, recipe, steps, tmp_path):
        run = trainer(tmp_path, judged(0.8, 0.9, 0.5, 0.7, metric="loss"), **recipe)
        assert run.fit().step == steps and run.best == min((0.8, 0.9, 0.5, 0.7)[: steps // 2])

    def test_a_run_that_ended_early_goes_on_with_another_rule(self, tmp_path):
        assert trainer(tmp_path, judged(0.5), stop_at=0.5).fit().step == 2
        assert trainer(tmp_path, judged(0.6, 0.9), stop_at=0.8).fit().step == 6
        assert trainer(tmp_path, judged(0.1)).fit().step == 8
        assert column(tmp_path, "exact", "eval.csv") == [0.5, 0.6, 0.9, 0.1]
