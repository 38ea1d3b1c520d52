"""`python -m tools.generate MODEL --prompt TEXT`: continues a text with an exported model, printing it as it comes.

`--save-memory FILE` keeps what the model has read and written, and `--load-memory FILE` goes on from it days later,
with the very logits of a conversation that was never interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.generation import TokenStream
from pretrain.errors import UserError
from tools.command import discard_output, positive_int, read_text, run_command, seed
from tools.model_directory import NOT_FINITE, LoadedModel, load_model_directory
from tools.result_files import require_writable
from tools.sessions import Session, load_session, merge_sessions, save_session


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__.splitlines()[0])
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
    result.add_argument(
        "--load-memory",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="go on from a session of this model; several are merged, their memories averaged, attention and positions "
        "beginning anew (experimental)",
    )
    result.add_argument(
        "--merge-weights", type=float, nargs="+", metavar="W", help="of the merged sessions' memories (default: equal)"
    )
    result.add_argument("--save-memory", type=Path, metavar="FILE", help="save the session behind the last token here")
    return result


class Continuation:
    """The continuation of a prompt, piece by piece, and where the conversation then stands."""

    def __init__(
        self, loaded: LoadedModel, prompt: str, arguments: argparse.Namespace, session: Session | None = None
    ) -> None:
        """
        Args:
            session: what was read before the prompt; a text begins here where it is None or has read nothing.

        Raises:
            UserError: a sampling option is out of its range.
        """
        self._tokenizer = tokenizer = loaded.tokenizer
        self._read_before = 0 if session is None else session.tokens
        unread = [] if session is None else session.unread[0].tolist()
        # Training rows are documents that each end with EOS, so a text begins after one; so does one after merged ones.
        before = unread or [tokenizer.eos_id]
        self._tokens = [*before, *tokenizer.encode(prompt, begins=before[-1] == tokenizer.eos_id)]
        # A session may have ended inside a character, of which it showed U+FFFD: the first token here may complete it.
        self.length = self._read_before + len(self._tokens) + arguments.max_new_tokens - 1
        """Tokens that the model has read once all new ones are chosen, those of the session included."""
        self._inside = not prompt and bool(unread) and tokenizer.begins_character(unread[-1])
        try:
            self._stream = TokenStream(
                loaded.model,
                torch.tensor([self._tokens], device=arguments.device),
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                generator=torch.Generator(device=arguments.device).manual_seed(arguments.seed),
                state=None if session is None else session.state,
                stop_token=tokenizer.eos_id,
            )
        except ValueError as error:  # an option out of its range; nothing has run yet
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from None

    def pieces(self) -> Iterator[str]:
        """The text as it comes; stops at the end of a document.

        Yields only text that later tokens can't change: bytes of an unfinished character are held back. What was
        yielded is not decoded again, so that a token's time does not grow with the text.

        Raises:
            UserError: the model's logits are no finite numbers.
        """
        tokens, decode = self._tokens, self._tokenizer.decode
        start, shown = len(tokens) - self._inside, "\ufffd" if self._inside else ""
        if not decode(tokens[:start]):
            start = 0  # the text begins here, and only there the tokenizer's own space is no part of it
        for token in self._stream:
            if not bool(self._stream.finite.all()):
                raise UserError(f"the model's logits are not finite behind {len(tokens):,} tokens: {NOT_FINITE}")
            tokens.append(int(token))
            text = decode(tokens[start:], begins=start == 0)
            if text and not text.endswith("\ufffd"):
                yield text.removeprefix(shown)
                start, shown = len(tokens), ""
        yield decode(tokens[start:], begins=start == 0).removeprefix(shown)

    def session(self) -> Session:
        """Where the conversation stands after the pieces: the last token was chosen, but not read."""
        unread = torch.tensor([self._tokens[-1:]])
        return Session(self._stream.state, unread, self._read_before + len(self._tokens) - 1)


def run(arguments: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    if arguments.temperature == 0 and (arguments.top_k is not None or arguments.top_p is not None):
        raise UserError("--temperature 0 takes the likeliest token: --top-k and --top-p have no effect; drop them")
    if arguments.merge_weights is not None and len(arguments.load_memory or ()) < 2:
        raise UserError("--merge-weights is for several files of --load-memory; drop it")
    if arguments.save_memory is not None and not arguments.save_memory.resolve().parent.is_dir():
        raise UserError(f"--save-memory {arguments.save_memory}: its folder does not exist; make it first")
    require_writable(arguments.save_memory)
    prompt = (
        arguments.prompt
        if arguments.prompt_file is None
        else read_text(arguments.prompt_file, f"--prompt-file {arguments.prompt_file}")
    )
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    continuation = Continuation(loaded, prompt, arguments, open_session(loaded, arguments))
    limit = loaded.config.context_limit
    if limit is not None and continuation.length > limit:
        raise UserError(
            f"the prompt, what was read before it and --max-new-tokens {arguments.max_new_tokens} come to "
            f"{continuation.length:,} tokens, more than the transformer's context of {limit:,}, the rows of its "
            "training; give less of them, or a model with a memory"
        )
    try:
        print(prompt, end="", flush=True)
        for piece in continuation.pieces():
            print(piece, end="", flush=True)
        print(flush=True)
    except (BrokenPipeError, KeyboardInterrupt) as error:
        if arguments.save_memory is None:
            raise
        if isinstance(error, BrokenPipeError):
            discard_output()
        raise UserError(f"--save-memory {arguments.save_memory}: not saved, the output ended early") from None
    if arguments.save_memory is not None:
        session = continuation.session()
        save_session(arguments.save_memory, session, loaded.model)
        print(f"session of {session.tokens:,} tokens saved to {arguments.save_memory}", file=sys.stderr)


def open_session(loaded: LoadedModel, arguments: argparse.Namespace) -> Session | None:
    """What was read before, of one file or merged of several; None where none is asked for.

    Raises:
        UserError: a file is no session of this model, or several can't be merged.
    """
    if arguments.load_memory is None:
        return None
    sessions = [load_session(path, loaded.model) for path in arguments.load_memory]
    for path, session in zip(arguments.load_memory, sessions, strict=True):
        if (rows := len(session.state.position)) != 1:
            raise UserError(f"--load-memory {path}: holds {rows} rows of a batch; give a session of one conversation")
    if len(sessions) == 1:
        return sessions[0]
    try:
        merged = merge_sessions(sessions, loaded.model, arguments.merge_weights)
    except ValueError as error:
        raise UserError(f"--load-memory {' '.join(map(str, arguments.load_memory))}: {error}") from None
    print("warning: merged memories are an experiment", file=sys.stderr)
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
