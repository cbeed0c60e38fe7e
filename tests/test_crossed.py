"""Fewer combinations, in which all pairs are."""

import itertools

import pytest

import crossed


@pytest.mark.parametrize("sizes", [(2, 2, 2), (24, 3, 2), (3, 3, 3, 3), (5, 2, 2, 2, 2), (4, 7), (3,), (1, 1, 2)])
def test_any_two_values_meet(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[f"{number} of {i}" for number in range(size)] for i, size in enumerate(sizes)]
    everything = list(itertools.product(*lists))
    monkeypatch.setattr(crossed, "FULL", False)
    found = crossed.pairwise(*lists)
    met = {pair for combination in found for pair in itertools.combinations(combination, 2)}
    assert met == {pair for combination in everything for pair in itertools.combinations(combination, 2)}
    assert set(found) <= set(everything)
    assert len(set(found)) == len(found)
    if len(sizes) > 2 and min(sizes) > 1:
        assert len(found) < 0.6 * len(everything)
    monkeypatch.setattr(crossed, "FULL", True)
    assert crossed.pairwise(*lists) == everything
