"""`python -m tests.faults.without_room read|write URI NAME`: tensors where no file may grow beyond 1 MB; prints the error."""

import resource
import signal
import sys

import torch

from alphatoken.pipeline.anchor.tensors import mapped_tensors, write_tensors
from alphatoken.pipeline.run import attempts
from alphatoken.pipeline.run.storage import Storage

if __name__ == "__main__":
    what, uri, name = sys.argv[1:]
    attempts.PAUSES = ()
    storage = Storage(uri)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        if what == "read":
            mapped_tensors(storage, name)
        else:
            write_tensors(storage, name, {"w": torch.ones(1 << 20)}, {})
    except OSError as error:
        print(error)
