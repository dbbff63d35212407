"""Hold the lock of a run directory until killed:  python -m tests.run.hold_lock ROOT"""

import sys
import time

from alphatoken.pipeline.run.lock import RunLock
from alphatoken.pipeline.run.storage import Storage

with RunLock(Storage(sys.argv[1])):
    time.sleep(600)
