"""A model's attention backend: another one gives the same logits, states and gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import choice, documents
from model import ModelConfig, TitansLM
from model.attention import explain_attention_backend
from tests.kernels import attention_standins
from tests.model_cases import CASES, build_model, random_tokens

ATTENDING = [case for case in CASES if CASES[case]["variant"] != "lmm"]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' stand-ins, chosen as on a GPU."""
    attention_standins.install(monkeypatch)
    monkeypatch.setattr(choice, "_disadvantage", lambda backend, problem: None)
    yield
    attention_standins.forget()


def results(model: TitansLM, backend: str) -> list[Tensor]:
    """Logits of a row in two pieces and of a token behind them, and the gradients."""
    model.set_attention_backend(backend)
    tokens = random_tokens(2, 17)
    first = model(tokens[:, :11])
    second = model(tokens[:, 11:16], first.state)
    logits = torch.cat((first.logits, second.logits), 1)
    gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        token = model(tokens[:, 16:], second.state.detach()).logits
    return [logits, token, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("case", ATTENDING)
def test_every_backend_gives_the_same_model(case: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(case)
    used = set()
    real = choice.choose
    monkeypatch.setattr(
        "kernels.attention.interface.choose",
        lambda inputs, backend: used.add((found := real(inputs, backend)).backend.name) or found,
    )
    expected = results(model, "math")
    assert used == {"math"}
    used.clear()
    for got, wanted in zip(results(model, "auto"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    # The MAC's second stream needs a mask; pieces of one query go to what has no blocks.
    assert used <= {"flex", "sdpa"} if CASES[case]["variant"] == "mac" else used == {"flash"}


def test_the_host_reads_the_documents_once_for_all_layers(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, resets = build_model("transformer", num_layers=3), random_tokens(2, 12), torch.zeros(2, 12).bool()
    resets[:, [3, 8]] = True
    model.set_attention_backend("varlen")
    expected = model(tokens, resets=resets).logits  # after which the self-test has been run
    reads = []
    real = documents._read
    monkeypatch.setattr(documents, "_read", lambda inputs: reads.append(1) or real(inputs))
    for recompute in (False, True):
        model.set_activation_checkpointing(recompute)
        reads.clear()
        logits = model(tokens, resets=resets).logits
        logits.sum().backward()
        assert torch.equal(logits, expected) and sum(reads) == 1


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="attention backend is 'fast': choose one of auto, flash"):
        build_model("transformer").set_attention_backend("fast")


def test_a_model_is_told_why_a_backend_does_not_take_it(as_on_a_gpu: None) -> None:
    config = ModelConfig.model_validate({
        "variant": "mac", "vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "segment": 8,
        "num_persistent": 3, "memory": {"chunk": 4},
    })  # fmt: skip
    sizes = {"rows": 2, "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ValueError, match="'flash' does not take this attention: there is a second stream"):
        explain_attention_backend(config, "flash", length=16, **sizes)
    assert explain_attention_backend(config, "flex", length=16, **sizes) == "flex: asked for"
    with pytest.raises(ValueError, match="'flex' does not take this attention: a row has no more queries"):
        explain_attention_backend(config, "flex", length=17, **sizes)
    assert explain_attention_backend(config, "auto", length=2**21, **sizes).startswith("flex: the first that takes")
    config, sizes = config.model_copy(update={"variant": "mag", "segment": None, "window": 8}), {**sizes, "length": 16}
    assert explain_attention_backend(config, "flash", **sizes) == "flash: asked for"
    with pytest.raises(ValueError, match="'flash' does not take this attention: there are documents and a prefix"):
        explain_attention_backend(config, "flash", documents=True, **sizes)
