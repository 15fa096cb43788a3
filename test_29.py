"""Tests of issue 29 in data.py, to be folded into test_mope.py."""

import json
import os
import sys
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import train
from mope import BERT, InputError, load_bert
from test_mope import (WORDS, arguments, ended, folder, make_bert, make_food, make_grocery, output,
                       read, refused, start, stop_in_the_first_step, write_rows)


def test_whatever_ends_sending_ends_the_program(root):
    """And a long TMPDIR, whose sockets would have too long a path, is no hindrance."""
    argv = arguments(root, "--epochs", "1", "--workers", "1", "--out", f"{root}/run")
    fail = ("from multiprocessing.reduction import ForkingPickler\n"
            "def fail(tensor): raise OSError('no more shared memory')\n"
            "ForkingPickler.register(torch.Tensor, fail)")
    _, said = ended(start(argv, fail), 1)
    assert "no more shared memory" in said and said.splitlines()[-1].startswith("error: DataLoader")
    temporary = root / ("x" * 80)
    temporary.mkdir()
    ended(start([*argv[:-1], f"{root}/other"], TMPDIR=str(temporary)))


def test_workers_share_the_samples_where_they_can(root):
    loader = data.loader(data.Batches(mock.Mock(), 1), None, workers=1)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    for platform, workers in (("linux", 16), ("win32", 4)):
        with mock.patch("os.sched_getaffinity", return_value=set(range(64)), create=True):
            with mock.patch("sys.platform", platform):
                assert train.settings("food101", "mope")["workers"] == workers


if __name__ == "__main__":
    sys.argv[0] = __file__
    for name, test in list(globals().items()):
        if name.startswith("test_") and (len(sys.argv) == 1 or any(w in name for w in sys.argv[1:])):
            with folder() as path:
                test(*[path] * test.__code__.co_argcount)
            print("ok", name, flush=True)
