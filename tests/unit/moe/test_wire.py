"""Rows as 8-bit floats: each entry within half a step of e4m3, whatever a row's size."""

import pytest
import torch

from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.wire import check_wire, decode, encode

pytestmark = pytest.mark.unit


def there_and_back(x, dtype=None):
    byte, scale = encode(x)
    assert byte.dtype == torch.uint8
    assert scale.dtype == torch.float32
    assert scale.shape == (len(x), 1)
    return decode(byte, scale, dtype or x.dtype), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_at_most_half_a_step(dtype):
    """4 significant bits: half a step is 2^-4 of an entry. Below 2^-6 scales steps are 2^-9 scales wide."""
    g = torch.Generator().manual_seed(0)
    size = torch.logspace(-30, 30, 64, dtype=torch.float64)[:, None]
    spread = torch.logspace(-6, 0, 256, dtype=torch.float64)[torch.randperm(256, generator=g)]
    x = (torch.randn(64, 256, generator=g, dtype=torch.float64) * size * spread).to(dtype)
    got, scale = there_and_back(x)
    error, exact = (got.double() - x.double()).abs(), x.double().abs()
    small = exact < 2.0**-6 * scale
    assert small.any()
    assert bool((error[~small] <= exact[~small] * 2.0**-4).all())
    assert bool((error <= torch.maximum(exact * 2.0**-4, scale.double() * 2.0**-10)).all())
    assert float((error / exact)[~small].max()) > 2.0**-5  # not more bits than promised: the bound is the bound
    largest = exact.amax(1, keepdim=True)
    assert bool(((largest >= 128 * scale) & (largest < 256 * scale)).all())


def test_bf16_holds_every_decoded_entry():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    byte, scale = encode(x)
    assert torch.equal(decode(byte, scale, torch.bfloat16).double(), decode(byte, scale, torch.float64))
    again = encode(decode(byte, scale, torch.bfloat16))
    assert torch.equal(decode(*again, torch.float64), decode(byte, scale, torch.float64))


def test_rows_without_a_token_and_rows_of_zeros():
    got, scale = there_and_back(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert torch.equal(got, torch.zeros_like(got))
    assert bool((scale > 0).all())
    assert there_and_back(torch.zeros(0, 8, dtype=torch.bfloat16))[0].shape == (0, 8)


@pytest.mark.parametrize("largest", [torch.finfo(torch.bfloat16).max, 3.0e38, 2.0**-126, 2.0**-133])
def test_the_ends_of_the_range(largest):
    """The largest and the smallest numbers, beside entries a row's size makes vanish."""
    x = torch.tensor([[largest, -largest, largest / 2, 0.0]]).bfloat16()
    got, scale = there_and_back(x)
    assert bool(got.isfinite().all())
    error = (got.double() - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10)).all())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_stays_so_alone(bad):
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    x[1, 5] = bad
    got, _ = there_and_back(x)
    assert bool(got[1].isnan().all())  # the norm of the gradient will say so
    assert torch.equal(got[[0, 2]], x[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refused_beside_more_bits(dtype):
    shape = ExchangeShape(8, 8, 2, dtype, "cpu")
    with pytest.raises(ValueError, match=r"dispatch\.wire=fp8 .*train\.precision=bf16.*nearest legal value: full"):
        check_wire("collective", "fp8", shape)
    check_wire("collective", "full", shape)
    check_wire("collective", "fp8", ExchangeShape(8, 8, 2, torch.bfloat16, "cpu"))
