"""Items that threads make ahead: order, errors, and consumers that stop early."""

import itertools
import threading

import pytest

from qi2_jax.runtime.read_ahead import map_ahead, read_ahead


def test_items_are_made_ahead_and_an_error_comes_in_its_place():
    made = []

    def make(number):
        if number == 3:
            raise ValueError("no third item")
        made.append(number)
        return number

    items = read_ahead(map(make, range(9)), 2)
    assert next(items) == 0
    assert [next(items), next(items)] == [1, 2] and made == [0, 1, 2]
    with pytest.raises(ValueError, match="no third item"):
        next(items)
    assert list(read_ahead(iter(range(5)), 2)) == list(range(5))
    # A consumer that stops early leaves no thread behind.
    begun = read_ahead(map(make, itertools.count(10)), 2)
    next(begun)
    begun.close()
    assert len(made) <= 6


def test_several_threads_keep_the_order_and_take_few_items_ahead():
    taken, gate = [], threading.Event()

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: gate.wait(10) and -number, items(), 4, threads=3)
    gate.set()
    assert next(results) == 0 and len(taken) <= 5
    assert list(results) == [-number for number in range(1, 20)]
