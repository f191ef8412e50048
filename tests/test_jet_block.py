"""The dynamic convolution and the Jet block, against plain transcriptions; Jet blocks in a model that sleeps."""

import pytest
import torch
import torch.nn.functional as F
from small import DEVICE, HYBRIDS, VOCAB, WINDOW, close, hybrid, make, normal, some_state, tokens, vectors

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.layers.attention import Attention
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.jet import JetBlock
from sleep_ops.ops.dynamic_conv import dynamic_convolution
from sleep_ops.ops.short_conv import short_convolution
from sleep_ops.reference import sleep_gated_delta_rule_reference

SLEEPS = {
    "plain": {},
    "two_passes": dict(passes=2, window=4),
    "no_window": dict(passes=2, window=None, output_pass="last"),
    "hebbian": dict(rule="hebbian"),
    "conv3": dict(conv_size=3),
    "conv1": dict(conv_size=1),
}


def convolved(x, kernels, conv_state, silu=True):
    """One sequence x [T, D], token by token: (outputs, the inputs a continuation needs)."""
    W = kernels.shape[-1]
    seen = torch.cat([conv_state, x])
    out = torch.stack([(seen[t : t + W] * kernels[t].T).sum(0) for t in range(x.shape[0])])
    return F.silu(out) if silu else out, seen[len(seen) - W + 1 :]


@pytest.mark.parametrize("activation", ["silu", None], ids=str)
@pytest.mark.parametrize("carried_on", [True, False], ids=["carried", "fresh"])
@pytest.mark.parametrize("T, W", [(7, 4), (2, 4), (1, 4), (5, 1)], ids=lambda n: str(n))
def test_convolves_as_written(T, W, carried_on, activation):
    x, kernels = normal(2, T, 3, dtype=torch.float64), normal(2, T, 3, W, seed=1, dtype=torch.float64)
    conv_state = normal(2, W - 1, 3, seed=2, dtype=torch.float64) if carried_on else None
    output, carried = dynamic_convolution(x, kernels, conv_state=conv_state, activation=activation)
    for b in range(2):
        before = conv_state[b] if carried_on else x.new_zeros(W - 1, 3)
        close(
            (output[b], carried[b]), convolved(x[b], kernels[b], before, activation == "silu"), rtol=1e-12, atol=1e-12
        )


def test_equal_kernels_are_a_short_convolution():
    x, weight, conv_state = normal(2, 9, 5), normal(5, 4, seed=1), normal(2, 3, 5, seed=2)
    lengths = torch.tensor([9, 4], device=DEVICE)
    expected = short_convolution(x, weight, conv_state=conv_state, lengths=lengths, impl="torch")
    close(dynamic_convolution(x, weight.expand(2, 9, 5, 4), conv_state=conv_state, lengths=lengths), expected)


@pytest.mark.parametrize("carried_on", [True, False], ids=["carried", "fresh"])
def test_padded_and_packed_rows_equal_single_ones(carried_on):
    lengths, W = (6, 0, 2, 3), 4
    x, kernels = normal(4, 6, 3, dtype=torch.float64), normal(4, 6, 3, W, seed=1, dtype=torch.float64)
    conv_state = normal(4, W - 1, 3, seed=2, dtype=torch.float64) if carried_on else None
    count = torch.tensor(lengths, device=DEVICE)
    for b, n in enumerate(lengths):
        x[b, n:] = 0
    output, carried = dynamic_convolution(x, kernels, conv_state=conv_state, lengths=count)
    borders = F.pad(count.cumsum(0), (1, 0))
    flat_x = torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None]
    flat_kernels = torch.cat([kernels[b, :n] for b, n in enumerate(lengths)])[None]
    packed, packed_carried = dynamic_convolution(flat_x, flat_kernels, conv_state=conv_state, cu_seqlens=borders)
    close(packed_carried, carried, rtol=0, atol=0)
    for b, n in enumerate(lengths):
        before = conv_state[b] if carried_on else x.new_zeros(W - 1, 3)
        expected = convolved(x[b, :n], kernels[b, :n], before) if n else (x[b, :0], before)
        close((output[b, :n], carried[b]), expected, rtol=1e-12, atol=1e-12)
        close(packed[0, borders[b] : borders[b + 1]], expected[0], rtol=1e-12, atol=1e-12)
        assert not output[b, n:].any()


@pytest.mark.parametrize("kind", ["rows", "padded", "packed"])
def test_gradients_of_the_convolution(kind):
    options = {"padded": dict(lengths=torch.tensor([5, 2])), "packed": dict(cu_seqlens=torch.tensor([0, 2, 5]))}
    options = {name: value.to(DEVICE) for name, value in options.get(kind, {}).items()}
    rows = 1 if kind == "packed" else 2
    inputs = normal(rows, 5, 2, dtype=torch.float64), normal(rows, 5, 2, 3, seed=1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*inputs, normal(2, 2, 2, seed=2, dtype=torch.float64))]
    for activation in ("silu", None):
        assert torch.autograd.gradcheck(
            lambda x, kernels, conv_state, a=activation: dynamic_convolution(
                x, kernels, conv_state=conv_state, activation=a, **options
            ),
            inputs,
        )


def test_low_precision_sums_in_float32():
    x, kernels = normal(2, 9, 5, dtype=torch.bfloat16), normal(2, 9, 5, 4, seed=1, dtype=torch.bfloat16)
    inputs = x.requires_grad_(), kernels.requires_grad_()
    output = dynamic_convolution(*inputs).output
    wide = [t.detach().float().requires_grad_() for t in inputs]
    exact = dynamic_convolution(*wide).output
    assert torch.equal(output, exact.bfloat16())
    grads = torch.autograd.grad(output.float().sum(), inputs)
    for grad, expected in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert torch.equal(grad, expected.bfloat16())


def test_published_names_and_sizes():
    layer = JetBlock(16, num_heads=2, head_dim=12, head_v_dim=32)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": (24, 16),
        "k_proj.weight": (24, 16),
        "v_proj.weight": (64, 16),
        "b_proj.weight": (2, 16),
        "a_proj.weight": (2, 16),
        "g_proj.weight": (64, 16),
        "o_proj.weight": (16, 64),
        "dynamic_conv1d.kernel_generator.w1.weight": (8, 16),
        "dynamic_conv1d.kernel_generator.w2.weight": (256, 8),
        "dynamic_conv1d.kernel_generator.w2.bias": (256,),
        "o_norm.weight": (32,),
        "A_log": (2,),
        "dt_bias": (2,),
    }
    state = layer.init_state(3)
    assert state.fast_weights.shape == (3, 2, 12, 32) and state.conv_state.shape == (3, 3, 64)
    assert layer.o_norm.eps == 1e-5 and not layer.allow_neg_eigval


@pytest.mark.parametrize("sleep", SLEEPS)
def test_replays_what_the_reference_replays(sleep):
    layer = make(JetBlock, dtype=torch.float64, **SLEEPS[sleep])
    weights = dict(layer.named_parameters())
    x, state = vectors(dtype=torch.float64), some_state(layer)

    def linear(name):
        return x @ weights[f"{name}.weight"].T

    generator = "dynamic_conv1d.kernel_generator"
    kernels = F.silu(linear(f"{generator}.w1")) @ weights[f"{generator}.w2.weight"].T + weights[f"{generator}.w2.bias"]
    kernels = kernels.unflatten(-1, (24, layer.conv_size))
    rows = [convolved(linear("v_proj")[b], kernels[b], state.conv_state[b]) for b in range(3)]
    v, conv_state = (torch.stack(part) for part in zip(*rows, strict=True))
    o, fast_weights = sleep_gated_delta_rule_reference(
        F.silu(linear("q_proj")).unflatten(-1, (2, 8)),
        F.silu(linear("k_proj")).unflatten(-1, (2, 8)),
        v.unflatten(-1, (4, 6)),
        linear("a_proj"),
        linear("b_proj"),
        passes=layer.passes,
        window=layer.window,
        output_pass=layer.output_pass,
        initial_state=state.fast_weights,
        rule=layer.rule,
        use_qk_l2norm=True,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        use_beta_sigmoid=True,
    )
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights["o_norm.weight"]
    y = (o * F.silu(linear("g_proj").unflatten(-1, (4, 6)))).flatten(2) @ weights["o_proj.weight"].T
    actual, new_state = layer(x, state=state, return_state=True)
    close((actual, *new_state), (y, fast_weights, conv_state), rtol=1e-9, atol=1e-9)


def test_new_dynamic_convolutions_start_static_and_learn():
    torch.manual_seed(0)
    layer = JetBlock(20, num_heads=4, head_dim=16).to(DEVICE)
    generator = layer.dynamic_conv1d.kernel_generator
    x = vectors()
    close(generator(x), generator.w2.bias.expand(3, 11, -1), rtol=0, atol=0)
    assert abs(generator.w2.bias.std() - 0.02) < 0.004
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())
    assert (generator(x) - generator.w2.bias).abs().max() > 0


@pytest.mark.parametrize("options", HYBRIDS)
def test_padded_rows_stay_independent(options):
    model, prompts = hybrid(**options), [tokens(1, n, seed=n) for n in (9, 4, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 9 - prompt.shape[1] :], mask[b, 9 - prompt.shape[1] :] = prompt[0], 1
    together, more = SleepSession(model), tokens(3, 8, seed=7)
    first = together.read(ids, mask)
    second = together.read(more, all_logits=True)
    for b, prompt in enumerate(prompts):
        alone = SleepSession(model)
        torch.testing.assert_close(first[b : b + 1], alone.read(prompt), rtol=1e-8, atol=1e-8)
        expected = alone.read(more[b : b + 1], all_logits=True)
        torch.testing.assert_close(second[b : b + 1], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["refine", "replay"])
def test_gradients_reach_every_parameter_through_sleep(kind):
    ids, grads = tokens(), []
    labels = torch.full_like(ids, -100)
    labels[:, 15:] = 1
    for checkpointing in (False, True):
        model = hybrid(passes=3, sleep_kind=kind, activation_checkpointing=checkpointing)
        model(ids, labels=labels).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        assert all(g is not None and g.any() for g in grads[-1])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_sliding_attention_sees_its_own_window_at_most(eviction):
    for sliding in (2, WINDOW, 50):
        model = hybrid(layers=("swa",), sliding_window=sliding, eviction=eviction)
        ids, reach = tokens(1, 13), min(sliding, WINDOW)
        before = model(ids).logits
        for t in range(13):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            moved = (model(changed).logits - before).abs().amax(-1)[0] > 1e-9
            same_window = [eviction == "sliding" or i // WINDOW == t // WINDOW for i in range(13)]
            assert moved.tolist() == [t <= i < t + reach and same_window[i] for i in range(13)]


def test_blocks_are_what_the_configuration_says():
    model = SleepHybridModel(
        HybridConfig(
            vocab_size=5, hidden_size=16, layers=("swa", "jet", "gdn", "attn"), window=4, sliding_window=3, num_heads=2,
            gdn_num_heads=1, gdn_num_v_heads=2, gdn_head_dim=4, gdn_head_v_dim=6, conv_size=3, jet_kernel_hidden=7,
            norm_eps=1e-4, initializer_range=0.1,
        )
    )  # fmt: skip
    swa, jet, gdn, attn = (block.mixer for block in model.blocks)
    assert isinstance(swa, Attention) and swa.sliding_window == 3
    assert isinstance(attn, Attention) and attn.sliding_window is None
    assert isinstance(gdn, SleepGDNLayer) and isinstance(jet, JetBlock)
    for mixer in (jet, gdn):
        sizes = (mixer.num_heads, mixer.num_v_heads, mixer.head_dim, mixer.head_v_dim, mixer.conv_size)
        assert sizes == (1, 2, 4, 6, 3) and mixer.o_norm.eps == 1e-4
    generator = jet.dynamic_conv1d.kernel_generator
    assert generator.w1.out_features == 7 and not generator.w2.weight.any() and generator.w2.bias.std() > 0.05
    assert [block.fast_weights for block in model.blocks] == [False, True, True, False]


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(layers=("jet", "mamba")), "layers"),
        (dict(sliding_window=None), "sliding_window"),
        (dict(sliding_window=0), "sliding_window"),
        (dict(jet_kernel_hidden=1.5), "jet_kernel_hidden"),
        (dict(layers=("jet",), gdn_num_heads=3), "gdn_num_v_heads"),
        (dict(layers=("swa",), num_kv_heads=3), "num_kv_heads"),
        (dict(layers=("swa",), head_dim=3), "head_dim"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_configurations_name_the_field(change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        hybrid(**change)


@pytest.mark.parametrize("size", [0, 1.5])
def test_bad_sizes_of_the_kernel_generator_name_the_argument(size):
    with pytest.raises(ValueError, match="^kernel_hidden: expected .*got "):
        JetBlock(20, num_heads=2, head_dim=8, kernel_hidden=size)
