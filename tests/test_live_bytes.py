"""Bytes of live tensors, counted by kind."""

import torch
from torch import nn

from sleep_ops.training.memory import LiveBytes


def test_storages_are_counted_once_and_while_they_live():
    with LiveBytes() as count:
        x = torch.ones(10)
        views = x[2:5], x.view(5, 2)
        assert count.now["activations"] == 40
        y = x + 1
        del x
        assert count.now["activations"] == 80
        del views
        assert count.now["activations"] == 40
        assert count.most[""] == {"activations": 80}
        count.begin("later")
        assert count.most["later"] == {"activations": 40}
        del y
    assert count.now["activations"] == 0 and count.most["later"] == {"activations": 40}


def test_kinds():
    x, layer = torch.ones(10), nn.Linear(4, 4, bias=False)
    count = LiveBytes()
    count.mark("parameters", [None, layer.weight])
    with count:
        rounded = layer.weight.bfloat16()  # a copy of weights
        with count.making("updates"):
            y = x + 1
        count.mark("gradients", [y])
        z = x * 2
    assert count.now == {"parameters": 64, "gathered": 32, "gradients": 40, "activations": 40, "updates": 0}
    del rounded, y, z
    assert sum(count.now.values()) == 64


def test_storages_that_change_their_size():
    before = torch.UntypedStorage.resize_
    with LiveBytes() as count:
        x = torch.ones(10)
        x.untyped_storage().resize_(0)
        assert count.now["activations"] == 0
        x.untyped_storage().resize_(80)
        assert count.now["activations"] == 80
    assert torch.UntypedStorage.resize_ is before


def test_what_has_no_memory_is_not_counted():
    with LiveBytes() as count:
        x = torch.ones(10, device="meta") + 1
    assert x.is_meta and sum(count.now.values()) == 0
