"""The requested number of results is made, as long as numbers succeed."""

from data_pipeline.synthesis.rounds import shortfall, until_enough


def made(make, count: int) -> list[tuple[int, int | None]]:
    return list(until_enough(make, count, 1, "a test", lambda result: result is not None))


def test_numbers_that_fail_are_followed_by_others():
    results = made(lambda number: number if number % 3 else None, 6)
    assert [number for number, _ in results] == list(range(len(results)))
    assert [result for _, result in results if result is not None] == [1, 2, 4, 5, 7, 8]


def test_it_ends_when_nothing_succeeds():
    assert made(lambda number: number if number < 2 else None, 5) == [(n, n if n < 2 else None) for n in range(8)]
    assert len(made(lambda number: number if number % 20 == 0 else None, 10)) <= 50


def test_the_message():
    assert shortfall(4, 4, {"x": 1}) is None
    assert shortfall(1, 4, {"a": 1, "b": 3}) == "made only 1 of 4 records; most frequent reasons: b 3, a 1"
