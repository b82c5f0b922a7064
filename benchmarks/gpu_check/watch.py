"""Clocks, power and throttling of the GPU while a stage runs: nvidia-smi, asked twice a second, summarised.

{"sm_mhz": [least, median, most], "memory_mhz", "power_w", "power_limit_w", "celsius", "throttled": [reasons]}, or None where
there is no nvidia-smi. The card's settings are never changed.
"""

import contextlib
import statistics
import subprocess
import tempfile

COLUMNS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "celsius": "temperature.gpu",
    "throttled": "clocks_throttle_reasons.active",
}
REASONS = {0x4: "power", 0x8: "slowdown", 0x20: "heat", 0x40: "heat, by hardware", 0x80: "power brake"}
PRETENDED = "1700, 2619, 690.12, 700.00, 61, 0x0000000000000004\n1740, 2619, [N/A], 700.00, 60, 0x0000000000000000\n"


class Watch:
    def __init__(self, pretend=False):
        query = ["nvidia-smi", f"--query-gpu={','.join(COLUMNS.values())}", "--format=csv,noheader,nounits", "-lms", "500"]
        self.command = ["printf", "%s", PRETENDED] if pretend else query
        self.wait = 5.0 if pretend else 0.0

    def __enter__(self):
        self.file = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.DEVNULL)
        except OSError:
            self.process = None
        return self

    def __exit__(self, *_):
        if self.process:
            for wait, end in ((self.wait, self.process.kill), (2.0, lambda: None)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(wait)
                end()

    def summary(self):
        self.file.seek(0)
        lines = [line.strip().split(", ") for line in self.file if line.count(",") == len(COLUMNS) - 1]
        self.file.close()
        return summary(lines) if lines else None


def summary(lines):
    """The summary of lines of values in the order of COLUMNS."""
    values = dict(zip(COLUMNS, zip(*lines, strict=True), strict=True))
    reasons = 0
    for value in values.pop("throttled"):
        reasons |= int(value, 16) if value.startswith("0x") else 0
    found = {name: _spread(column) for name, column in values.items()}
    return {**found, "throttled": [reason for bit, reason in REASONS.items() if reasons & bit]}


def _spread(column):
    numbers = []
    for value in column:
        with contextlib.suppress(ValueError):  # [N/A]
            numbers.append(float(value))
    return [min(numbers), statistics.median(numbers), max(numbers)] if numbers else None
