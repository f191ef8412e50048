"""Multi-hop variable tracking: chains of assignments, mixed together and evicted, then questions about some of them.

    context    x = 7   y = 3   z = x   u = y   w = z ...       chains of `hops` + 1 variables, statement by statement
    "values"     input  [?] w      u    ...                    target   -   7   3 ...
    "variables"  input  [?] 7  x   z    ...                    target   -   x   z   w ...

The difficulty of a variable is how many assignments lie between it and its value: 0 for x, 1 for z, 2 for w. "values"
asks for it with no steps in between, so that following the chain is the fast weights' work; "variables", as in the
source, lets the chain be unrolled one variable at a time. Source: variable tracking of RULER, Hsieh et al., arXiv
2404.06654; there prose stands between the statements, here the other chains are all the distraction there is.

A batch of 512 at the default size takes about 1 ms on one CPU core: 500,000 sequences, 50 million tokens, a second.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sleep_ops.checks import check_choice, check_counts, expect
from sleep_ops.streams import Stream
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, at_stage, by_level, check_first, score, stages_from

ASKS = ("values", "variables")
ORDERS = ("forward", "shuffled")


@dataclass(frozen=True)
class VariableTracking:
    """The variable tracking task.

    chains      of assignments, each from a value of its own; those not asked about distract.
    hops        assignments from variable to variable in each chain.
    first_hops  a curriculum, of "values": the most hops that training's first stage asks about, one more in each that
                follows; None for `hops` from the start.
    queries     "values": different variables asked for, from anywhere in any chain; "variables": chains.
    ask         "values": a variable is given, its value the answer; "variables": a value is given, all variables that
                have it, in their chain's order, are the answer.
    order       "forward": a variable is assigned before it is read, as in a program; "shuffled": in any order.
    variables   tokens that are variables; those of a sequence all differ.
    values      tokens that are values; those of a sequence all differ.
    window      the natural one; it must divide the statements' 3 chains (hops + 1) tokens.

    Tokens are the variables, the values, then [=] and [?].
    """

    chains: int = 4
    hops: int = 7
    first_hops: int | None = None
    queries: int = 4
    ask: str = "values"
    order: str = "forward"
    variables: int = 128
    values: int = 64
    window: int = 24

    name: ClassVar[str] = "variable_tracking"
    metric: ClassVar[str] = "per_label"

    def __post_init__(self):
        check_choice("ask", self.ask, ASKS)
        check_choice("order", self.order, ORDERS)
        check_counts(self, chains=1, hops=0, queries=1, window=1)
        check_counts(self, variables=self.statements, values=self.chains)
        most = self.chains if self.ask == "variables" else self.statements
        if self.queries > most:
            raise ValueError(f"queries: expected at most {most} with ask={self.ask!r}, got {self.queries}")
        # Of so few hops there have to be as many variables as are asked for.
        check_first(self, "first_hops", -(-self.queries // self.chains) - 1, self.hops)
        by_value = self.first_hops is None or self.ask == "values"
        expect(by_value, "first_hops", f"None with ask={self.ask!r}", self.first_hops)
        if self.context % self.window:
            raise ValueError(f"window: expected a divisor of the statements' {self.context} tokens, got {self.window}")

    @property
    def statements(self) -> int:
        return self.chains * (self.hops + 1)

    @property
    def context(self) -> int:
        """Tokens before the questions."""
        return 3 * self.statements

    @property
    def answers(self) -> int:
        """Labels per question."""
        return 1 if self.ask == "values" else self.hops + 1

    @property
    def seq_len(self) -> int:
        return self.context + self.queries * (1 + self.answers)

    @property
    def vocab_size(self) -> int:
        return self.variables + self.values + 2

    @property
    def stages(self) -> int:
        return stages_from(self.first_hops, self.hops)

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        device: torch.device | str = "cpu",
        *,
        split: str = "train",
        stage: int | None = None,
    ) -> Batch:
        """Batch number `step` of the stream (seed, split): `size` sequences of `seq_len` tokens.

        input_ids and labels come on `device`, loss_mask on the CPU.
        """
        stream, rows = Stream(seed, step, size, split), np.arange(size)[:, None]
        equals, question = self.variables + self.values, self.variables + self.values + 1
        variables = stream.distinct(self.variables, size, self.statements).reshape(size, self.chains, -1)
        values = self.variables + stream.distinct(self.values, size, self.chains)
        read = np.concatenate([values[..., None], variables[..., :-1]], 2)
        time = stream.uniform(size, self.chains, self.hops + 1)
        if self.order == "forward":
            time.sort(2)
        order = time.reshape(size, -1).argsort(1)
        statements = np.full((size, self.statements, 3), equals)
        statements[..., 0] = variables.reshape(size, -1)[rows, order]
        statements[..., 2] = read.reshape(size, -1)[rows, order]

        if self.ask == "values":
            near = 1 + at_stage(stage, self.first_hops, self.hops)  # variables of a chain that may be asked for
            asked = stream.distinct(self.chains * near, size, self.queries)
            asked = asked // near * (self.hops + 1) + asked % near
            given = variables.reshape(size, -1)[rows, asked]
            answers = values[rows, asked // (self.hops + 1)][..., None]
        else:
            asked = stream.distinct(self.chains, size, self.queries)
            given, answers = values[rows, asked], variables[rows, asked]
        questions = np.full((size, self.queries, 1 + self.answers), question)
        questions[..., 1] = given
        questions[..., 2:] = answers[..., :-1]
        labels = np.full((size, self.seq_len), IGNORE_INDEX)
        labels[:, self.context :].reshape(questions.shape)[..., 1:] = answers
        input_ids = np.concatenate([statements.reshape(size, -1), questions.reshape(size, -1)], 1)
        return as_batch(input_ids, labels, device)

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        batch_size: int = 512,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Accuracy of `model` on `samples` sequences of the evaluation stream.

        Returns per_label, exact (all labels of a sequence right), exact_stderr (its binomial standard error), loss
        (nats per label), samples, and hops_i: labels right of variables i assignments away from their value.
        """
        s = score(self, model, samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        if self.ask == "values":
            depth = self._depths(s.input_ids)
        else:
            depth = torch.arange(self.answers).repeat(samples, self.queries)
        right = s.right[s.asked].view(depth.shape)
        return s.summary() | by_level("hops", right, depth, range(self.hops + 1))

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without following assignments: any of the values, or variables, that were read.

        majority, uniform: exact; per_label: of one label.
        """
        label = 1 / (self.chains if self.ask == "values" else self.statements)
        exact = label ** (self.queries * self.answers)
        return {"uniform": exact, "majority": exact, "per_label": label}

    def render(self, input_ids: Tensor, labels: Tensor) -> str:
        """One sequence, input_ids and labels int64 [T], as statements and answered questions."""

        def shown(token: int) -> str:
            return f"x{token}" if token < self.variables else str(token - self.variables)

        ids, expected = input_ids.tolist(), labels.tolist()
        lines = [f"{shown(ids[i])} = {shown(ids[i + 2])}" for i in range(0, self.context, 3)]
        for at in range(self.context, self.seq_len, 1 + self.answers):
            answers = " ".join(shown(token) for token in expected[at + 1 : at + 1 + self.answers])
            lines.append(f"{shown(ids[at + 1])}? {answers}")
        return "\n".join(lines)

    def _depths(self, input_ids: Tensor) -> Tensor:
        """Hops between each variable that is asked for and its value: int64 [B, queries]."""
        statements = input_ids[:, : self.context].unflatten(1, (-1, 3))
        # source[b, x]: what x was assigned; values stand for themselves.
        source = torch.arange(self.vocab_size).repeat(len(input_ids), 1)
        source.scatter_(1, statements[..., 0], statements[..., 2])
        at = source.gather(1, input_ids[:, self.context + 1 :: 2])
        depth = torch.zeros_like(at)
        for _ in range(self.hops):
            depth += at < self.variables
            at = source.gather(1, at)
        return depth
