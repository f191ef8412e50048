"""The tokenizer of a checkpoint folder, by transformers, without running code that the folder brings along."""

import json
import os
from pathlib import Path

from sleep_ops.checks import expect

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def load_tokenizer(folder: str | os.PathLike):
    """The transformers tokenizer of a checkpoint folder.

    ValueError for a folder without one, ImportError naming the extra where transformers is missing.
    """
    folder = Path(folder)
    # transformers makes up an empty vocabulary where it finds none.
    found = any(path for pattern in VOCABULARIES for path in folder.glob(pattern))
    expect(found, "tokenizer", f"a folder with one of {', '.join(VOCABULARIES)}", str(folder))
    try:
        from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
    except ImportError as error:
        raise ImportError("tokenizer: expected transformers (pip install 'sleep-ops[hf]'), found none") from error
    # transformers refuses models that it does not know, or asks whether to run the code that their configurations name.
    config = folder / "config.json"
    known = not config.is_file() or json.loads(config.read_text()).get("model_type") in CONFIG_MAPPING
    plain = None if known else PreTrainedConfig()
    return AutoTokenizer.from_pretrained(folder, config=plain, local_files_only=True)
