"""What transformers, peft, torch.compile and FSDP2 do with a model that sleeps while it learns."""

import copy
import dataclasses
import inspect
import io
import logging
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import slow_unless
from hf_models import VERSION, VOCAB, build, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, default_data_collator

from sleep_ops import SleepSession
from sleep_ops.adapters.hf import from_pretrained, insert_fast_weights, sleepify
from sleep_ops.model import loss
from sleep_ops.model.config import SleepSettings

CLOSE = dict(rtol=1e-4, atol=1e-6)
SMALL = dict(layer_types=["linear_attention", "full_attention", "linear_attention"], num_hidden_layers=3)


def sleeping(family="qwen3_5", **settings):
    return sleepify(build(family, **SMALL), **dict(window=8, passes=2) | settings)


def data(count, width=20, unlabelled=()):
    """Examples with a different number of labels each, and none where `unlabelled`."""
    examples = []
    for i, ids in enumerate(tokens(count, width, seed=7)):
        labels = ids.clone()
        labels[: 3 + 4 * (i % 4)] = -100
        if i in unlabelled:
            labels[:] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def fit(model, folder, dataset, *, batch=4, accumulate=1, steps=2, collate=None, **options):
    """Losses per step of plain gradient descent; the model is trained in place."""
    arguments = dict(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    arguments |= dict(max_steps=steps, learning_rate=0.05, optim="sgd", logging_steps=1, lr_scheduler_type="constant")
    arguments |= dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
    trainer = Trainer(model, TrainingArguments(**arguments | options), collate, train_dataset=dataset)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def in_chunks(monkeypatch):
    """Without return_logits the loss is taken of seven tokens at a time."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 7 * 4 * VOCAB)


def gradients(model, ids, **inputs):
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        bound = rtol * grad.abs().max().item() + 1e-8
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_weights(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


class TestTrainer:
    def test_accumulated_batches_count_as_one(self, tmp_path):
        """Examples of unequal numbers of labels, one of them without any, four at once or one by one."""
        start, dataset = sleeping(), data(8, unlabelled=(2,))
        models = [copy.deepcopy(start) for _ in range(2)]
        _, whole = fit(models[0], tmp_path, dataset)
        _, parts = fit(models[1], tmp_path, dataset, batch=1, accumulate=4)
        assert whole == pytest.approx(parts, rel=1e-4)
        assert_same_weights(*models)
        pairs = zip(start.parameters(), models[0].parameters(), strict=True)
        assert all(not torch.equal(p, q) for p, q in pairs if p.dim() > 1)

    def test_losses_are_those_of_the_model_without_sleep(self, tmp_path):
        """One pass over a window that holds the text: transformers' own numbers, step by step."""
        plain, dataset = build("qwen3_5", **SMALL), data(8)
        own = sleepify(copy.deepcopy(plain), window=32)
        _, expected = fit(plain, tmp_path, dataset, batch=2, accumulate=2)
        _, found = fit(own, tmp_path, dataset, batch=2, accumulate=2)
        assert found == pytest.approx(expected, rel=1e-4)
        assert_same_weights(own, plain)

    def test_gradient_checkpointing_is_ours(self, tmp_path, caplog):
        start, dataset = sleeping(passes=3), data(8)
        models = [copy.deepcopy(start) for _ in range(2)]
        _, stored = fit(models[0], tmp_path, dataset)
        with caplog.at_level(logging.WARNING, logger="transformers"):
            logging.getLogger("transformers").propagate = True
            try:
                _, again = fit(models[1], tmp_path, dataset, gradient_checkpointing=True)
            finally:
                logging.getLogger("transformers").propagate = False
        assert models[1].sleep.settings.activation_checkpointing
        assert not any(getattr(m, "gradient_checkpointing", False) for m in models[1].modules())
        assert "cache" not in caplog.text
        assert again == stored
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))

    def test_bfloat16_autocast(self, tmp_path):
        dataset = data(8)
        exact, rounded = sleeping(), sleeping()
        _, expected = fit(exact, tmp_path, dataset, steps=3)
        _, found = fit(rounded, tmp_path, dataset, steps=3, bf16=True)
        assert found == pytest.approx(expected, rel=0.01)
        assert all(p.dtype == torch.float32 for p in rounded.parameters())

    def test_evaluation_sees_logits_beside_their_labels(self, tmp_path):
        model, dataset = sleeping(), data(6)
        seen = []

        def metrics(prediction):
            logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
            seen.append(logits)
            targets = labels[:, 1:].flatten()
            return {"own": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).item()}

        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=3)
        trainer = Trainer(model, arguments, eval_dataset=dataset, compute_metrics=metrics)
        found = trainer.evaluate()
        assert seen[0].shape == (6, 20, VOCAB)
        with torch.no_grad():
            ids = torch.stack([x["input_ids"] for x in dataset])
            torch.testing.assert_close(seen[0], model.eval()(ids).logits, **CLOSE)
        assert math.isfinite(found["eval_loss"])
        same = Trainer(model, arguments, eval_dataset=dataset[:1], compute_metrics=metrics).evaluate()
        assert same["eval_loss"] == pytest.approx(same["eval_own"], rel=1e-4)

    def test_rows_without_labels_count_for_nothing_in_evaluation(self, tmp_path):
        """As in transformers, whose mean over no token is NaN, which Trainer leaves out."""
        plain, dataset = build("qwen3_5", **SMALL), data(4, unlabelled=(2,))
        own, losses = sleepify(copy.deepcopy(plain), window=32), []
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=1)
        for model in (plain, own):
            losses.append(Trainer(model, arguments, eval_dataset=dataset).evaluate()["eval_loss"])
        assert math.isfinite(losses[0]) or VERSION < (5, 23)  # former ones leave nothing out
        assert losses[1] == pytest.approx(losses[0], rel=1e-4, nan_ok=True)

    def test_a_collator_may_say_that_nobody_looks_at_logits(self, tmp_path, in_chunks):
        """Examples of unequal numbers of labels, one of them without any, one by one."""
        start, dataset = sleeping(), data(8, unlabelled=(2,))
        models = [copy.deepcopy(start) for _ in range(2)]
        kept, shapes = [], []
        models[1].lm_head.register_forward_hook(lambda _, x, out: shapes.append(out.shape[0]))
        models[1].register_forward_hook(lambda _, x, out: kept.append(out.logits))

        def collate(examples):
            return default_data_collator(examples) | {"return_logits": False}

        _, expected = fit(models[0], tmp_path, dataset, batch=1, accumulate=4)
        _, found = fit(models[1], tmp_path, dataset, batch=1, accumulate=4, collate=collate)
        assert found == pytest.approx(expected, rel=1e-4)
        assert_same_weights(*models)
        assert len(kept) == 8 and not any(x is not None for x in kept) and max(shapes) <= 7

    def test_a_checkpoint_is_loaded_again(self, tmp_path):
        model, dataset = sleeping(passes=3), data(4)
        trainer, _ = fit(model, tmp_path, dataset, steps=1)
        trainer.save_model(str(tmp_path / "saved"))
        ids = tokens(1, 20)
        with torch.no_grad():
            expected = model.eval()(ids).logits
            for load in (from_pretrained, lambda folder: sleepify(AutoModelForCausalLM.from_pretrained(folder))):
                torch.testing.assert_close(load(tmp_path / "saved")(ids).logits, expected)

    def test_training_goes_on_from_a_checkpoint(self, tmp_path):
        dataset = data(8)
        whole, resumed = sleeping(), sleeping()
        fit(whole, tmp_path / "whole", dataset, steps=3)
        fit(copy.deepcopy(resumed), tmp_path / "parts", dataset, steps=2, save_strategy="steps", save_steps=1)
        trainer, _ = fit(resumed, tmp_path / "none", dataset, steps=0)
        trainer.args.max_steps = 3
        trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        assert_same_weights(resumed, whole)


peft = pytest.importorskip("peft", reason="adapters are peft's")
TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj", "o_proj", "down_proj"]


def adapted(model, seed=3, **options):
    """The model with adapters that are not zero."""
    torch.manual_seed(seed)
    settings = dict(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


class TestAdapters:
    @pytest.mark.parametrize("kind", ("refine", "replay"))
    def test_gradients_are_the_chain_rule_on_merged_weights(self, kind):
        """dL/dA = s B^T G and dL/dB = s G A^T, with G the gradient of the same model with merged weights."""
        model, ids = adapted(sleeping(passes=3, sleep_kind=kind)), tokens(2, 20)
        merged = copy.deepcopy(model).merge_and_unload().requires_grad_()
        loss, grads = gradients(model, ids)
        merged_loss, whole = gradients(merged, ids)
        torch.testing.assert_close(loss, merged_loss, **CLOSE)
        assert grads and all("lora_" in name for name in grads)
        expected = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, peft.tuners.lora.Linear):
                continue
            G = whole[name.removeprefix("base_model.model.") + ".weight"]
            A, B, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            expected[f"{name}.lora_A.default.weight"] = scale * B.T @ G
            expected[f"{name}.lora_B.default.weight"] = scale * G @ A.T
        assert_same_gradients(grads, expected, rtol=1e-3)
        assert all(g.abs().max() > 0 for g in grads.values())

    def test_adapters_before_and_after_sleepify_are_the_same(self):
        start, ids = build("olmo_hybrid", **SMALL), tokens(2, 20)
        settings = dict(window=8, passes=2)
        after = adapted(sleepify(copy.deepcopy(start), **settings))
        before = sleepify(adapted(copy.deepcopy(start)), **settings)
        assert type(before) is type(after)
        (loss, grads), (other, others) = gradients(before, ids), gradients(after, ids)
        assert loss == other
        assert_same_gradients(grads, others, rtol=0)

    @pytest.mark.parametrize("dropout", (0.0, 0.3))
    def test_checkpointing_changes_no_gradient(self, dropout):
        """With dropout the recomputed pass draws the random numbers of the first one."""
        model, ids = adapted(sleeping(passes=3), lora_dropout=dropout).train(), tokens(2, 20)
        torch.manual_seed(5)
        loss, grads = gradients(model, ids)
        model.gradient_checkpointing_enable()
        assert model.sleep.settings.activation_checkpointing
        torch.manual_seed(5)
        again, recomputed = gradients(model, ids)
        assert again == loss
        assert_same_gradients(recomputed, grads, rtol=0)
        if dropout:
            assert gradients(model, ids)[0] != loss

    @pytest.mark.parametrize("dropout", (0.0, 0.3))
    def test_an_adapter_on_the_head_whose_logits_are_not_kept(self, dropout, in_chunks, monkeypatch):
        """Computed again with the random numbers of the first time; the frozen head has no gradient."""
        options = dict(target_modules=["lm_head"], lora_dropout=dropout)
        model, ids = adapted(sleeping(passes=2), **options).train(), tokens(2, 20)
        found = []
        for compute in (loss.checkpoint, lambda function, *arguments, **options: function(*arguments)):
            monkeypatch.setattr(loss, "checkpoint", compute)
            torch.manual_seed(5)
            found.append(gradients(model, ids, return_logits=False))
        assert found[0][0] == found[1][0]
        assert_same_gradients(found[0][1], found[1][1])
        assert found[0][1].keys() == {f"base_model.model.lm_head.lora_{x}.default.weight" for x in "AB"}
        if dropout == 0:
            expected, whole = gradients(model, ids)
            torch.testing.assert_close(found[0][0], expected)
            assert_same_gradients(found[0][1], whole)

    def test_only_adapters_are_trained(self, tmp_path):
        model = adapted(sleeping())
        before = copy.deepcopy(model.state_dict())
        fit(model, tmp_path, data(8), gradient_checkpointing=True)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name]) == ("lora_" not in name), name

    def test_tuned_norms(self):
        """peft's copies of the norms, the gated ones of the mixers among them, on, off and merged."""
        start, ids = sleeping(passes=3), tokens(2, 20)
        tuned = peft.LNTuningConfig(target_modules=["norm", "input_layernorm"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(start), tuned)
        _, grads = gradients(model, ids)
        copies = [name for name in grads if "linear_attn.norm.ln_tuning_layers" in name]
        assert len(copies) == 2 and all(grads[name].abs().max() > 0 for name in copies)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3)
            expected = model.eval()(input_ids=ids).logits
            with model.disable_adapter():
                torch.testing.assert_close(model(input_ids=ids).logits, start(ids).logits, **CLOSE)
            assert not torch.allclose(expected, start(ids).logits, atol=1e-3)
            torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, **CLOSE)

    def test_the_backbone_called_by_itself_sleeps_with_adapters(self):
        model, ids = adapted(sleeping(passes=3)).eval(), tokens(2, 20)
        with torch.no_grad():
            inner = model.base_model.model
            assert torch.equal(inner.lm_head(inner.model(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)

    def test_merging_keeps_sleep(self):
        model, ids = adapted(sleeping(passes=3)).eval(), tokens(2, 20)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            merged = model.merge_and_unload()
            assert merged.sleep.settings.passes == 3 and merged.sleep.model is merged
            torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=2e-4)

    def test_adapters_are_saved_and_loaded(self, tmp_path):
        model, ids = adapted(sleeping()).eval(), tokens(2, 20)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(sleeping(), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

    def test_sessions_and_generate_use_the_adapters(self):
        model, ids = adapted(sleeping()).eval(), tokens(1, 20)
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, -1]
            torch.testing.assert_close(SleepSession(model).read(ids), expected, **CLOSE)
            with model.disable_adapter():
                assert not torch.allclose(SleepSession(model).read(ids), expected)
        found = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(found[:, 20:], SleepSession(model).generate(ids, max_new_tokens=12, eos_token_id=2))

    def test_whole_modules_trained_beside_adapters_are_used(self):
        model, ids = adapted(sleeping(), modules_to_save=["conv1d", "norm", "lm_head"]), tokens(2, 20)
        _, grads = gradients(model, ids)
        saved = [name for name in grads if "modules_to_save" in name]
        assert {name.split(".")[-4] for name in saved} >= {"conv1d", "norm", "lm_head"}
        assert all(grads[name].abs().max() > 0 for name in saved)

    def test_an_adapter_on_a_convolution_is_refused(self):
        model = sleepify(adapted(build("qwen3_5", **SMALL), target_modules=["conv1d"], r=128), window=8)
        with pytest.raises(ValueError, match="conv1d: expected a plain convolution"):
            model(input_ids=tokens(1, 10))


QUANTISED = {
    "4bit": dict(load_in_4bit=True),
    "4bit-bfloat16": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "8bit": dict(load_in_8bit=True),
}


class TestQuantised:
    """Weights stored in 4 or 8 bits by bitsandbytes: what counts is the dtype in which they compute."""

    @pytest.fixture(autouse=True)
    def _needs_bitsandbytes(self):
        pytest.importorskip("bitsandbytes", reason="stored in 4 and 8 bits by bitsandbytes")

    def load(self, family, folder, how, **options):
        build(family, **SMALL if family != "llama" else {}).save_pretrained(folder)
        # On a CPU its 4-bit kernels want outputs in multiples of 32, which these tiny gates don't have.
        gates = ["in_proj_a", "in_proj_b", "a_proj", "b_proj", "lm_head"]
        how = BitsAndBytesConfig(**QUANTISED[how], llm_int8_skip_modules=gates)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, **options)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    @pytest.mark.parametrize("how", QUANTISED)
    @pytest.mark.parametrize("family", ("qwen3_5", "llama"))
    def test_one_window_is_the_model_and_steps_are_the_whole(self, family, how, dtype, tmp_path):
        model, ids = self.load(family, tmp_path, how, dtype=dtype), tokens(2, 20)
        assert {torch.int8, torch.uint8} & {p.dtype for p in model.parameters()}
        with torch.no_grad():
            plain = model(ids).logits.float()
            if family == "llama":
                insert_fast_weights(model, [1], num_heads=2, head_dim=16)
                assert {p.dtype for p in model.model.fast_weights.parameters()} == {dtype}
            out = sleepify(model, window=32)(ids).logits
            assert out.dtype == dtype
            bound = dict(rtol=0, atol=0.1 * plain.abs().max().item())
            torch.testing.assert_close(out.float(), plain, **bound)
            sleepify(model, window=8, passes=3)
            session, expected = SleepSession(model), model(ids).logits.float()
            steps = torch.stack([session.step(ids[:, t]) for t in range(20)], dim=1)
            torch.testing.assert_close(steps.float(), expected, **bound)
            state = session.state.blocks
        assert {x.dtype for s in state for x in s} <= {dtype, torch.float32}
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 20

    @pytest.mark.parametrize("prepared", (False, True))
    @pytest.mark.parametrize("how", slow_unless(["4bit-bfloat16"], QUANTISED))
    def test_adapters_learn(self, how, prepared, tmp_path):
        """QLoRA, with and without peft's preparation, which makes all that is not quantised float32."""
        model, ids = self.load("qwen3_5", tmp_path, how, dtype=torch.bfloat16), tokens(2, 20)
        sleepify(model, window=8, passes=2)
        if prepared:
            model = peft.prepare_model_for_kbit_training(model)
            assert model.sleep.settings.activation_checkpointing
        model = adapted(model).train()
        _, first = gradients(model, ids)
        assert all("lora_" in name and grad.abs().max() > 0 for name, grad in first.items())
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
        losses = []
        for _ in range(3):
            losses.append(gradients(model, ids)[0].item())
            optimizer.step()
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("how", ("4bit", "8bit"))
    def test_inserted_blocks_survive_saving_unquantised(self, how, tmp_path):
        start = insert_fast_weights(build("llama"), [1], num_heads=2, head_dim=16)
        torch.nn.init.normal_(start.model.fast_weights["1"].mixer.o_proj.weight, std=0.04)
        sleepify(start, window=8, passes=2).save_pretrained(tmp_path / "float")
        quantised = from_pretrained(tmp_path / "float", quantization_config=BitsAndBytesConfig(**QUANTISED[how]))
        assert torch.equal(*(m.model.fast_weights["1"].mixer.q_proj.weight for m in (start, quantised)))
        quantised.save_pretrained(tmp_path / "bits")
        ids = tokens(1, 20)
        with torch.no_grad():
            torch.testing.assert_close(from_pretrained(tmp_path / "bits")(ids).logits, quantised(ids).logits)


def compiled(model, backend="eager"):
    """A copy whose layers are compiled, each without a break; and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    return model, counter


COMPILED = {
    "refine": dict(passes=3),
    "checkpointing": dict(passes=3, activation_checkpointing=True),
    "replay": dict(passes=3, sleep_kind="replay"),
    "sliding": dict(passes=2, eviction="sliding"),
}


class TestCompiledLayers:
    @pytest.mark.parametrize("settings", slow_unless(["replay"], COMPILED.values(), ids=COMPILED))
    def test_same_losses_and_gradients(self, settings):
        model, ids = sleeping(**settings).train(), tokens(2, 24)
        fast, _ = compiled(model)
        (loss, grads), (found, own) = gradients(model, ids), gradients(fast, ids)
        torch.testing.assert_close(found, loss, **CLOSE)
        assert_same_gradients(own, grads, rtol=1e-3)

    @pytest.mark.slow
    def test_compiled_backward_passes(self):
        small = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
        model, ids = sleepify(build("qwen3_5", **small), window=8, passes=2).train(), tokens(1, 16)
        fast, _ = compiled(model, "aot_eager_decomp_partition")
        (loss, grads), (found, own) = gradients(model, ids), gradients(fast, ids)
        torch.testing.assert_close(found, loss, **CLOSE)
        assert_same_gradients(own, grads, rtol=1e-3)

    @pytest.mark.parametrize("family", slow_unless(["qwen3_5"], ["qwen3_5", "olmo_hybrid", "qwen3_next"]))
    def test_full_windows_compile_nothing_new(self, family):
        fast, counter = compiled(sleeping(family, passes=3).train())
        gradients(fast, tokens(2, 24))
        first = counter.frame_count
        gradients(fast, tokens(2, 64, seed=5))
        assert counter.frame_count == first <= 6

    @pytest.mark.slow
    def test_states_padding_and_single_tokens_compile_a_few_times(self):
        model = sleeping()
        fast, counter = compiled(model)
        ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            for length in (39, 30, 21):
                mask[1, length - 3 :] = 0
                inputs = dict(attention_mask=mask[:, :length])
                found, expected = (m(ids[:, :length], **inputs).logits for m in (fast, model))
                torch.testing.assert_close(found, expected, **CLOSE)
            session, counts = SleepSession(fast), []
            for t in range(40):
                logits = session.step(ids[:, t])
                counts.append(counter.frame_count)
            torch.testing.assert_close(logits, model(ids).logits[:, -1], **CLOSE)
        assert counts[-1] == counts[15]


class Questions(TorchDispatchMode):
    """How often the host asks for a tensor's value: there a compiled graph breaks, and a device is waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_batch_that_counts_with_others_is_asked_nothing_more():
    model, ids = sleeping().train(), tokens(1, 16)
    counts = []
    for inputs in (dict(labels=ids), dict(labels=ids, num_items_in_batch=15)):
        with Questions() as questions:
            model(ids, **inputs)
        counts.append(questions.count)
    assert counts[0] == counts[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SHARDED = {
    "one-pass": ("qwen3_5", dict(passes=1)),
    "refine": ("qwen3_5", dict(passes=3)),
    "refine-loss-alone": ("qwen3_5", dict(passes=3)),
    "checkpointing": ("qwen3_5", dict(passes=3, activation_checkpointing=True)),
    "middle": ("olmo_hybrid", dict(passes=2, loop=(0, 1), eviction="sliding")),
    "replay": ("qwen3_5", dict(passes=3, sleep_kind="replay")),
    "replay-checkpointing": ("qwen3_5", dict(passes=3, sleep_kind="replay", activation_checkpointing=True)),
    "inserted": ("llama", dict(passes=2)),
    "inserted-replay": ("llama", dict(passes=2, sleep_kind="replay")),
}


def shardable(family, settings):
    if family != "llama":
        return sleeping(family, **settings)
    model = insert_fast_weights(build("llama", num_hidden_layers=2), [0], num_heads=2, head_dim=16)
    torch.nn.init.normal_(model.model.fast_weights["0"].mixer.o_proj.weight, std=0.04)
    return sleepify(model, window=8, **settings)


def shard(model):
    for part in (*model.model.layers, *getattr(model.model, "fast_weights", {}).values()):
        fully_shard(part)
    return fully_shard(model)


def sharded_worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        ids, found = tokens(4, 20), {}
        loss.CHUNK_BYTES = 7 * 4 * VOCAB
        for name, case in SHARDED.items():
            model = shard(shardable(*case)).train()
            mean, _ = gradients(model, ids[2 * rank : 2 * rank + 2], return_logits=name != "refine-loss-alone")
            grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
            dist.all_reduce(mean)
            found[name] = mean / 2, grads
        model.eval()
        try:
            model.generate(ids, max_new_tokens=4, do_sample=False)
        except ValueError as error:
            found["refused"] = str(error)
        register_fsdp_forward_method(model, "generate")
        found["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
class TestSharded:
    """Two processes with half of the batch each, every layer sharded, against one process with all of it."""

    @pytest.fixture(scope="class")
    def found(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("sharded")
        mp.spawn(sharded_worker, args=(free_port(), str(folder)), nprocs=2)
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    @pytest.mark.parametrize("name", SHARDED)
    def test_same_loss_and_gradients(self, found, name):
        loss, grads = gradients(shardable(*SHARDED[name]).train(), tokens(4, 20))
        for rank in found:
            torch.testing.assert_close(rank[name][0], loss, **CLOSE)
            assert_same_gradients(rank[name][1], grads, rtol=1e-3)

    def test_generation_asks_for_gathered_parameters(self, found):
        model, ids = shardable(*list(SHARDED.values())[-1]).eval(), tokens(4, 20)
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        for rank in found:
            assert "register_fsdp_forward_method(model, 'generate')" in rank["refused"]
            assert torch.equal(rank["generated"], expected)


FAMILIES = ("qwen3_5", "olmo_hybrid", "qwen3_next")


class TestLossAlone:
    @pytest.mark.parametrize("training", (True, False))
    @pytest.mark.parametrize("family", slow_unless(["qwen3_5"], FAMILIES))
    def test_it_is_the_loss_of_the_logits(self, family, training, in_chunks):
        model, ids = sleeping(family).train(training), tokens(2, 20)
        labels = ids.masked_fill(torch.arange(20) % 3 == 1, -100)
        found = []
        for inputs in (dict(return_logits=False), {}):
            model.zero_grad()
            out = model(ids, labels=labels, num_items_in_batch=30, **inputs)
            out.loss.backward()
            found.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
            assert (out.logits is None) == bool(inputs) and (out.positions is None) == (bool(inputs) or not training)
        torch.testing.assert_close(found[0][0], found[1][0])
        assert_same_gradients(found[0][1], found[1][1])

    def test_logits_asked_for_and_not(self):
        model, ids = sleeping(), tokens(1, 20)
        with pytest.raises(ValueError, match="labels: expected a tensor with return_logits=False, got None"):
            model(ids, return_logits=False)
        with pytest.raises(ValueError, match="logits_to_keep: expected 0 with return_logits=False, got 2"):
            model(ids, labels=ids, return_logits=False, logits_to_keep=2)
        every = model(ids, labels=ids, return_logits=False, all_logits=True)
        assert every.logits is None and torch.equal(every.loss, model(ids, labels=ids, return_logits=False).loss)

    def test_no_names_are_left_in_a_tuple(self):
        model, ids = sleeping(), tokens(1, 20)
        out = model(ids, labels=ids, return_logits=False, return_dict=False)
        assert len(out) == 1 and out[0] == model(ids, labels=ids, return_logits=False).loss


class TestHostileUse:
    def test_a_pickled_model_sleeps(self):
        model, ids = sleeping(), tokens(1, 20)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded.sleep.model is loaded
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_another_dtype_after_sleepify(self):
        model, ids = sleeping(), tokens(1, 20)
        with torch.no_grad():
            expected = model(ids).logits
            half, double = copy.deepcopy(model).half()(ids).logits, copy.deepcopy(model).double()(ids).logits
        assert half.dtype == torch.float16 and double.dtype == torch.float64
        torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
        torch.testing.assert_close(double.float(), expected, **CLOSE)

    @pytest.mark.parametrize("tied", (True, False))
    def test_a_resized_vocabulary(self, tied):
        model = sleepify(build("qwen3_5", tie_word_embeddings=tied, **SMALL), window=8, passes=2)
        with pytest.raises(ValueError, match="input_ids: expected 0 to 127"):
            model(torch.full((1, 4), 139))
        model.resize_token_embeddings(140, mean_resizing=False)
        out = model(torch.full((1, 12), 139), labels=torch.full((1, 12), 139))
        out.loss.backward()
        assert out.logits.shape[-1] == 140 and model.get_input_embeddings().weight.grad[139].abs().max() > 0

    def test_every_setting_of_sleep_is_an_argument(self):
        arguments = set(inspect.signature(sleepify).parameters) - {"model"}
        assert arguments == {field.name for field in dataclasses.fields(SleepSettings)}

    def test_gradients_through_some_of_the_passes(self):
        ids, grads = tokens(1, 20), []
        for through in (1, 2):
            model = sleeping(passes=3, backprop_passes=through)
            model(ids, labels=ids).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert model.config.sleep["backprop_passes"] == 2
        assert not torch.allclose(*grads)

    def test_chosen_columns_of_logits(self):
        model, ids = sleeping(), tokens(2, 20)
        kept = model(ids, labels=ids, logits_to_keep=torch.tensor([4, 1])).logits
        assert torch.equal(kept, model(ids).logits[:, [4, 1]])

    def test_a_text_without_a_batch_is_refused_by_its_shape(self):
        with pytest.raises(ValueError, match=r"input_ids: expected a tensor \[B, T\], got \(4,\)"):
            sleeping()(tokens(1, 4)[0])

    def test_a_row_of_padding_changes_nothing(self):
        model, ids = sleeping(passes=3), tokens(2, 20)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[1], labels[1] = 0, -100
        out, alone = model(ids, attention_mask=mask, labels=labels), model(ids[:1], labels=ids[:1])
        torch.testing.assert_close(out.logits[:1], alone.logits, **CLOSE)
        torch.testing.assert_close(out.loss, alone.loss, **CLOSE)
        assert out.logits[1].abs().max() == 0

    def test_inference_mode(self):
        model, ids = sleeping(), tokens(1, 20)
        with torch.inference_mode():
            out = model(ids)
        with torch.no_grad():
            assert torch.equal(out.logits, model(ids).logits)

    @pytest.mark.parametrize("asked", (dict(), dict(all_logits=False), dict(return_logits=False)), ids=str)
    def test_a_batch_that_counts_with_others_may_have_no_label(self, asked):
        model, ids = sleeping(), tokens(2, 20)
        inputs = dict(labels=torch.full_like(ids, -100), **asked)
        assert (model(ids, num_items_in_batch=30, **inputs).logits is None) == ("return_logits" in asked)
        loss = model.train()(ids, num_items_in_batch=30, **inputs).loss
        loss.backward()
        assert loss == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())
        assert model.eval()(ids, num_items_in_batch=30, **inputs).loss == 0
        assert model(ids, num_items_in_batch=0, **inputs).loss.isnan()

    @pytest.mark.parametrize("kind", ("refine", "replay"))
    def test_a_state_of_inference_mode_is_learnt_from(self, kind):
        model, ids = sleeping(passes=3, sleep_kind=kind), tokens(1, 20)
        grads = []
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                state = model(ids[:, :11], return_state=True).state
            loss, found = gradients(model, ids[:, 11:], state=state)
            grads.append(found | {"loss": loss})
        assert_same_gradients(grads[1], grads[0], rtol=0)

    @pytest.fixture
    def accelerate(self):
        """accelerate, whose first precision in a process is otherwise its last."""
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        yield accelerate
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("wrapped", (False, True))
    def test_accelerate_wraps_and_unwraps_it(self, wrapped, accelerate):
        model, ids = sleeping(passes=3).eval(), tokens(1, 20)
        with torch.no_grad():
            expected = model(ids).logits
            accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
            prepared = accelerator.prepare(model)
            assert prepared(ids).logits.dtype == torch.float32
            unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=wrapped)
            if not wrapped:
                for m in (unwrapped, copy.deepcopy(unwrapped)):
                    torch.testing.assert_close(m(input_ids=ids).logits, expected)
            found = unwrapped(ids, passes=1).logits
            assert found.dtype == torch.float32 and not torch.allclose(found, expected, atol=1e-3)

    def test_layers_wrapped_for_checkpointing(self):
        """PyTorch's wrapper around each layer calls it again in the backward pass, with the same cache."""
        model, ids = sleeping(passes=3).train(), tokens(2, 20)
        loss, grads = gradients(model, ids)
        layers = model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
        again, recomputed = gradients(model, ids)
        assert again == loss
        assert_same_gradients({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in recomputed.items()}, grads)

    def test_transformers_own_checkpointing_is_caught(self):
        model = sleeping().train()
        for layer in model.model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, torch.utils.checkpoint.checkpoint
        with pytest.raises(ValueError, match="gradient checkpointing: expected that of the sleeping model"):
            model(tokens(1, 20))

    @pytest.mark.parametrize("option", (dict(every_n_layers=2), dict(offload=True)), ids=str)
    def test_other_kinds_of_checkpointing_are_refused(self, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
            sleeping().activation_checkpointing_enable(**option)

    def test_another_attention_is_caught(self):
        model = sleeping()
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attn_implementation: expected 'sleep_ops', as sleepify set it"):
            model(tokens(1, 20))

    @pytest.mark.parametrize("places", ({"model": 0, "lm_head": 1}, {"model": "disk"}), ids=("two", "disk"))
    def test_a_model_in_several_places_is_refused(self, places):
        model = build("qwen3_5", **SMALL)
        model.hf_device_map = places
        with pytest.raises(ValueError, match="device_map: expected one device for the whole model"):
            sleepify(model, window=8)

    def test_one_device_map_is_accepted(self, tmp_path):
        sleeping(passes=3).save_pretrained(tmp_path)
        model, ids = from_pretrained(tmp_path, device_map="cpu"), tokens(1, 20)
        assert model.sleep.settings.passes == 3 and model(ids).logits.shape == (1, 20, VOCAB)

    def test_a_second_sleepify_keeps_checkpointing(self):
        model = sleeping()
        model.gradient_checkpointing_enable()
        sleepify(model, passes=3)
        assert model.sleep.settings.activation_checkpointing and model.sleep.settings.passes == 3
        sleepify(model, activation_checkpointing=False)
        assert not model.sleep.settings.activation_checkpointing

    @pytest.mark.parametrize("family", ("mistral", "qwen2"))
    def test_padded_rows_of_a_sliding_window(self, family):
        sliding = dict(sliding_window=5) | (
            dict(use_sliding_window=True, max_window_layers=1) if family == "qwen2" else {}
        )
        model = sleepify(insert_fast_weights(build(family, **sliding), [1]), window=12)
        ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
        mask[1, :7] = 0
        with torch.no_grad():
            out, alone = model(ids, attention_mask=mask).logits[1, 7:], model(ids[1:, 7:]).logits[0]
        torch.testing.assert_close(out, alone, **CLOSE)
