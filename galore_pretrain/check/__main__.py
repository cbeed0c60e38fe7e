"""One part of the check, as `runner` starts it: ``python -m galore_pretrain.check PART SETTINGS FILE LIMIT``."""

import json
import logging
import sys
from pathlib import Path

import torch

from galore_pretrain.check.part import Part, Settings
from galore_pretrain.check.parts import PARTS
from galore_pretrain.check.updates import first_line
from galore_pretrain.rundir.environment import describe_environment


def main() -> None:
    """Make one part; an exception of it is Python's own traceback and exit code.

    A card that is too small for what is tried is no fault. Where it is one, the part looks for it itself.
    """
    name, settings, file, limit = sys.argv[1:]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    part = Part(Settings(**json.loads(settings)), Path(file), float(limit))
    description = describe_environment(part.device)
    del description["argv"]  # of this process, with the user's folders
    part.machine(description)
    try:
        PARTS[name].function()(part)
    except torch.OutOfMemoryError as error:
        part.skip("the rest of this part", f"the card has no room: {first_line(error)}")


main()
