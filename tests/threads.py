"""Runs functions in threads at once, switching between them often, for the invariants of threads."""

import sys
import threading

import pytest
import torch


@pytest.fixture
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works):
    """Return the results of functions that start together, each in a thread of its own."""
    start, results = threading.Barrier(len(works)), [None] * len(works)

    def run(index):
        torch.set_num_threads(1)
        start.wait()
        try:
            results[index] = works[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
