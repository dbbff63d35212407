"""`python -m alphatoken.jobs <command>`, the same as `alphatoken <command>`."""

import sys

from alphatoken.jobs.cli import main

sys.exit(main())
