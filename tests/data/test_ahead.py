"""Work ahead: order, the bound, errors at their place, and an end to it."""

import threading

import pytest

from dinov2_jax.data.ahead import map_ahead


def test_results_come_in_order():
    found = map_ahead(lambda x: x * x, range(100), num_threads=4, ahead=7)
    assert list(found) == [x * x for x in range(100)]
    assert list(map_ahead(str, [], num_threads=2, ahead=3)) == []
    assert list(map_ahead(str, [1, 2], num_threads=2, ahead=0)) == ["1", "2"]


def test_no_more_than_the_bound_is_ahead():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    found = map_ahead(str, items(), num_threads=2, ahead=5)
    for i in range(50):
        assert next(found) == str(i)
        assert len(taken) <= i + 1 + 5


def test_an_error_comes_at_its_place():
    found = map_ahead(lambda x: 1 // x, [1, 1, 0, 1], num_threads=2, ahead=4)
    assert [next(found), next(found)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_closing_ends_the_threads_and_drops_the_rest():
    started, before = [], threading.active_count()
    release = threading.Event()

    def work(x):
        started.append(x)
        if x:
            release.wait(10)
        return x

    found = map_ahead(work, range(100), num_threads=1, ahead=50)
    assert next(found) == 0
    release.set()
    found.close()
    assert threading.active_count() == before
    assert len(started) < 60
