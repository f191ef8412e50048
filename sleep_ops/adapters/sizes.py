"""How large a memory is, beside the attention cache it takes the place of.

    python -m sleep_ops.adapters.sizes               # the supported families, in default sizes
    python -m sleep_ops.adapters.sizes FOLDER ...    # checkpoints: only config.json is read

Models are built on the meta device: nothing is loaded and nothing computed.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from sleep_ops.adapters.checkpoint import CONFIG_FILE, read_config
from sleep_ops.adapters.jet_nemotron import JetNemotron, JetNemotronConfig
from sleep_ops.adapters.ouro import Ouro, OuroConfig
from sleep_ops.layers.mixer import GDNState
from sleep_ops.model.sleeping import SleepingModel, sleeping

_WINDOW = 1  # neither size depends on it
# Published sizes, as the ports' tests build them.
_JET_2B = dict(
    model_type="jet_nemotron",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    layer_types=[{14: "attn", 19: "attn", 20: "swa", 21: "swa"}.get(i, "jet") for i in range(28)],
    efficient_attention_config={
        "swa": {"window_size": 1152},
        "jet": dict(num_heads=12, head_dim=96, expand_v=8 / 3, conv_size=4, dconv_generator_reduction=8, norm_eps=1e-5),
    },
)
_OURO = dict(
    model_type="ouro",
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    rope_theta=1e6,
)
_PORTS = {"jet_nemotron": _JET_2B, "ouro": _OURO}
_DEFAULTS = {
    "qwen3_5": "Qwen3_5TextConfig",
    "qwen3_5_moe": "Qwen3_5MoeTextConfig",
    "olmo_hybrid": "OlmoHybridConfig",
    "qwen3_next": "Qwen3NextConfig",
}
FAMILIES = (*_DEFAULTS, *_PORTS)


class Sizes(NamedTuple):
    """Of a model and a text.

    parameters: how many the model has.
    memory: bytes of the text's fast weights (float32) and convolution states (the model's dtype).
    cache: bytes of the attention cache that the text would have without eviction.
    """

    parameters: int
    memory: int
    cache: int


def sizes(model: torch.nn.Module, tokens: int) -> Sizes:
    """The sizes for a model that sleeps; it may be on the meta device."""
    sleeper: SleepingModel = sleeping(model)
    memory = cache = 0
    for block, state in zip(sleeper.sleep_blocks, sleeper.init_state(1).blocks, strict=True):
        if isinstance(state, GDNState):
            memory += sum(x.nbytes for x in state)
        else:
            own = getattr(getattr(block, "mixer", None), "sliding_window", None)
            _, _, heads, head_dim = state.keys.shape
            cache += 2 * heads * head_dim * state.keys.element_size() * min(tokens, own or tokens)
    return Sizes(sum(p.numel() for p in model.parameters()), memory, cache)


def _port(values: dict) -> torch.nn.Module | None:
    """A port of this project on the meta device, in bfloat16; None for a config.json of no port."""
    with torch.device("meta"):
        if values.get("model_type") == "jet_nemotron":
            return JetNemotron(JetNemotronConfig.from_checkpoint(values, window=_WINDOW)).bfloat16()
        if values.get("model_type") == "ouro":
            return Ouro(OuroConfig.from_checkpoint(values, window=_WINDOW)).bfloat16()
    return None


def _sleepified(config) -> torch.nn.Module:
    """A transformers model of `config`, likewise."""
    from transformers import AutoModelForCausalLM

    from sleep_ops.adapters.hf import sleepify
    from sleep_ops.adapters.hf.insert import insert_remembered

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        insert_remembered(model)
        return sleepify(model, window=_WINDOW)


def _of_folder(folder: Path) -> torch.nn.Module:
    model = _port(read_config(folder))
    if model is None:
        from transformers import AutoConfig

        model = _sleepified(AutoConfig.from_pretrained(folder))
    return model


def write_default(family: str, folder: Path) -> None:
    """A config.json with the default sizes of one of FAMILIES, as `load_model` reads it without weights."""
    if family in _PORTS:
        (folder / CONFIG_FILE).write_text(json.dumps(_PORTS[family]))
        return
    import transformers

    getattr(transformers, _DEFAULTS[family])().save_pretrained(folder)


def _families() -> Iterator[tuple[str, torch.nn.Module]]:
    import transformers

    for family, name in _DEFAULTS.items():
        yield family, _sleepified(getattr(transformers, name)())
    yield "jet_nemotron", _port(_JET_2B)
    yield "ouro, 6 inserted layers", _port(_OURO)


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="checkpoint folders; default: the supported families")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 262144], help="lengths of the cached text")
    options = parser.parse_args()
    table = Table("model", "parameters", "memory of a text", *(f"cache of {n} tokens" for n in options.tokens))
    named = ((folder.name, _of_folder(folder)) for folder in options.folders)
    for folder in options.folders:
        if not (folder / CONFIG_FILE).is_file():
            parser.error(f"folders: expected checkpoints, each with a {CONFIG_FILE}, got {folder}")
    for name, model in named if options.folders else _families():
        found = [sizes(model, n) for n in options.tokens]
        row = f"{found[0].parameters / 1e9:.2f}B", _bytes(found[0].memory), *(_bytes(s.cache) for s in found)
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
