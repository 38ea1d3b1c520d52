"""Starting values, dtypes, statistics, decay groups, wrong inputs."""

import pytest
import torch

from kernels.memory import memory_read
from model import ModelConfig, TitansLM
from model.config import MemoryConfig
from model.gates import Gates
from model.memory import MemoryCore, Write


def test_the_same_seed_gives_the_same_model() -> None:
    config = ModelConfig.preset("mac-tiny", vocab_size=64)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(TitansLM(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["embedding.weight"], models[2]["embedding.weight"])


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_gates_start_exactly_where_configured(variant) -> None:
    memory = {"initial_forgetting": 0.02, "initial_momentum": 0.8, "initial_step": 0.3, "step_ceiling": 0.5}
    model = TitansLM(ModelConfig.preset(f"{variant}-tiny", vocab_size=64, memory=memory))
    stats = model(torch.arange(40).view(1, 40), with_stats=True).stats
    for layer in stats:
        assert layer["alpha"].item() == pytest.approx(0.02, rel=1e-5)
        assert layer["eta"].item() == pytest.approx(0.8, rel=1e-5)
        assert layer["theta"].item() == pytest.approx(0.3 * 0.2, rel=1e-5)


def test_gates_that_are_off_are_exactly_zero(small_model, draw_tokens) -> None:
    for layer in small_model("delta")(draw_tokens(2, 9), with_stats=True).stats:
        assert layer["alpha"] == 0 and layer["eta"] == 0 and layer["theta"] > 0


@pytest.mark.parametrize("activation", ["silu", "gelu", "softmax"])
def test_the_unit_parametrisation_keeps_features_at_unit_norm(activation) -> None:
    torch.manual_seed(0)
    core = MemoryCore(2, 64, MemoryConfig(depth=4, expansion=4, activation=activation))
    q = torch.nn.functional.normalize(torch.randn(2, 50, 2, 64), dim=-1)
    for layers in (1, 2, 3):
        # An identity behind the hidden layers makes the features themselves readable.
        identity = torch.eye(256).expand(2, 256, 256)
        weights = [*(getattr(core, f"initial_{layer}") for layer in range(layers)), identity]
        features = memory_read(q, weights, activation=activation, activation_scale=core.scale)
        assert features.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.15)
    assert not core.initial_3.any()


def test_the_standard_parametrisation_is_the_usual_one() -> None:
    torch.manual_seed(0)
    core = MemoryCore(2, 64, MemoryConfig(depth=2, expansion=4, parametrisation="standard"))
    assert core.scale == 1
    assert core.initial_0.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert core.initial_1.std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_the_linear_baseline_is_linear_attention_with_decay() -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("linear-tiny").memory.model_copy(update={"chunk": 4})
    core = MemoryCore(1, 8, config).double()
    q, k, v = (torch.randn(1, 10, 1, 8, dtype=torch.float64) for _ in range(3))
    alpha, theta = torch.rand(2, 1, 10, 1, dtype=torch.float64)
    y = core(q, Write(k, v, Gates(alpha, torch.zeros_like(alpha), theta)), None, None, None, False)[0]
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(10):
        matrix = (1 - alpha[0, t]) * matrix + theta[0, t] * torch.outer(k[0, t, 0], v[0, t, 0])
        torch.testing.assert_close(y[0, t, 0], q[0, t, 0] @ matrix)


def test_the_delta_baseline_is_the_delta_rule() -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("delta-tiny").memory.model_copy(update={"chunk": 1, "step_bound": None})
    core = MemoryCore(1, 8, config).double()
    q, k, v = (torch.randn(1, 10, 1, 8, dtype=torch.float64) for _ in range(3))
    theta, zero = torch.rand(1, 10, 1, dtype=torch.float64) * 0.1, torch.zeros(1, 10, 1, dtype=torch.float64)
    y = core(q, Write(k, v, Gates(zero, zero, theta)), None, None, None, False)[0]
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(10):
        key, value = k[0, t, 0], v[0, t, 0]
        matrix = matrix - 2 * theta[0, t] * torch.outer(key, key @ matrix - value)
        torch.testing.assert_close(y[0, t, 0], q[0, t, 0] @ matrix)


def test_bf16_parameters_keep_an_fp32_state_and_stay_close(case, small_model, draw_tokens) -> None:
    tokens, targets = draw_tokens(2, 21), draw_tokens(2, 21, seed=3)
    exact = small_model(case, torch.float32)(tokens[:, :9], targets=targets[:, :9])
    model = small_model(case, torch.bfloat16)
    first = model(tokens[:, :9], targets=targets[:, :9])
    assert first.loss_sum.dtype == torch.float32
    assert first.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.05)
    second = model(tokens[:, 9:], first.state, targets=targets[:, 9:])
    second.loss_sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for path, tensor in second.state.tensors().items():
        if ".weights." in path or ".momentum." in path or path.endswith(("alpha", "eta", "theta")):
            assert tensor.dtype == torch.float32, path


@torch.no_grad()
def test_statistics_change_nothing_and_come_on_request(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case), draw_tokens(2, 21)
    plain, watched = model(tokens), model(tokens, with_stats=True)
    assert plain.stats is None
    assert torch.equal(plain.logits, watched.logits)
    names = set() if case.startswith("transformer") else {"alpha", "eta", "theta", "surprise", "weight_norm"}
    for layer in watched.stats:
        assert set(layer) == names
        assert all(value.dtype == torch.float32 and value.dim() == 0 and value.isfinite() for value in layer.values())


def test_decay_is_for_the_matrices_of_linear_maps(case, small_model) -> None:
    model = small_model(case)
    parameters = dict(model.named_parameters())
    decayed = model.decay_parameters()
    assert decayed <= parameters.keys()
    assert all(parameters[name].dim() == 2 for name in decayed)
    spared = ("embedding", "norm", "bias", "convolution", "persistent", "initial_", "written")
    for name in parameters:
        assert (name in decayed) != any(part in name for part in spared), name
    assert ("head.weight" in decayed) == (not model.config.tie_embeddings)


def test_a_tied_head_is_the_embedding(small_model) -> None:
    tied, own = small_model("mac"), small_model("mac", tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert own.num_parameters() - tied.num_parameters() == own.head.weight.numel()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_one_token_repeated_for_long_leaves_everything_finite(variant) -> None:
    torch.manual_seed(0)
    model = TitansLM(ModelConfig.preset(f"{variant}-tiny", vocab_size=64, num_layers=1, dim=64, num_heads=1))
    state, norms = None, []
    for _ in range(4):
        output = model(torch.full((1, 1024), 7), state, with_stats=True)
        state = output.state
        norms.append(output.stats[0]["weight_norm"].item())
        assert output.logits.isfinite().all()
    assert max(norms) < 2 * norms[0]


def test_wrong_inputs_are_named(small_model, draw_tokens) -> None:
    model, tokens = small_model("lmm"), draw_tokens(2, 5)
    with pytest.raises(ValueError, match="tokens are"):
        model(tokens.int())
    with pytest.raises(ValueError, match="targets are"):
        model(tokens, targets=tokens[:, :4])
    with pytest.raises(ValueError, match="state has 2 rows"):
        model(tokens[:1], model(tokens).state)


@torch.no_grad()
def test_the_logits_of_the_last_tokens_are_those_of_all(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case), draw_tokens(2, 9)
    whole = model(tokens)
    for count in (1, 4, 9):
        last = model(tokens, num_logits=count)
        torch.testing.assert_close(last.logits, whole.logits[:, -count:], rtol=1e-12, atol=1e-12)
        expected = whole.state.tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in last.state.tensors().items())


@pytest.mark.parametrize("options", [{"num_logits": 0}, {"num_logits": 6}, {"num_logits": 1, "targets": True}])
def test_a_number_of_logits_that_there_is_not_is_refused(options, small_model, draw_tokens) -> None:
    tokens = draw_tokens(1, 5)
    if "targets" in options:
        options = {**options, "targets": tokens}
    with pytest.raises(ValueError, match=f"num_logits is {options['num_logits']}: it must be from 1 to"):
        small_model("lmm")(tokens, **options)
