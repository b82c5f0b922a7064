"""python -m cosface_kernels: the same as the `cosface` command."""

from .cli import main

raise SystemExit(main())
