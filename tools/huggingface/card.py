"""The model card of an exported model, README.md: what it is, its use, its training, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.checkpoints import CHECKPOINTS_FOLDER
from pretrain.errors import UserError
from pretrain.exported import ModelDirectoryConfig

CARD = "README.md"
_MEASURES = {"loss": "loss, nats a token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
_VARIANTS = {
    "mac": "Titans, memory as context (MAC)",
    "mag": "Titans, memory as gate (MAG)",
    "mal": "Titans, memory as layer (MAL)",
    "lmm": "long-term memory alone (LMM)",
    "transformer": "transformer baseline",
}


def model_card(
    config: ModelDirectoryConfig, recipe: str, parameters: int, evaluation: dict[str, Any] | None, has_tokenizer: bool
) -> str:
    """The card's text.

    Args:
        recipe: the training's, as YAML.
        parameters: number of weights.
        evaluation: measures by name, as `python -m tools.evaluate --json` writes them or as a run logs them; None
            where nothing was measured.
        has_tokenizer: whether tokenizer.json is there.
    """
    model = config.model
    sizes = f"{model.num_layers} layers of width {model.dim}, {model.num_heads} heads"
    rows = {
        "variant": f"{_VARIANTS[model.variant]}, {sizes}",
        "parameters": f"{parameters:,}",
        "vocabulary": f"{model.vocab_size:,} tokens, sha256 of tokenizer.model `{config.tokenizer_sha256}`",
        "trained": f"{config.step:,} steps, {config.tokens:,} tokens, last in rows of {config.sequence_length:,}",
        "training data": f"fingerprint `{config.data_fingerprint}` (of the last phase, where the recipe has several)",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [titans, {model.variant}, test-time-memory, custom_code]
---

# A Titans language model

Trained with Mnemosyne; the model is that of [Titans: Learning to Memorize at Test
Time](https://arxiv.org/abs/2501.00663).

| | |
|---|---|
{table}

## Use

It needs transformers (5.23 is tested; of 4.57 loading, logits, greedy generation and the tokenizer are) and torch (2.13
is tested), and runs the code in this folder.

```python
{_usage(has_tokenizer)}
```

`past_key_values` is the model's state. {_state(config)} Padding does not touch the state, so that rows of a batch
padded on the left give what they give alone; rows that have read different numbers of tokens are computed apart.

## Evaluation

{_evaluation(evaluation)}

## Recipe

```yaml
{recipe.rstrip()}
```
"""


def _usage(has_tokenizer: bool) -> str:
    load = "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    folder = 'folder = "path/to/this/folder"'
    if not has_tokenizer:
        return (
            f"from transformers import AutoModelForCausalLM\n\n{folder}\n{load}\n"
            "# The tokenizer is tokenizer.model, for sentencepiece: it has no tokenizer.json. A text begins with\n"
            "# the id config.eos_token_id.\nmodel.generate(token_ids, max_new_tokens=100)"
        )
    return (
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n{folder}\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n{load}\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")  # begins with EOS, as in training\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))"
    )


def _state(config: ModelDirectoryConfig) -> str:
    if config.model.variant == "transformer" and config.model.window is None:
        return "It holds the keys and values of all tokens."
    return "It does not grow with the number of tokens read."


def _evaluation(found: dict[str, Any] | None) -> str:
    if found is None:
        return "Not measured yet."
    rows = [f"| {label} | {found[name]:.4f} |" for name, label in _MEASURES.items() if found.get(name) is not None]
    tokens = found.get("scored_tokens", found.get("tokens"))
    over = f" over {tokens:,} tokens" if isinstance(tokens, int) else ""
    context = f", in rows of {found['context']:,}" if isinstance(found.get("context"), int) else ""
    return "\n".join([f"On held-out text{over}{context}:", "", "| measure | value |", "|---|---|", *rows])


def logged_evaluation(checkpoint: Path, step: int) -> dict[str, Any] | None:
    """What the run whose checkpoint this is measured at the step; None where it did not, or its log is elsewhere."""
    log = checkpoint.resolve().parent.parent / "run.jsonl"
    if checkpoint.resolve().parent.name != CHECKPOINTS_FOLDER or not log.is_file():
        return None
    found = None
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # a line that a killed run did not finish
            continue
        if event.get("event") == "eval" and event.get("step") == step:
            found = {name: value for name, value in event.items() if name != "tokens"}  # those of the training
    return found


def read_evaluation(path: Path, step: int) -> dict[str, Any]:
    """What `tools.evaluate --json` wrote of a text's loss; raises UserError for another file, and of another step."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--evaluation {path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("loss"), float):
        raise UserError(
            f"--evaluation {path}: holds no loss; give what `python -m tools.evaluate MODEL --shards` or `--input` "
            "wrote with --json, of a model whose loss is finite"
        )
    if (measured := content.get("step")) != step:
        raise UserError(
            f"--evaluation {path}: was measured at step {measured}, and the checkpoint is of step {step}; evaluate an "
            "export of this checkpoint"
        )
    return content
