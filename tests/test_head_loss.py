"""The gradient taken in the forward pass is that of the plain sum."""

import itertools

import pytest
import torch
from devices import needs_kernels
from helpers import DEVICE, LargestTensor
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sekd.head_loss import loss_in_chunks
from sekd.heads import Head, in_chunks

N, D, V = 37, 16, 50


def squares(logits, factors):
    """A loss whose gradient differs at each position and class, and a column."""
    losses = (logits.log_softmax(-1) * factors).square().sum(-1)
    return (losses * factors[:, 0]).sum(), logits.detach().logsumexp(-1)


def make_inputs(dtype=torch.float32, rows=N):
    torch.manual_seed(0)
    hidden = torch.randn(rows, D, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(rows, V, dtype=dtype)


def lora(layer):
    """The layer with an adapter that is not zero."""
    model = nn.Sequential()
    model.add_module("lm_head", layer)
    layer = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).base_model.model.lm_head
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    return layer.double()


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(D, V, bias=False),
    "bias": lambda: nn.Linear(D, V),
    "frozen": lambda: nn.Linear(D, V).requires_grad_(False),
    "bias alone": lambda: nn.Linear(D, V).requires_grad_(False),
    "LoRA": lambda: lora(nn.Linear(D, V, bias=False)),
    "a hook": lambda: hooked(nn.Linear(D, V)),
}


def value_and_gradients(run, hidden, layer, scale=1.0):
    hidden.grad = None
    layer.zero_grad()
    loss, column = run()
    (scale * loss).backward()
    return [loss.detach(), column.detach(), hidden.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("vocab", [None, V - 7])
@pytest.mark.parametrize("chunk_rows", [1, 8, 100])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_plain_sum_in_value_and_gradient(kind, chunk_rows, vocab):
    hidden, factors = make_inputs(torch.float64)
    layer = LAYERS[kind]().double()
    if kind == "bias alone":
        layer.bias.requires_grad_()
    head = Head(layer, scale=0.5, softcap=3.0, vocab=vocab)
    factors = factors[:, :vocab]

    def plain():
        """Dense, without chunks."""
        loss, column = squares(head(hidden), factors)
        return loss, column

    def ours():
        return loss_in_chunks(squares, head, hidden, [factors], chunk_rows)

    mine, expected = (value_and_gradients(run, hidden, layer, scale=-0.3) for run in (ours, plain))
    for a, b in zip(mine, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_bf16_weight_adds_up_its_gradient_in_float32():
    """As FSDP2 gathers it. 256 chunks add up to the gradient of one dense product."""
    hidden, factors = make_inputs(rows=1024)
    layer = LAYERS["bias"]()

    def measure(layer, run):
        return [p.float() for p in value_and_gradients(run, hidden, layer)[-2:]]

    low, rows = nn.Linear(D, V, dtype=torch.bfloat16), hidden.bfloat16()
    low.load_state_dict(layer.state_dict())
    exact = measure(layer, lambda: squares(Head(layer)(hidden), factors))
    whole = measure(low, lambda: squares(Head(low)(rows), factors))
    chunked = measure(low, lambda: loss_in_chunks(squares, Head(low), rows, [factors], 4))
    for a, b, c in zip(exact, whole, chunked, strict=True):
        assert (c - a).norm() <= 1.2 * (b - a).norm(), "each product of a chunk is rounded to bf16 too"


@pytest.mark.parametrize("kind", ["linear", "bias", "frozen"])
def test_autocast_is_as_exact_as_without_chunks(monkeypatch, kind):
    """Against float64, the error of bf16 products is that of one dense product: chunks add up in float32."""
    monkeypatch.setattr("sekd.head_loss.CLASS_BLOCK", 16)  # V is 3 blocks and a part
    hidden, factors = make_inputs(rows=1024)
    layer = LAYERS[kind]()

    def run(dense):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            head = Head(layer).in_autocast_dtype()
            return squares(head(hidden), factors) if dense else loss_in_chunks(squares, head, hidden, [factors], 4)

    exact = value_and_gradients(lambda: squares(Head(layer)(hidden), factors), hidden, layer)
    whole = value_and_gradients(lambda: run(True), hidden, layer)
    chunked = value_and_gradients(lambda: run(False), hidden, layer)
    for a, b, c in zip(exact, whole, chunked, strict=True):
        if a is not None:
            assert a.dtype == c.dtype
            assert (c - a).norm() <= 1.1 * (b - a).norm() + 1e-6 * a.norm()


def test_float16_keeps_small_gradients():
    """They vanish in float16 unless the loss is scaled first, and the forward pass does not know the scale."""
    hidden, factors = make_inputs()
    layer, tiny = nn.Linear(D, V), 1e-9

    def function(logits, factors):
        loss, column = squares(logits, factors)
        return tiny * loss, column

    with torch.autocast(DEVICE.type, torch.float16):
        loss, _ = loss_in_chunks(function, Head(layer), hidden, [factors], 8)
    (loss / tiny).backward()
    assert layer.weight.grad.norm() > 1


def test_no_rows_give_a_loss_of_zero_and_every_gradient():
    hidden, factors = make_inputs(rows=0)
    for layer in (nn.Linear(D, V), lora(nn.Linear(D, V)).float()):
        loss, column = loss_in_chunks(squares, Head(layer), hidden, [factors], 8)
        loss.backward()
        assert loss == 0
        assert column.shape == hidden.grad.shape[:1] == (0,)
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_without_grad_there_is_no_graph():
    hidden, factors = make_inputs()
    layer = nn.Linear(D, V)
    with torch.no_grad():
        loss, column = loss_in_chunks(squares, Head(layer), hidden, [factors], 8)
    expected = squares(Head(layer)(hidden), factors)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, column), tuple(t.detach() for t in expected))


def test_the_gradient_is_used_once():
    hidden, factors = make_inputs()
    loss, _ = loss_in_chunks(squares, Head(nn.Linear(D, V)), hidden, [factors], 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used before"):
        loss.backward()


def test_gradients_of_several_losses_add_up():
    """Micro-batches, and a tied embedding, add to the same weight."""
    hidden, factors = make_inputs(torch.float64)
    layer = nn.Linear(D, V).double()
    halves = zip(hidden.split(20), factors.split(20), strict=True)
    for rows, some in halves:
        loss_in_chunks(squares, Head(layer), rows, [some], 8)[0].backward()
    mine = layer.weight.grad.clone()
    layer.zero_grad()
    squares(Head(layer)(hidden), factors)[0].backward()
    torch.testing.assert_close(mine, layer.weight.grad)


def test_no_more_than_a_chunk_of_logits_exists():
    rows, chunk_rows = 400, 10
    hidden, factors = make_inputs(rows=rows)
    with LargestTensor() as largest:
        loss_in_chunks(squares, Head(nn.Linear(D, V)), hidden, [factors], chunk_rows)[0].backward()
    assert largest.elements <= max(V * D, rows * D)


def peak_bytes(rows, classes=2000):
    hidden = torch.randn(rows, D, requires_grad=True)
    layer = nn.Linear(D, classes, bias=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss_in_chunks(lambda z: (z.logsumexp(-1).sum(),), Head(layer), hidden, [], 128)[0].backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@needs_kernels
def test_memory_does_not_grow_with_the_positions():
    """The logits of a chunk are gone before the next chunk has logits."""
    states = 2 * (1024 - 128) * D * 4  # gradients of the hidden states, in pieces and joined
    assert peak_bytes(1024) <= peak_bytes(128) + states + 2**14


@needs_kernels
def test_the_head_runs_once_a_chunk():
    """One product for the logits and two for the gradients: nothing is computed twice."""
    hidden, factors = make_inputs()
    layer = nn.Linear(D, V, bias=False)
    with torch.profiler.profile() as recorded:
        loss_in_chunks(squares, Head(layer), hidden, [factors], 10)[0].backward()
    products = sum(e.count for e in recorded.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))
    assert products == 3 * 4

    plain = torch.profiler.profile()
    with plain:
        in_chunks(lambda h, f: (squares(Head(layer)(h), f)[0][None],), [hidden, factors], 10)[0].sum().backward()
    assert sum(e.count for e in plain.key_averages() if e.key in ("aten::mm", "aten::addmm")) == 4 * 4, "the probe"
