"""Attention against a float64 softmax written out, the choice of library, and the states of the layer."""

import sys
import types

import pytest
import torch
from judge import exact

from sleep_ops.layers.attention import Attention, SpanContext
from sleep_ops.ops import attention as module
from sleep_ops.ops.attention import causal_attention, visible_keys


def spelled_out(q, k, v, offsets, window):
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            top = offsets[b] + i
            low = 0 if window is None else max(0, top - window + 1)
            for h in range(q.shape[2]):
                keys, values = k[b, low : top + 1, h // group], v[b, low : top + 1, h // group]
                out[b, i, h] = (keys @ q[b, i, h] * q.shape[-1] ** -0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 6, 9])
@pytest.mark.parametrize("queries, keys", [(6, 6), (3, 6), (1, 6), (1, 1)])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_exact_window(queries, keys, heads, kv_heads, window):
    torch.manual_seed(0)
    q = torch.randn(2, queries, heads, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, kv_heads, 4, dtype=torch.float64)
    expected = spelled_out(q, k, v, [keys - queries] * 2, window)
    exact(causal_attention(q, k, v, window=window), expected)


def test_rows_of_different_lengths():
    torch.manual_seed(0)
    held, lengths = torch.tensor([2, 0, 4]), torch.tensor([3, 1, 0])
    q = torch.randn(3, 3, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 3, 5, 2, 4, dtype=torch.float64)
    mask = visible_keys(3, 5, held, lengths, 3)
    assert mask.any(-1).all()
    out = causal_attention(q, k, v, mask=mask)
    expected = spelled_out(q, k, v, held.tolist(), 3)
    assert out.isfinite().all()
    for b, n in enumerate(lengths):
        exact(out[b, :n], expected[b, :n])


def test_the_newest_flash_attention_is_called_with_an_exact_window(monkeypatch):
    calls = []

    def fake(q, k, v, **options):
        calls.append(options)
        return q, None

    monkeypatch.setattr(module, "_FLASH_MODULES", (("missing_flash", (9, 9), 256), ("fake_flash", (8, 9), 64)))
    monkeypatch.setitem(sys.modules, "fake_flash", types.SimpleNamespace(flash_attn_func=fake))
    module.flash_function.cache_clear()
    assert module.flash_function(7, 64) is None and module.flash_function(10, 64) is None
    assert module.flash_function(9, 65) is None
    assert module.flash_function(9, 64) is fake and module.flash_function(8, 64) is fake
    monkeypatch.setattr(module, "_flash_for", lambda q, backend: fake)
    x = torch.randn(1, 4, 2, 8)
    assert causal_attention(x, x, x, window=3) is x
    assert causal_attention(x, x, x) is x
    assert calls == [dict(causal=True, deterministic=True, window_size=(2, 0)), dict(causal=True, deterministic=True)]
    module.flash_function.cache_clear()


def test_flash_attention_is_refused_where_it_can_not_run():
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="^backend: 'flash'"):
        causal_attention(x, x, x, backend="flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 96])
def test_flash_attention_agrees_with_torch(window):
    if module.flash_function(torch.cuda.get_device_capability()[0], 64) is None:
        pytest.skip("flash-attn is not installed")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    ours = causal_attention(q[:, -128:], k, v, window=window, backend="flash")
    torch.testing.assert_close(ours, causal_attention(q[:, -128:], k, v, window=window, backend="torch"))


def test_the_cache_continues_a_text():
    torch.manual_seed(0)
    layer = Attention(16, num_heads=4, num_kv_heads=2, head_dim=4).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)

    def context(first, last):
        return SpanContext((last - first,) * 2, (first,) * 2, (first,) * 2, 5, x.device)

    whole, _ = layer(x, layer.init_state(2), context(0, 7))
    one, state = layer(x[:, :3], layer.init_state(2), context(0, 3))
    two, state = layer(x[:, 3:], state, context(3, 7))
    exact(torch.cat([one, two], 1), whole)
    nothing, kept = layer(x, layer.init_state(2), context(0, 7), output=False)
    exact(kept, state)
    assert nothing is None


def test_rotary_depends_on_distance_alone():
    torch.manual_seed(0)
    layer = Attention(8, num_heads=1).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    near = layer(x, layer.init_state(1), SpanContext((4,), (0,), (0,), None, x.device))[0]
    far = layer(x, layer.init_state(1), SpanContext((4,), (0,), (100000,), None, x.device))[0]
    exact(near, far, rtol=1e-5, atol=1e-6)
