"""Waits for a training that runs in another process."""

import json
import time

from neurosens.training import logs


def wait_for_step(workdir, step, process):
    """Waits until the log has a line of at least this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            lines = (workdir / logs.METRICS_FILE).read_text().splitlines()
        except FileNotFoundError:
            lines = []
        # The last line may be half written.
        if any(json.loads(line)['step'] >= step for line in lines[:-1]):
            return
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
