"""python -m cosface_kernels: the same as the `cosface` command."""

import os
import sys

from .tools.cli import main

status = main()
if "TORCHELASTIC_RUN_ID" in os.environ and not status:  # a Gloo thread that outlives the interpreter aborts (pytorch#179291)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
raise SystemExit(status)
