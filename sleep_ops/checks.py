"""Checks of settings, which are plain values; those of tensors are in `validation`. Nothing here needs PyTorch."""

import sys
from collections.abc import Sequence
from typing import TypeGuard

RULES = ("delta", "hebbian")
IMPLS = ("auto", "triton", "torch", "reference")
BACKENDS = ("auto", "flash", "torch")  # of attention


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """ValueError in this project's words unless `condition`."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether value is an int or a float, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether value is an int or a float, and finite as a float."""
    return is_number(value) and abs(value) <= sys.float_info.max


def check_positive(settings: object, *names: str) -> None:
    """Raise unless each of these settings is a finite number > 0."""
    for name in names:
        value = getattr(settings, name)
        expect(is_finite(value) and value > 0, name, "a number > 0", value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(**flags: object) -> None:
    """Raise unless every flag is True or False: the truth of anything else, as of "no", would be a guess."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether value is an int >= least, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless value is an int >= least."""
    expect(is_count(value, least), name, f"an integer >= {least}", value)


def check_seed(value: object) -> None:
    """Raise unless value is an int from 0 to 2^63 - 1."""
    check_count("seed", value, 0)
    expect(value < 2**63, "seed", "an integer < 2^63", value)  # type: ignore[operator]


def check_counts(settings: object, **least: int) -> None:
    """Raise unless each of these settings is an int >= what is given for it."""
    for name, low in least.items():
        check_count(name, getattr(settings, name), low)


def check_distinct(name: str, values: Sequence) -> None:
    """Raise where one of the values is there twice."""
    twice = [str(value) for i, value in enumerate(values) if value in values[:i]]
    expect(not twice, name, "distinct ones", f"{', '.join(dict.fromkeys(twice))} more than once")


def check_distinct_counts(name: str, values: Sequence[int]) -> None:
    """Raise unless these are ints >= 1, at least one, none of them twice."""
    right = len(values) > 0 and all(map(is_count, values)) and len(set(values)) == len(values)
    expect(right, name, "distinct integers >= 1", values)
