"""pytest's option ``--method``, of ``pytest --pyargs galore_pretrain.optim.check --method METHOD``.

pytest loads this in every session where the package is installed. So nothing is imported here, and the option exists
only where the checks are asked for by name: no other plugin's ``--method`` is disturbed.
"""

from typing import Any

_CHECKS = ("galore_pretrain.optim.check", "galore_pretrain/optim/check.py")


def pytest_addoption(parser: Any, pluginmanager: Any) -> None:
    """Add ``--method`` where a command line names the checks."""
    config = pluginmanager.get_plugin("pytestconfig")
    words = [str(word).replace("\\", "/") for word in config.invocation_params.args]
    if any(word.endswith(_CHECKS) for word in words):
        parser.getgroup("galore-pretrain").addoption(
            "--method",
            action="append",
            default=[],
            metavar="METHOD",
            help="check this method: a shipped one, FILE.py:NAME or package.module:NAME; repeatable",
        )
