"""`galore-pretrain check` on a machine where the package is not installed but lies on PYTHONPATH, and click is missing.

    PYTHONPATH=CHECKOUT python3 gpu_check.py --out OUT --minutes 9 --text FILE --tokenizer FILE --only numerics seven

What is checked is in galore_pretrain/check. OUT gets check.md and check.json. Without --text, the sample is read where
it is installed. Parts of the names that this script once had are the parts that came of them.
"""

import argparse
import sys
from pathlib import Path

from galore_pretrain.check.parts import PARTS
from galore_pretrain.check.runner import Runner, settings_for
from galore_pretrain.errors import InputError

FORMER = {
    "env": "environment",
    "wide": "speed",
    "command_line": "resume",
    "host": "export",
    "loader": "reader",
}
"""Former names of parts, and the parts of today."""
SHOWN = 11_000  # characters of the page that are printed


def say(line: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(line, flush=True)


def main() -> int:
    """Run the parts, print the page, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of check.md and check.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *FORMER], default=list(PARTS))
    parser.add_argument("--text", default="sample", help="a file of C4's format")
    parser.add_argument("--tokenizer", help="T5's spiece.model")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    names = list(dict.fromkeys(FORMER.get(name, name) for name in options.only))
    try:
        settings = settings_for(options.device, options.text, options.tokenizer)
    except InputError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    code = Runner(settings, options.minutes, options.out, say).run(names)
    say((options.out / "check.md").read_text()[:SHOWN])
    return code


if __name__ == "__main__":
    sys.exit(main())
