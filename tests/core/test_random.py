"""The hash is part of the format: numpy and torch agree, golden values hold for ever, keys do not interfere."""

import numpy as np
import torch

from ssl_kit.core.random import Key, permutation, random_bits, uniform, uniform_array


def test_golden_values():
    golden = [[15287194, 5894855, 9510409, 248761], [1232648, 7296554, 3724738, 423496]]
    drawn = uniform_array(seed=7, epoch=3, index=np.arange(2), stream=5, count=4)
    assert (drawn * 2**24).astype(np.int64).tolist() == golden


def test_torch_equals_numpy_bit_for_bit():
    index = np.array([0, 1, 2**31, 2**40 + 7, 12345])
    for seed, epoch, stream in [(0, 0, 0), (2**63 + 5, 1000, 1001), (-3, 7, 99)]:
        wanted = uniform_array(seed, epoch, index, stream, 33)
        drawn = uniform(Key(seed, epoch, torch.from_numpy(index)), stream, 33)
        assert drawn.dtype == torch.float32
        assert np.array_equal(drawn.numpy(), wanted)


def test_draws_are_uniform_and_in_range():
    drawn = uniform_array(0, 0, np.arange(100_000), 0, 1)[:, 0]
    assert drawn.min() >= 0 and drawn.max() < 1
    histogram = np.histogram(drawn, bins=20, range=(0, 1))[0]
    chi_square = ((histogram - 5000) ** 2 / 5000).sum()
    assert chi_square < 43.8  # 99.9 % point of chi-square with 19 degrees of freedom


def test_every_part_of_the_key_matters_and_neighbours_are_uncorrelated():
    index = np.arange(20_000)
    base = uniform_array(1, 1, index, 1, 1)[:, 0]
    others = [
        uniform_array(*key, 1)[:, 0]
        for key in [(2, 1, index, 1), (1, 2, index, 1), (1, 1, index + 1, 1), (1, 1, index, 2)]
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(len(index))


def test_a_row_does_not_depend_on_its_batch():
    whole = random_bits(3, 2, np.arange(50), 4, 6)
    assert np.array_equal(random_bits(3, 2, np.array([17]), 4, 6), whole[17:18])
    assert np.array_equal(random_bits(3, 2, np.arange(50), 4, 2), whole[:, :2])


def test_permutation_is_a_permutation_and_changes_with_the_epoch():
    first, second = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert (first == second).mean() < 0.05
    assert np.array_equal(first, permutation(0, 0, 1000))
