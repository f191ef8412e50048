"""Checks of the benchmarks' settings: ValueError naming the setting, what was expected and what was got."""

from collections.abc import Iterable

from sleep_ops.bench.cases import DTYPES


def check_counts(settings: object, *names: str, **lowest: int) -> None:
    """Integers, or None; at least 1 for `names`, at least what is given for the others."""
    for name, low in (dict.fromkeys(names, 1) | lowest).items():
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


def check_distinct_counts(settings: object, *names: str) -> None:
    """Tuples of distinct integers >= 1, or None."""
    for name in names:
        values = getattr(settings, name)
        if values is not None and (not values or min(values) < 1 or len(set(values)) < len(values)):
            raise ValueError(f"{name}: expected distinct integers >= 1, got {values!r}")


def check_choices(settings: object, **known: Iterable[str]) -> None:
    """Tuples of distinct known names, at least one."""
    for name, names in known.items():
        chosen = getattr(settings, name)
        if not chosen or not set(chosen) <= set(names) or len(set(chosen)) < len(chosen):
            raise ValueError(f"{name}: expected distinct ones of {', '.join(names)}, got {', '.join(chosen)!r}")


def check_dtype(settings: object) -> None:
    """A name in DTYPES, or None."""
    dtype = settings.dtype  # type: ignore[attr-defined]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {tuple(DTYPES)}, got {dtype!r}")
