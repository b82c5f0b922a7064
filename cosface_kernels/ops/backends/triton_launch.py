"""Launches of one kernel from slab after slab of a call.

Triton chooses the compiled kernel by the dtype and alignment of every argument, which takes the host longer than the launch. They
are the same for all whole slabs of a call, because these begin at multiples of slabs.SLAB_ALIGNMENT rows: it chooses once.
"""


class Launcher:
    """A kernel, and the constants that all its launches in a call have."""

    def __init__(self, kernel, **constants):
        self.kernel, self.constants = kernel, constants
        self._chosen = self._rest = None  # the compiled kernel of a whole slab, and its constants as arguments

    def __call__(self, programs, *arguments, whole=False, **constants):
        """Launch so many programs.

        whole: whether every argument has the dtype and alignment, and every constant the value, of other launches that say so.
        """
        if whole and self._chosen is not None:
            self._chosen[programs, 1, 1](*arguments, *self._rest)
            return
        constants = self.constants | constants
        chosen = self.kernel[(programs,)](*arguments, **constants)  # None from Triton's interpreter
        if whole and chosen is not None:
            self._chosen, self._rest = chosen, [constants[name] for name in self.kernel.arg_names[len(arguments) :]]
