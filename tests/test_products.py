"""Products of matrices against float64, whatever makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssl import products
from ssl.products import product


def matrices(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((37, 65), (129, 65), (129,))
    a, b, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return a, b, bias


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_in_fp32_is_that_of_float64_to_rounding(monkeypatch, without, transposed):
    if without:
        monkeypatch.setattr(products, "_LINEAR", None)
    a, b, bias = matrices()
    given = [each.T.contiguous().T for each in (a, b)] if transposed else [a, b]
    expected = a.double() @ b.double().T
    bound = 66 * 2**-24 * (a.double().abs() @ b.double().abs().T) + 2**-24 * expected.abs()
    assert ((product(*given).double() - expected).abs() <= bound).all()
    assert ((product(*given, bias).double() - (expected + bias.double())).abs() <= bound + 2**-22).all()


def test_rows_and_columns_with_gaps_between_them_are_multiplied_too():
    a, b, _ = matrices()
    for some in (slice(0, 32), slice(1, 64, 3)):
        expected = (a[:, some].double() @ b[:, some].double().T).float()
        torch.testing.assert_close(product(a[:, some], b[:, some]), expected, rtol=1e-4, atol=1e-5)


def test_other_precisions_stay_what_torch_makes_of_them():
    for dtype in (torch.float64, torch.bfloat16):
        a, b, bias = matrices(dtype)
        torch.testing.assert_close(product(a, b), a @ b.T, rtol=0, atol=0)
        torch.testing.assert_close(product(a, b, bias), torch.addmm(bias, a, b.T), rtol=0, atol=0)


def test_a_gradient_that_is_wanted_is_recorded():
    a, b, bias = (each.requires_grad_() for each in matrices())
    product(a, b, bias).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.detach().sum(0).expand_as(a))


def test_what_is_not_finite_stays_in_its_row_and_column():
    a, b, _ = matrices()
    a[3], b[5] = torch.inf, torch.nan
    result = product(a, b)
    assert result[:, 5].isnan().all()
    assert not result[3].isfinite().any()
    rest = torch.ones_like(result, dtype=torch.bool)
    rest[3], rest[:, 5] = False, False
    assert result[rest].isfinite().all()


def test_products_without_rows_or_columns_are_empty_or_zero():
    for rows, dim, columns in ((0, 3, 2), (2, 3, 0), (2, 0, 3)):
        expected = torch.zeros(rows, columns)
        torch.testing.assert_close(product(torch.ones(rows, dim), torch.ones(columns, dim)), expected)


@pytest.mark.parametrize(
    ("known", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False, "amx_bf16": False}, False)],
)
def test_bfloat16_is_multiplied_where_processor_and_onednn_can(monkeypatch, known, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(products, "_LINEAR", torch.mm)
    assert products.multiplies_bfloat16() == expected
    monkeypatch.setattr(products, "_LINEAR", None)
    assert not products.multiplies_bfloat16()


def test_a_torch_that_cannot_tell_what_the_processor_can_multiplies_no_bfloat16(monkeypatch):
    monkeypatch.setattr(products, "_LINEAR", torch.mm)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not products.multiplies_bfloat16()
