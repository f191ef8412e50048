"""python -m sleep_ops.bench.first_call CASE DEVICE: milliseconds of the first forward and backward in this process."""

import json
import sys
import time

import torch

from sleep_ops.bench.cases import Case, make_inputs
from sleep_ops.bench.harness import gradients
from sleep_ops.bench.providers import operator_problem, replay_of


def main(case: str, device: str) -> None:
    case, device = Case(**json.loads(case)), torch.device(device)
    problem = operator_problem(replay_of("ours", case, device), case, make_inputs(case, 0, device))
    torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item()
    begin = time.perf_counter()
    gradients(problem, problem.run(case.passes))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print((time.perf_counter() - begin) * 1e3)


if __name__ == "__main__":
    main(*sys.argv[1:])
