"""Our matrix products of float32 and of bfloat16, on processors that have them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends import DEVICE
from tests.tolerance import assert_close
from warpo.kernels._arguments.matrix_product import MatrixProductArguments
from warpo.kernels._matrix_product import OWN_PRODUCTS, own_product

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has them from BLAS")
each_dtype = pytest.mark.parametrize("dtype", OWN_PRODUCTS, ids=str)

# around a tile of 6 x 64, a block of 384 rows, vectors of 16 and their pairs; of depths, 512, 1024
SIZES = st.sampled_from([1, 2, 3, 6, 7, 16, 17, 33, 64, 65, 130, 385, 600])
DEPTHS = SIZES | st.sampled_from([511, 512, 513, 1023, 1024, 1025, 2050])


def product_of(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    product = own_product(torch.empty(1, dtype=dtype))
    if product is None:
        pytest.skip("it needs AVX512, that of bfloat16 AVX512_BF16 and a compiler that knows it")

    def multiply(a: Tensor, b: Tensor, addend: Tensor | None, out: Tensor) -> None:
        rows, columns = out.shape
        product(
            MatrixProductArguments(
                rows=rows, columns=columns, depth=a.shape[1], a=a, b=b, addend=addend, out=out
            )
        )

    return multiply


@st.composite
def matrices(draw, dtypes, rows: int, columns: int, transposed: bool = True):
    """Contiguous in one dimension, with NaN beside what may be read."""
    turned = transposed and draw(st.booleans())
    shape = (columns, rows) if turned else (rows, columns)
    wide = torch.full((shape[0], shape[1] + draw(st.sampled_from([0, 3]))), torch.nan)
    wide[:, : shape[1]] = torch.randn(shape)
    narrow = wide.to(draw(st.sampled_from(dtypes)))[:, : shape[1]]
    return narrow.T if turned else narrow


@st.composite
def cases(draw, dtype: torch.dtype):
    rows, columns, depth = draw(SIZES), draw(SIZES), draw(DEPTHS)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    both = (torch.float32, dtype)
    a = draw(matrices(both, rows, depth))
    b = draw(matrices((dtype,), depth, columns))
    out = draw(matrices(both, rows, columns, transposed=False))
    addend = draw(st.none() | matrices(both[:1], rows, columns, transposed=False))
    if addend is not None and out.dtype == torch.float32 and draw(st.booleans()):
        addend = out
    return a, b, addend, out


@each_dtype
def test_it_equals_float64(dtype):
    multiply = product_of(dtype)

    @settings(max_examples=60, deadline=None)
    @given(cases(dtype))
    def check(case):
        a, b, addend, out = case
        exact_a, exact_b = a.to(dtype).double(), b.double()
        start = torch.zeros(()) if addend is None else addend.double()
        wanted = start + exact_a @ exact_b
        # sums of up to 1024 terms in order, an ulp of float32 each, of what the terms add up to
        scale = (start.abs() + exact_a.abs() @ exact_b.abs()).max().item()
        whole = (out.shape[0], out.stride(0))
        beside = out.as_strided(whole, (out.stride(0), 1))[:, out.shape[1] :]
        multiply(a, b, addend, out)
        assert_close(out, wanted, relative=0, absolute=1e-6 * scale, what="product")
        assert beside.isnan().all()

    check()


@each_dtype
@pytest.mark.parametrize("shape", [(64, 300, 40), (600, 90, 70), (7, 64, 3000), (1, 1, 5000)])
def test_neither_threads_nor_the_other_sizes_change_bits(dtype, shape):
    rows, columns, depth = shape
    multiply = product_of(dtype)
    a, b = torch.randn(rows, depth), torch.randn(depth, columns).to(dtype)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(torch.empty(rows, columns))
        multiply(a, b, None, results[-1])
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], x) for x in results[1:])
    corner = torch.empty(1, 1)
    multiply(a[-1:], b[:, -1:], None, corner)
    assert corner[0, 0] == results[0][-1, -1]


@each_dtype
def test_infinities_and_nan_arrive(dtype):
    a, b = torch.ones(3, 5), torch.ones(5, 4, dtype=dtype)
    a[0, 1], a[1, 4] = torch.inf, torch.nan
    out = torch.empty(3, 4)
    product_of(dtype)(a, b, None, out)
    assert out[0].isposinf().all() and out[1].isnan().all() and (out[2] == 5).all()
