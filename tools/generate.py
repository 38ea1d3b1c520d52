"""`python -m tools.generate MODEL --prompt TEXT`: continues a text with an exported model, printing it as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.generation import TokenStream
from pretrain.errors import UserError
from tools.command import positive_int, run_command, seed
from tools.model_directory import LoadedModel, load_model_directory


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__)
    result.add_argument("model", type=Path, help="folder made by `python -m tools.export`")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue; may be empty")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue, UTF-8")
    result.add_argument("--max-new-tokens", type=positive_int, default=128, help="tokens to add at most (default 128)")
    result.add_argument("--temperature", type=float, default=0.8, help="0 for the most likely token (default 0.8)")
    result.add_argument("--top-k", type=int, help="sample from the k most likely tokens only")
    result.add_argument("--top-p", type=float, help="sample from the fewest tokens that hold this probability")
    result.add_argument("--seed", type=seed, default=0, help="of the sampling (default 0)")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    return result


def continue_text(loaded: LoadedModel, prompt: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The continuation, piece by piece; stops at the end of a document.

    Yields only text that later tokens can't change: bytes of an unfinished character are held back.
    """
    tokenizer = loaded.tokenizer
    # Training rows are documents that each end with EOS, so a text begins after one.
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    generator = torch.Generator(device=arguments.device).manual_seed(arguments.seed)
    try:
        stream = TokenStream(
            loaded.model,
            torch.tensor([tokens], device=arguments.device),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            generator=generator,
            stop_token=tokenizer.eos_id,
        )
    except ValueError as error:  # an option out of its range; nothing has run yet
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    # Decoded together with the prompt: SentencePiece treats the first piece of a text differently.
    shown = tokenizer.decode(tokens)
    for token in stream:
        tokens.append(int(token))
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(tokens)[len(shown) :]


def run(arguments: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    if arguments.temperature == 0 and (arguments.top_k is not None or arguments.top_p is not None):
        raise UserError("--temperature 0 takes the likeliest token: --top-k and --top-p have no effect; drop them")
    prompt = arguments.prompt if arguments.prompt_file is None else _read(arguments.prompt_file)
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    print(prompt, end="", flush=True)
    for piece in continue_text(loaded, prompt, arguments):
        print(piece, end="", flush=True)
    print()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: run(arguments))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: is not UTF-8 at byte {error.start}; convert it") from None


if __name__ == "__main__":
    sys.exit(main())
