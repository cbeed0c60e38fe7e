"""One part of the check, as `runner` starts it: ``python -m galore_pretrain.check PART SETTINGS FILE LIMIT``."""

import json
import logging
import sys
from pathlib import Path

from galore_pretrain.check.part import Part, Settings
from galore_pretrain.check.parts import PARTS
from galore_pretrain.rundir.environment import describe_environment


def main() -> None:
    """Make one part; an exception of it is Python's own traceback and exit code."""
    name, settings, file, limit = sys.argv[1:]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    part = Part(Settings(**json.loads(settings)), Path(file), float(limit))
    description = describe_environment(part.device)
    del description["argv"]  # of this process, with the user's folders
    part.machine(description)
    PARTS[name].function()(part)


main()
