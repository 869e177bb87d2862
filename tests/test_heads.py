"""Chunks change memory, nothing else."""

import math

import pytest
import torch
from helpers import ARCHITECTURES, DEVICE, make_model

from sekd.heads import Head, chunked_entropy, in_chunks
from sekd.models import get_head


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_chunked_entropy_equals_the_dense_one(chunk_rows):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 30), torch.randn(7, 8, requires_grad=True)
    entropy = chunked_entropy(hidden, head, chunk_rows)
    q = torch.softmax(head(hidden).double(), -1)
    torch.testing.assert_close(entropy.double(), -(q * q.log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad


def test_entropy_of_a_flat_head_is_the_log_of_its_classes():
    entropy = chunked_entropy(torch.randn(5, 8), lambda h: torch.zeros(len(h), 30), 2)
    torch.testing.assert_close(entropy, torch.full((5,), math.log(30)))


def test_no_rows_give_no_rows():
    head = torch.nn.Linear(8, 30)
    assert chunked_entropy(torch.randn(0, 8), head, 4).shape == (0,)


@pytest.mark.parametrize("chunk_rows", [2, 5, 100])
def test_gradients_do_not_depend_on_chunks(chunk_rows):
    torch.manual_seed(0)
    head, rows = torch.nn.Linear(8, 30).double(), torch.randn(7, 8).double().requires_grad_()

    def function(h):
        return head(h).log_softmax(-1)[:, 0], head(h).square().sum(-1)

    first, second = in_chunks(function, (rows,), chunk_rows)
    (first.sum() + second.mean()).backward()
    ours = [rows.grad, head.weight.grad, head.bias.grad]
    rows.grad = head.weight.grad = head.bias.grad = None
    first, second = function(rows)
    (first.sum() + second.mean()).backward()
    for mine, theirs in zip(ours, [rows.grad, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_chunks_add_no_error_to_a_gradient_under_autocast():
    """Chunks that shared one cached bf16 weight would sum their gradients in bf16: 7 times the error, here."""
    torch.manual_seed(0)
    head, rows, factors = torch.nn.Linear(64, 500, bias=False), torch.randn(2048, 64), torch.randn(2048, 500)

    def gradient(chunk_rows, autocast):
        head.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            (sums,) = in_chunks(lambda h, f: ((head(h).float() * f).sum(-1),), (rows, factors), chunk_rows)
        sums.sum().backward()
        return head.weight.grad.clone()

    exact = gradient(4096, autocast=False)
    whole, chunked = ((gradient(n, autocast=True) - exact).norm() / exact.norm() for n in (4096, 8))
    assert chunked < 1.1 * whole


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_head_equals_the_models_own_logits(kind):
    model = make_model(kind)
    ids = torch.arange(9)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(get_head(model)(hidden), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        get_head(model, 100)(hidden), model(input_ids=ids).logits[0, :, :100], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_head_is_autocasts_own_in_value_and_gradient(bias, trained):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(64, 500, bias=bias).requires_grad_(trained), torch.randn(40, 64, requires_grad=True)

    def value_and_gradients(convert):
        linear.zero_grad()
        rows.grad = None
        with torch.autocast(DEVICE.type, torch.bfloat16):
            head = Head(linear, vocab=490)
            head = head.in_autocast_dtype() if convert else head
            (sums,) = in_chunks(lambda h: (head(h).square().sum(-1),), (rows * 1.5,), 8)
        sums.sum().backward()
        return [sums.detach(), rows.grad, *(p.grad for p in linear.parameters())]

    for mine, theirs in zip(value_and_gradients(True), value_and_gradients(False), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)


def test_the_weight_is_converted_once_and_only_where_that_helps():
    linear = torch.nn.Linear(8, 30)
    assert Head(linear).in_autocast_dtype().projection is linear, "no autocast"
    with torch.autocast(DEVICE.type, torch.bfloat16):
        low = Head(linear).in_autocast_dtype().projection.low
        assert low.dtype == torch.bfloat16
        assert Head(linear.bfloat16()).in_autocast_dtype().projection is linear, "nothing to convert"
        linear.float().register_forward_hook(lambda *_: None)
        assert Head(linear).in_autocast_dtype().projection is linear, "a wrapper's hook must run"
        adapted = torch.nn.Sequential(torch.nn.Linear(8, 30))
        assert Head(adapted).in_autocast_dtype().projection is adapted
        linear = torch.nn.Linear(8, 30)
        linear.forward = lambda rows: rows  # a wrapper's own
        assert Head(linear).in_autocast_dtype().projection is linear
