"""How functions that launch kernels become PyTorch operators, and what a launch needs of its tensors."""

import contextlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sleep_ops.validation import check_first_order

MAX_ROW_STRIDE = 2**31 // 64 - 2**16  # of a chunk of 64 tokens, and a row's width


def operator(*, shapes: Callable) -> Callable:
    """Decorates a launcher: it becomes an operator that torch.compile keeps whole, sleep_ops::<its name>.

    The launcher takes tensors or None and plain options, all annotated, and returns tensors or None. Operators return
    tensors alone: an absent one is empty.

    shapes: takes the launcher's arguments and returns what it returns, with nothing computed.
    """
    return lambda launch: _define(launch.__name__, torch.library.infer_schema(launch, mutates_args=()), launch, shapes)


def differentiable(public: str, *, outputs: str, gradients: str, shapes: Callable, backward: Callable) -> Callable:
    """`operator`, which autograd differentiates once; that of its backward is sleep_ops::<its name>_backward.

    public: the function that users call, for messages.
    outputs: names of what the launcher returns, with spaces between.
    gradients: names of the arguments that have one.
    backward: launches the backward. Of what it takes only the names count: first d_<output>, an output's cotangent or
        None; then tensors and then options, out of the launcher's arguments and outputs. Just those are kept for it.
        Returns `gradients`; None for an argument that is None, or whose gradient is zero.
    """
    results, wanted = outputs.split(), gradients.split()

    def decorate(forward: Callable) -> Callable:
        name = forward.__name__
        schema = torch.library.infer_schema(forward, mutates_args=())
        declared = _declared(schema)
        arguments = list(declared)
        known = [*arguments, *results]
        declared |= {x: f"Tensor {x}" for x in results} | {f"d_{x}": f"Tensor? d_{x}" for x in results}
        taken = list(inspect.signature(backward).parameters)
        needed = [f"d_{x}" in taken for x in results]
        kept = taken[sum(needed) :]
        num_tensors = sum(declared[x].startswith("Tensor") for x in kept)
        # places of what is kept, wanted and found
        kept_at, wanted_at = [known.index(x) for x in kept], [taken.index(x) for x in wanted]
        found_at = [(i, wanted.index(x)) for i, x in enumerate(arguments) if x in wanted]

        def launch_backward(*args):
            found = list(backward(*args))
            for i, at in enumerate(wanted_at):
                if found[i] is None and args[at] is not None:
                    found[i] = args[at].new_zeros(args[at].shape)
            return found

        def backward_shapes(*args):
            return [args[at] if args[at] is None else args[at].new_empty(args[at].shape) for at in wanted_at]

        def save(ctx, inputs, output):
            values = (*inputs, *output) if len(results) > 1 else (*inputs, output)
            values = [values[at] for at in kept_at]
            ctx.save_for_backward(*values[:num_tensors])
            ctx.options = values[num_tensors:]
            ctx.present = [i for i, _ in found_at if inputs[i] is not None]
            ctx.set_materialize_grads(False)

        def differentiate(ctx, *received):
            cotangents = [d for d, is_needed in zip(received, needed, strict=True) if is_needed]
            gradients = [None] * len(arguments)
            if any(d is not None for d in cotangents):
                check_first_order(public)
                found = backward_operator(*cotangents, *ctx.saved_tensors, *ctx.options)
                for i, at in found_at:
                    if i in ctx.present:
                        gradients[i] = found[at]
            return tuple(gradients)

        takes, returns = ", ".join(declared[x] for x in taken), ", ".join("Tensor" for _ in wanted)
        made = _define(name, schema, forward, shapes)
        backward_operator = _define(f"{name}_backward", f"({takes}) -> ({returns})", launch_backward, backward_shapes)
        torch.library.register_autograd(f"sleep_ops::{name}", differentiate, setup_context=save)
        return made

    return decorate


def _define(name: str, schema: str, launch: Callable, shapes: Callable) -> Callable:
    """An operator of any device. By hand, because `torch.library.custom_op` adds checks of every call to its time."""
    there = next(i for i, x in enumerate(_declared(schema).values()) if x.startswith("Tensor "))  # always a tensor

    def run(*args):
        with on_device(args[there]):
            return _tensors(launch(*args), args[there])

    torch.library.define(f"sleep_ops::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"sleep_ops::{name}", "default", run)
    torch.library.register_fake(f"sleep_ops::{name}", lambda *args: _tensors(shapes(*args), args[there]))
    return getattr(torch.ops.sleep_ops, name).default


def _declared(schema: str) -> dict[str, str]:
    """A schema's arguments, as they are declared, by name."""
    return {x.split()[-1]: x for x in schema[1 : schema.index(") ->")].split(", ")}


def _tensors(found: Tensor | Sequence[Tensor | None], like: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Custom operators return tensors: an absent one is empty."""
    return found if isinstance(found, Tensor) else tuple([like.new_empty(0) if x is None else x for x in found])


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, on which Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, heads, dim] as rows of contiguous heads a fixed number of elements apart, copied if it is not.

    Or if they are so far apart that offsets inside a chunk overflow 32 bits.
    """
    B, T, heads, dim = x.shape
    row_stride = x.stride(1) if T > 1 else x.stride(0)
    dense = (dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == dim)
    in_reach = row_stride <= MAX_ROW_STRIDE
    if dense and in_reach and (B == 1 or x.stride(0) == T * row_stride):
        return x, row_stride
    return x.contiguous(), heads * dim


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where they are not contiguous; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]
