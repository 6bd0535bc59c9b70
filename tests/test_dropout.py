"""Masks: the published generator, the layout, the probabilities, and nothing else."""

import itertools
import pickle

import numpy as np
import pytest

import bnext
import reference
from bnext import _core, nn
from bnext import functional as F
from cases import DTYPES, HALF_DTYPES, dtype_name

# Random123's known-answer vectors (kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert tuple(_core.philox4x32_10(counter, key)) == answer
    assert tuple(int(word) for word in reference.philox4x32_10(counter, key)) == answer


@pytest.mark.parametrize(
    ("dtype", "p"),
    [
        *itertools.product(DTYPES, [0.1, 0.5, 1 / 3, 0.999, 2**-32, 1 - 2**-32]),
        *itertools.product(HALF_DTYPES, [1 / 3]),
    ],
    ids=dtype_name,
)
@pytest.mark.parametrize("size", [1, 15, 31, 32, 33, 128, 129, 511, 2049, 32768, 32769, 200_001])
def test_equals_the_reference(backend, dtype, size, p):
    x = np.random.default_rng(0).normal(size=size).astype(dtype)
    y, saved = F.dropout_forward(x, p, generator=bnext.Generator(size))
    expected = reference.dropout(x, p, size, 0)
    assert np.array_equal(y, expected)
    assert np.array_equal(F.dropout_backward(x, saved), expected)
    assert (saved.p, saved.seed, saved.offset) == (p, size, 0)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**32, 2**64 - 2])
def test_seed_and_offset_use_all_their_bits(backend, seed, offset):
    generator = bnext.Generator(seed)
    generator.state = {"seed": seed, "offset": offset}
    x = np.ones(500, np.float32)
    y, _ = F.dropout_forward(x, generator=generator)
    assert np.array_equal(y, reference.dropout(x, 0.5, seed, offset))
    assert generator.state == {"seed": seed, "offset": offset + 1}


@pytest.mark.parametrize("bits", range(1, 33))
def test_every_number_of_bits_that_a_threshold_can_have(backend, bits):
    """A draw decides by four of them, and what is undecided takes another."""
    size = 50_000
    numbers = reference.dropout_bits(size, 7, 0)
    for threshold in (1 << (32 - bits), int(numbers[0]) >> (32 - bits) << (32 - bits) | 1):
        y, _ = F.dropout_forward(
            np.ones(size, np.float32), threshold / 2**32, generator=bnext.Generator(7)
        )
        assert np.array_equal(y == 0, numbers < np.uint64(threshold))


def test_thresholds_that_a_number_equals(backend):
    """All 32 bits count: the probability is exact to 2^-32."""
    x = np.ones(1 << 20, np.float32)
    bits = reference.dropout_bits(x.size, 7, 0)
    equal = int(bits[12345])
    for threshold in (equal, equal + 1):  # the element is kept at `equal`, dropped at equal + 1
        y, _ = F.dropout_forward(x, threshold / 2**32, generator=bnext.Generator(7))
        assert np.array_equal(y == 0, bits < np.uint64(threshold))
    y0, _ = F.dropout_forward(x, equal / 2**32, generator=bnext.Generator(7))
    y1, _ = F.dropout_forward(x, (equal + 1) / 2**32, generator=bnext.Generator(7))
    different = np.flatnonzero((y0 == 0) != (y1 == 0)).tolist()
    assert different == np.flatnonzero(bits == equal).tolist()


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_share_and_independence(p):
    """Counts within five standard deviations, for elements and for pairs at several distances."""
    size = 1 << 22
    y, _ = F.dropout_forward(np.ones(size, np.float32), p, generator=bnext.Generator(3))
    dropped = y == 0
    assert abs(dropped.sum() - p * size) < 5 * np.sqrt(size * p * (1 - p))
    for distance in (1, 2, 16, 31, 32, 64, 128, 1024):
        both = np.count_nonzero(dropped[distance:] & dropped[:-distance])
        expected, count = p * p, size - distance
        assert abs(both - expected * count) < 5 * np.sqrt(count * expected) + 1


def test_mask_depends_on_the_element_not_on_shape_or_dtype(backend, restore_threads):
    flat, _ = F.dropout_forward(np.ones(6000, np.float32), generator=bnext.Generator(1))
    for shape in ((6000,), (2, 3000), (10, 20, 30)):
        for dtype in DTYPES + HALF_DTYPES:
            for threads in (1, 2, 4):
                bnext.set_num_threads(threads)
                y, _ = F.dropout_forward(np.ones(shape, dtype), generator=bnext.Generator(1))
                assert np.array_equal(y.reshape(-1), flat)


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_limits(backend, value):
    x = np.full(1000, value, np.float32)
    generator = bnext.Generator(1)
    y, saved = F.dropout_forward(x, 0, generator=generator)
    assert np.array_equal(y, x, equal_nan=True)
    assert y is not x
    assert np.array_equal(F.dropout_backward(x, saved), x, equal_nan=True)
    assert generator.state["offset"] == 0
    y, saved = F.dropout_forward(x, 1, generator=generator)
    assert (y == 0).all()
    assert (F.dropout_backward(x, saved) == 0).all()


def test_dropped_elements_are_zero_whatever_they_were(backend):
    x = np.full(1000, np.nan, np.float32)
    y, _ = F.dropout_forward(x, generator=bnext.Generator(1))
    assert set(np.unique(np.nan_to_num(y, nan=7.0))) == {0.0, 7.0}


def test_default_generator_and_manual_seed():
    x = np.ones(100, np.float32)
    assert bnext.manual_seed(5) is bnext.random.default_generator
    first, second = F.dropout_forward(x)[0], F.dropout_forward(x)[0]
    assert not np.array_equal(first, second)
    bnext.manual_seed(5)
    assert np.array_equal(F.dropout_forward(x)[0], first)
    assert np.array_equal(F.dropout_forward(x, generator=bnext.Generator(5))[0], first)


def test_generator_state_restores_and_pickles():
    x = np.ones(100, np.float32)
    generator = bnext.Generator(5)
    F.dropout_forward(x, generator=generator)
    state = generator.state
    expected = F.dropout_forward(x, generator=generator)[0]
    copy = pickle.loads(pickle.dumps(generator))
    assert copy.state == generator.state
    generator.state = state
    assert np.array_equal(F.dropout_forward(x, generator=generator)[0], expected)
    assert repr(generator) == "Generator(seed=5, offset=2)"


# -- layers ----------------------------------------------------------------------------------------


def test_layer_drops_in_training_only():
    x = np.random.default_rng(0).normal(size=(8, 6, 5, 5)).astype(np.float32)
    for kind in (nn.Dropout, nn.Dropout2d):
        layer = kind(0.4, generator=bnext.Generator(2))
        y, backward = layer.forward(x)
        assert (y == 0).any()
        np.testing.assert_array_equal(backward(x), y)  # linear: the same product
        assert layer(x) is x
        layer.eval()
        y, backward = layer.forward(x)
        assert y is x
        assert backward(x) is x


def test_dropout2d_drops_whole_channels():
    x = np.ones((50, 40, 3, 3), np.float32)
    y, _ = nn.Dropout2d(0.25, generator=bnext.Generator(2)).forward(x)
    assert (y == y[:, :, :1, :1]).all()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y[:, :, 0, 0] == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_one_dropout_layer_used_twice():
    x = np.ones((1, 1000), np.float32)
    layer = nn.Dropout(0.5, generator=bnext.Generator(2))
    first, first_backward = layer.forward(x)
    second, second_backward = layer.forward(x)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first_backward(x), first)
    np.testing.assert_array_equal(second_backward(x), second)
