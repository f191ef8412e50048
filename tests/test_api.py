"""The public names, their arguments and results: outside programs rely on exactly these."""

import inspect

import pytest
import torch

import sleep_ops

GATES = ["use_qk_l2norm", "A_log", "dt_bias", "use_beta_sigmoid", "allow_neg_eigval", "impl"]
TOKENS = ["q", "k", "v", "g", "beta"]
# name: (positional arguments, keyword-only ones)
SIGNATURES = {
    "gated_delta_rule": (TOKENS, ["scale", "initial_state", "cu_seqlens", "rule", *GATES, "segments", "group"]),
    "sleep_gated_delta_rule": (
        TOKENS,
        ["passes", "window", "output_pass", "scale", "initial_state", "cu_seqlens", "rule", *GATES, "group"],
    ),
    "gated_delta_rule_step": ([*TOKENS, "state"], ["scale", "rule", *GATES, "inplace"]),
    "segment_transition": (TOKENS[1:], ["cu_seqlens", "rule", *GATES]),
}
DEFAULTS = {
    "scale": None,
    "rule": "delta",
    "window": None,
    "output_pass": "last",
    "impl": "auto",
    "segments": None,
    "group": None,
    "inplace": False,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_of_the_operators(name):
    parameters = inspect.signature(getattr(sleep_ops, name)).parameters.values()
    positional, options = SIGNATURES[name]
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == options
    assert len(parameters) == len(positional) + len(options)
    for p in parameters:
        if p.name in DEFAULTS:
            assert p.default == DEFAULTS[p.name], p.name
        assert (p.default is p.empty) == (p.name in (*positional, "passes")), p.name


def test_arguments_of_the_layer():
    parameters = inspect.signature(sleep_ops.SleepGDNLayer).parameters
    assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["hidden_size"]
    defaults = {"num_v_heads": None, "head_v_dim": None, "conv_size": 4, "allow_neg_eigval": False, "norm_eps": 1e-5}
    defaults |= {"passes": 1, "window": None, "output_pass": "first"}
    assert {name: parameters[name].default for name in defaults} == defaults
    parameters = inspect.signature(sleep_ops.SleepGDNLayer.forward).parameters
    assert [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY] == ["self", "x"]
    assert {"state", "attention_mask", "cu_seqlens", "return_state"} <= set(parameters)


def test_results_have_names():
    q = k = torch.nn.functional.normalize(torch.randn(2, 5, 1, 4), dim=-1)
    v, g, beta = torch.randn(2, 5, 2, 3), torch.zeros(2, 5, 2), torch.ones(2, 5, 2)
    for result in (
        sleep_ops.gated_delta_rule(q, k, v, g, beta),
        sleep_ops.sleep_gated_delta_rule(q, k, v, g, beta, passes=2, window=3),
    ):
        assert result._fields == ("output", "final_state")
        assert result.output.shape == v.shape and result.final_state.shape == (2, 2, 4, 3)
    step = sleep_ops.gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], result.final_state)
    assert step._fields == ("output", "final_state") and step.output.shape == (2, 2, 3)
    transition = sleep_ops.segment_transition(k, v, g, beta)
    assert isinstance(transition, sleep_ops.Transition) and transition._fields == ("P", "R")
    assert transition.P.shape == (2, 2, 4, 4) and transition.R.shape == (2, 2, 4, 3)
    assert all(callable(getattr(transition, name)) for name in ("apply", "then", "power", "fixed_point"))


def test_every_public_name_says_what_it_is():
    for name in sleep_ops.__all__:
        assert inspect.getdoc(getattr(sleep_ops, name)), name
