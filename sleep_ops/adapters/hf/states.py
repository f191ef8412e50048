"""A mixer's state in a cache of transformers, wherever that keeps it.

    from 5.14     cache.layers[i].conv_states[0], recurrent_states[0]
    before        cache.layers[i].conv_states, recurrent_states
    olmo_hybrid before 5.15   cache.conv_states_q[i], _k[i], _v[i], recurrent_states[i]

Convolution states are `[B, channels, W]`, of which the last conv_size - 1 inputs count; recurrent
states are the fast weights `[B, HV, K, V]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.checks import expect
from sleep_ops.layers.mixer import GDNMixer, GDNState


def cached_state(cache, mixer: GDNMixer) -> GDNState | None:
    """What the cache holds of the mixer's layer; None before its first token.

    ValueError if it may be rolled back.
    """
    i = mixer.layer_idx
    if hasattr(cache, "conv_states_q"):
        inputs, fast_weights = [states[i] for states in _by_convolution(cache)], cache.recurrent_states[i]
        if fast_weights is None:
            return None
        inputs = torch.cat(inputs, dim=1)
    elif cache.has_previous_state(i):
        layer = cache.layers[i]
        recording = getattr(layer, "record_past", False)
        expect(not recording, "past_key_values", "a cache that is never rolled back", "one that records its past")
        inputs, fast_weights = _only(layer.conv_states), _only(layer.recurrent_states)
    else:
        return None
    # The fast weights are copied, since the cache overwrites its own.
    return GDNState(fast_weights.clone(), inputs[..., inputs.shape[-1] - (mixer.conv_size - 1) :].transpose(1, 2))


def store_state(cache, mixer: GDNMixer, state: GDNState) -> None:
    """Replaces what the cache holds of the mixer's layer."""
    i, inputs = mixer.layer_idx, state.conv_state.transpose(1, 2)
    if hasattr(cache, "conv_states_q"):
        parts = inputs.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=1)
        for states, part in zip(_by_convolution(cache), parts, strict=True):
            states[i] = part
        cache.recurrent_states[i] = state.fast_weights
        return
    # conv_size wide, it takes the place of all that was held.
    cache.update_conv_state(F.pad(inputs, (1, 0)), i, conv_kernel_size=mixer.conv_size)
    cache.update_recurrent_state(state.fast_weights, i)


def _by_convolution(cache) -> tuple[list, list, list]:
    return cache.conv_states_q, cache.conv_states_k, cache.conv_states_v


def _only(states: Tensor | dict[int, Tensor]) -> Tensor:
    return states[0] if isinstance(states, dict) else states
