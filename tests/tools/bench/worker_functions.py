"""What the worker processes of test_bench_cases.py are asked to measure."""

from __future__ import annotations

import logging
import os
import signal
import time


def product(number: int, factor: int, device: str) -> dict[str, int]:
    return {"product": number * factor, "process": os.getpid()}


def product_unless_13(number: int, factor: int, device: str) -> dict[str, int]:
    if number == 13:
        raise ValueError("13 is unlucky")
    return product(number, factor, device)


def memory_of(number: int, factor: int, device: str) -> dict[str, int]:
    return {"bytes": len(bytearray(number)), "process": os.getpid()}


def killed_at_1(number: int, factor: int, device: str) -> dict[str, int]:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return product(number, factor, device)


def sleep(number: int, factor: int, device: str) -> dict[str, int]:
    time.sleep(number)
    return {}


def talkative(number: int, factor: int, device: str) -> dict[str, int]:
    print('{"product": 666}')
    return {"product": number * factor}


def unsupported_13(number: int, factor: int, device: str) -> dict[str, int]:
    if number == 13:
        raise ValueError("backend 'fast' has no kernel for depth 13")
    return product(number, factor, device)


def warned_once(backend: str, length: int, factor: int, device: str) -> dict[str, int]:
    if backend == "broken" and not _WARNED:
        _WARNED.append(backend)
        logging.getLogger("kernels.memory").warning("the kernels of %s are off", backend)
    return {"product": length * factor}


_WARNED: list[str] = []
