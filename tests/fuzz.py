"""Random calls of the operators and the layer on the CPU, against the token recurrence in float64.

    python tests/fuzz.py [--seconds 600] [--first 0]

One case a seed: shapes with ones and odd numbers, grouped heads, packed sequences with empty ones, windows and passes,
both rules, gates that are ordinary, zero, strong, resets or mixed, beta from 0 to 2, states and cotangents there or
not. In float64 the chunked forms have to agree with the recurrence to rounding, in outputs, states and every gradient.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from sleep_ops import SleepGDNLayer, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.step import gated_delta_rule_step

TOLERANCE = 1e-8  # of the largest element; float64 loses some digits to keys that repeat and beta near 2
GATES = ("ordinary", "zero", "strong", "reset", "mixed")


def draw(seed: int) -> dict:
    """The settings of one case."""
    r = random.Random(seed)
    heads = r.choice([1, 1, 2, 3])
    lengths = [r.choice([0, 1, 2, 7, 16, 17, 33, 64, 65, 90]) for _ in range(r.randint(1, 5))]
    gated = r.random() < 0.4
    return {
        "operator": r.choice(["rule", "rule", "sleep", "sleep", "step", "layer"]),
        "B": r.choice([1, 1, 2, 3]),
        "T": r.choice([1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 129, 200]),
        "heads": (heads, heads * r.choice([1, 1, 2, 3])),
        "dims": (r.choice([1, 2, 5, 16, 20, 33]), r.choice([1, 3, 8, 16, 24])),
        "lengths": lengths if r.random() < 0.3 and sum(lengths) else None,
        "gate": r.choice(GATES),
        "beta": r.choice(["random", "random", "zero", "one", "two"]),
        "keys": r.choice(["random", "random", "random", "repeated", "zero"]),
        "state": r.random() < 0.6,
        "final": r.random() < 0.7,
        "rule": r.choice(["delta", "delta", "hebbian"]),
        "gated": gated,
        "passes": r.choice([1, 2, 3, 4, 7]),
        "window": r.choice([None, 1, 5, 16, 50, 64, 300]),
        "output_pass": r.choice(["first", "last"]),
    }


def tensors(case: dict, seed: int) -> tuple[dict[str, Tensor], dict]:
    """float64 tensors by the operators' names, and the other options."""
    generator = torch.Generator().manual_seed(seed)
    (H, HV), (K, V), B, T = case["heads"], case["dims"], case["B"], case["T"]
    lengths = case["lengths"]
    if lengths is not None and case["operator"] in ("rule", "sleep"):
        B, T = 1, sum(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    k = normal(B, T, H, K)
    if case["keys"] == "repeated":
        k = k[:, :1].expand(B, T, H, K).clone()
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if case["keys"] == "zero":
        k[:, ::2] = 0
    uniform = torch.rand(B, T, HV, generator=generator, dtype=torch.float64)
    gates = {
        "ordinary": -0.3 * uniform,
        "zero": 0 * uniform,
        "strong": -30 * uniform,
        "reset": torch.where(uniform < 0.1, -torch.inf, -0.2 * uniform),
    }
    gates["mixed"] = torch.where(uniform < 0.2, -1e9 * uniform, gates["strong"] * (uniform > 0.5))
    beta = {"random": 2 * torch.rand_like(uniform), "zero": 0 * uniform, "one": 0 * uniform + 1, "two": 0 * uniform + 2}
    given = {"q": normal(B, T, H, K), "k": k, "v": normal(B, T, HV, V), "g": gates[case["gate"]]}
    given["beta"] = torch.rand(B, T, HV, generator=generator, dtype=torch.float64) * 2
    if case["beta"] != "random":
        given["beta"] = beta[case["beta"]]
    options: dict = {"rule": case["rule"]}
    if case["gated"]:
        given |= {"g": normal(B, T, HV), "beta": normal(B, T, HV), "A_log": normal(HV), "dt_bias": normal(HV)}
        options |= {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": case["beta"] == "two"}
    if lengths is not None and case["operator"] in ("rule", "sleep"):
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        options["cu_seqlens"] = ends
        B = len(lengths)
    if case["state"]:
        given["initial_state"] = normal(B, HV, K, V)
    if case["operator"] == "sleep":
        options |= {name: case[name] for name in ("passes", "window", "output_pass")}
    return given, options


def differentiate(function, given: dict[str, Tensor], final: bool) -> list[Tensor]:
    """Output, state and the gradient of every tensor."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    output, state = function(**leaves)
    generator = torch.Generator().manual_seed(0)
    roots = [output, state] if final else [output]
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in roots]
    gradients = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
    return [output.detach(), state.detach(), *(x for x in gradients if x is not None)]


def step_by_step(q, k, v, g, beta, initial_state=None, *, impl, **options):
    """The rule as one-token steps."""
    HV, K, V = v.shape[2], k.shape[3], v.shape[3]
    state = k.new_zeros(k.shape[0], HV, K, V) if initial_state is None else initial_state
    outputs = []
    for t in range(k.shape[1]):
        token = (x[:, t] for x in (q, k, v, g, beta))
        out = gated_delta_rule_step(*token, state, impl=impl, **options)
        outputs.append(out.output)
        state = out.final_state
    return torch.stack(outputs, 1), state


def layer_of(case: dict, seed: int, impl: str) -> SleepGDNLayer:
    torch.manual_seed(seed)
    (H, HV), (K, V) = case["heads"], case["dims"]
    return SleepGDNLayer(
        12,
        num_heads=H,
        head_dim=K,
        num_v_heads=HV,
        head_v_dim=V,
        allow_neg_eigval=case["beta"] == "two",
        passes=case["passes"],
        window=case["window"],
        output_pass=case["output_pass"],
        rule=case["rule"],
        impl=impl,
    ).double()


def results(seed: int, impl: str) -> list[Tensor]:
    """Of one case, by one implementation."""
    case = draw(seed)
    if case["operator"] == "layer":
        layer = layer_of(case, seed, impl)
        x = torch.randn(case["B"], case["T"], 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x.requires_grad_()
        y, state = layer(x, return_state=True)
        loss = y.square().sum() + (state[0].square().sum() if case["final"] else 0)
        return [y.detach(), state[0].detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]
    given, options = tensors(case, seed)
    operator = {"rule": gated_delta_rule, "sleep": sleep_gated_delta_rule, "step": step_by_step}[case["operator"]]
    if case["operator"] == "step":  # what it is judged by is the whole rule
        operator = gated_delta_rule if impl == "reference" else step_by_step
        given = {name: x[:, :20] if name in ("q", "k", "v", "g", "beta") else x for name, x in given.items()}
    return differentiate(lambda **x: operator(**x, impl=impl, **options), given, case["final"])


def fault(seed: int) -> str:
    """What is wrong with a case, empty for nothing."""
    exact, found = results(seed, "reference"), results(seed, "torch")
    if len(exact) != len(found):
        return f"{len(found)} results instead of {len(exact)}"
    for i, (a, b) in enumerate(zip(exact, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if not a.numel():
            continue
        scale = max(1.0, a.abs().max().item())
        error = (a - b).abs().max().item() / scale
        if not error <= TOLERANCE:
            return f"result {i}: error {error:.1e} of {scale:.1e}"
    return ""


def search(draw: Callable[[int], dict], fault: Callable[[int], str], about: str, entries: Sequence[str] = ()) -> None:
    """The command line of a fuzz: cases of fault(seed), one seed after another; a fault is printed with draw(seed).

    entries: what `draw` gives as "entry", of which --only chooses one.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=0)
    if entries:
        parser.add_argument("--only", choices=entries)
    given = parser.parse_args()
    only = getattr(given, "only", None)
    begin, seed, cases, faults = time.process_time(), given.first, Counter(), 0
    while time.process_time() - begin < given.seconds:
        case = draw(seed)
        entry = case.get("entry", "all")
        if only is None or entry == only:
            try:
                why = fault(seed)
            except Exception as error:  # whatever it is, it is a fault
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            cases[entry] += 1
            if why:
                faults += 1
                print(f"seed {seed}: {why}\n    {case}", flush=True)
        seed += 1
    parts = f" ({', '.join(f'{n} {name}' for name, n in sorted(cases.items()))})" if entries else ""
    print(f"{cases.total()} cases{parts} from seed {given.first} to {seed - 1}, {faults} faults")


if __name__ == "__main__":
    search(draw, fault, __doc__.splitlines()[0])
