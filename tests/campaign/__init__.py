"""Random cases against oracles, to find what nobody thought of:  python -m tests.campaign --minutes 10 --seed 1

A kind of case is a module with SPACE, {name: values, the simplest first}, of which a case is one choice each; `settle(case)`,
which makes an impossible choice a possible one; and `check(case)`, which raises where something is wrong. Drawing, isolation in
a process that may crash, and making a failure smaller (engine.py) need to know no more.

    losses.py      every margin, backend, dtype, stride, option against float64, by the rule of tests/cases.py
    options.py     what goes beside a margin, in any combination, against the formulas that formulas.py writes out
    optimisers.py  programs of backward and step against torch.optim
    identities.py  programs of a head's other calls: grow, remove, save, load, look up
    shards.py      one step of a head in shards, on ranks of its own, against one process
    saves.py       saves and conversions that die in their n-th call of the system
    files.py       checkpoints and tables with changed bytes, with and without sums that fit
    hostile.py     calls with what is no such argument

surface.py has every public argument, and which kind draws it. tables.py: of which numbers and classes a table is made.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:  # for cases.py and the like, as pytest has it
    sys.path.insert(0, str(TESTS))
