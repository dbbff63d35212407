"""`python -m jobs <command>`, the same as `alphatoken <command>`."""

import sys

from jobs.cli import main

sys.exit(main())
