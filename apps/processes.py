"""Processes for studies that train many nets: one thread each, and none of them outlives the study, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import cv2
import torch


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes; where the block is left by an error or Ctrl-C, what is under way is ended at once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded in the processes
    pool, tidy = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _one_thread), False
    try:
        yield pool
        tidy = True
    finally:
        for process in multiprocessing.active_children():
            if not tidy:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Of a process of the pool: Ctrl-C is the parent's, and it ends with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end, daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
