"""Hold the lock of a run directory until killed:  python -m tests.faults.hold_lock ROOT"""

import sys
import time

from pipeline.stages.lock import RunLock
from pipeline.stages.storage import Storage

with RunLock(Storage(sys.argv[1])):
    time.sleep(600)
