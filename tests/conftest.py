"""What all tests share: a fork server for the processes that they start."""

import multiprocessing

from forked import PRELOAD

multiprocessing.set_forkserver_preload(list(PRELOAD))
