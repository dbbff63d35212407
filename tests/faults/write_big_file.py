"""Write 24 MiB under a name, in a process that can be killed:  python -m tests.faults.write_big_file ROOT NAME"""

import sys

from alphatoken.pipeline.run.storage import Storage

Storage(sys.argv[1]).write_bytes(sys.argv[2], bytes(24 << 20))
